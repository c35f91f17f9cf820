"""Our layers against transformers' layers with the same weights, and fused against unfused."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from speculators.nn.attention import dense_attention, layer_window
from speculators.nn.decoder import DecoderLayer, FusionDecoderLayer
from speculators.nn.norms import RMSNorm, RMSNormPlusOne
from speculators.nn.rope import Rope

SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "attn_implementation": "eager",
}
CASES = {
    "llama": (LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True), LlamaDecoderLayer),
    "qwen3": (Qwen3Config(**SHAPE), Qwen3DecoderLayer),
}


class Causal:
    def __call__(self, query, key, value):
        return dense_attention(query, key, value, torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril())

    def select_queries(self, hidden):
        return hidden


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


@pytest.mark.parametrize("family", CASES)
def test_layer_equals_transformers(family):
    config, theirs_class = CASES[family]
    theirs = randomise(theirs_class(config, 0).eval())
    ours = DecoderLayer(config)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 9, 32)
    positions = torch.arange(9)[None]
    mask = torch.zeros(9, 9).masked_fill_(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))[None, None]
    embeddings = LlamaRotaryEmbedding(config)(hidden, positions)
    expected = theirs(hidden, attention_mask=mask, position_embeddings=embeddings)
    expected = expected[0] if isinstance(expected, tuple) else expected
    rope = Rope(config).at(positions, torch.float32)
    torch.testing.assert_close(ours(hidden, rope, Causal()), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.fused()(hidden, rope, Causal()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_before_residual", [True, False])
def test_first_layer_of_eagle_fused_equals_unfused(norm_before_residual):
    config, _ = CASES["qwen3"]
    layer = randomise(FusionDecoderLayer(config, 0, norm_before_residual))
    assert layer.self_attn.q_proj.in_features == 64
    hidden, embeds = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    rope = Rope(config).at(torch.arange(5), torch.float32)
    expected = layer(hidden, rope, Causal(), embeds)
    torch.testing.assert_close(layer.fused()(hidden, rope, Causal(), embeds), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_equal_transformers_and_keep_the_dtype(dtype):
    x = torch.randn(3, 16, dtype=dtype)
    for ours, theirs in (
        (RMSNorm(16, 1e-5), LlamaRMSNorm(16, 1e-5)),
        (RMSNormPlusOne(16, 1e-5), Gemma2RMSNorm(16, 1e-5)),
    ):
        randomise(ours)
        theirs.weight.data.copy_(ours.weight.data)
        out = ours(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out, theirs(x).to(dtype), atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0.01)


def test_unknown_families_and_activations_are_named():
    config = LlamaConfig(**SHAPE)
    config.model_type = "mamba"
    with pytest.raises(ValueError, match=r"'mamba'.*\['llama', 'qwen3'\]"):
        DecoderLayer(config)
    with pytest.raises(ValueError, match="'snake'"):
        DecoderLayer(LlamaConfig(**SHAPE, hidden_act="snake"))


def test_window_of_a_layer_follows_its_type():
    config = Qwen3Config(**{**SHAPE, "num_hidden_layers": 2})
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 7
    assert [layer_window(config, i) for i in range(2)] == [7, None]
    config.layer_types = None
    assert layer_window(config, 0) is None
