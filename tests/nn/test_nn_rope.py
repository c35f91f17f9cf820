"""Rope against transformers' own tables and against angles worked by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from speculators.nn.rope import Rope, rope_parameters

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 512}
PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_rotation_equals_transformers(kind):
    config = LlamaConfig(**SHAPE, rope_parameters=PARAMETERS[kind])
    x_BTNd = torch.randn(2, 7, 4, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 11, 40, 100, 255, 300, 511]])
    cos, sin = LlamaRotaryEmbedding(config)(x_BTNd, positions)
    heads_first = x_BTNd.transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    rope = Rope(config)
    torch.testing.assert_close(rope.at(positions, torch.float32).rotate(x_BTNd), expected.transpose(1, 2))
    tables = rope.tables(512, x_BTNd.device, torch.float32).at(positions)
    torch.testing.assert_close(tables.rotate(x_BTNd), expected.transpose(1, 2))


def test_rotation_of_a_pair_is_by_position_times_frequency():
    """theta 100, head size 4: pair (x0, x2) turns by p, pair (x1, x3) by p / 10."""
    config = LlamaConfig(hidden_size=4, num_attention_heads=1, head_dim=4, rope_parameters={"rope_theta": 100.0})
    turned = Rope(config).at(torch.tensor([3]), torch.float64).rotate(torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]]).double())
    expected = torch.tensor([math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)], dtype=torch.float64)
    torch.testing.assert_close(turned.flatten(), expected, atol=1e-6, rtol=0)


def test_partial_rotary_leaves_the_rest_alone():
    config = Qwen3Config(**SHAPE, rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5})
    whole = Qwen3Config(**{**SHAPE, "head_dim": 8}, rope_parameters={"rope_theta": 10000.0})
    x = torch.randn(1, 3, 2, 16)
    positions = torch.tensor([4, 5, 6])
    turned = Rope(config).at(positions, torch.float32).rotate(x)
    torch.testing.assert_close(turned[..., :8], Rope(whole).at(positions, torch.float32).rotate(x[..., :8]))
    assert torch.equal(turned[..., 8:], x[..., 8:])


def test_parameters_are_read_from_every_spelling():
    class Old:
        rope_theta, rope_scaling = 77.0, {"type": "linear", "factor": 2.0}

    class Nested:
        rope_parameters = {
            "full_attention": {"rope_theta": 1.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 5.0, "rope_type": "default"},
        }

    assert rope_parameters(Old) == {"type": "linear", "factor": 2.0, "rope_type": "linear", "rope_theta": 77.0}
    assert rope_parameters(Nested)["rope_theta"] == 5.0


def test_unknown_rope_type_is_named():
    config = LlamaConfig(**SHAPE)
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1.0}
    with pytest.raises(ValueError, match=r"'spiral'.*'yarn'"):
        Rope(config).at(torch.tensor([0]), torch.float32)


def test_tables_grow_and_agree():
    rope = Rope(LlamaConfig(**SHAPE))
    short = rope.tables(4, torch.device("cpu"), torch.float32)
    long = rope.tables(5000, torch.device("cpu"), torch.float32)
    assert torch.equal(short.cos, long.cos[: len(short.cos)]) and len(long.cos) >= 5000
