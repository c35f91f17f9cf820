"""The drafter's shape: what comes from the verifier, what from the keys, what from a file."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, Qwen3Config

from speculators.train.draft_shape import draft_config
from speculators.train.keys import DraftKeys


def keys(**given) -> DraftKeys:
    return DraftKeys.model_validate(given)


VERIFIER = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
)


def test_it_copies_what_must_fit_and_chooses_the_rest():
    shape = draft_config(VERIFIER, keys(num_layers=2, draft_arch="llama"))
    assert (shape.model_type, shape.num_hidden_layers) == ("llama", 2)
    assert (shape.vocab_size, shape.hidden_size, shape.intermediate_size) == (100, 64, 96)
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim) == (4, 2, 16)
    assert shape.rope_parameters["rope_theta"] == 5e5
    assert (shape.rms_norm_eps, shape.max_position_embeddings) == (1e-5, 512)
    assert shape.tie_word_embeddings is False


def test_every_layer_slides_unless_said_otherwise():
    assert draft_config(VERIFIER, keys(num_layers=2)).layer_types == ["sliding_attention"] * 2
    shape = draft_config(VERIFIER, keys(num_layers=2, full_attention_indices=[1], sliding_window=33))
    assert shape.layer_types == ["sliding_attention", "full_attention"] and shape.sliding_window == 33
    assert draft_config(VERIFIER, keys(full_attention_indices=[0])).layer_types == ["full_attention"]
    with pytest.raises(ValueError, match=r"--full-attention-indices 2: the drafter has 2 layers, 0\.\.1"):
        draft_config(VERIFIER, keys(num_layers=2, full_attention_indices=[2]))


def test_a_drafter_nearly_as_deep_as_its_verifier_is_warned_about(caplog):
    for num_layers in (1, 2):
        draft_config(VERIFIER, keys(num_layers=num_layers))
    assert not caplog.records
    draft_config(VERIFIER, keys(num_layers=5))
    assert "5 layers beside the verifier's 8" in caplog.text and "--num-layers 1 is faster" in caplog.text


def test_head_size_is_the_verifiers_own_not_hidden_over_heads():
    verifier = Qwen3Config(vocab_size=100, hidden_size=64, head_dim=32, num_attention_heads=4, num_key_value_heads=2)
    assert draft_config(verifier, keys()).head_dim == 32


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_experts_have_no_dense_width(key, caplog):
    verifier = Qwen3Config(vocab_size=100, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    setattr(verifier, key, 8)
    assert draft_config(verifier, keys()).intermediate_size == 192
    assert "intermediate_size=192" in caplog.text


def test_heads_that_do_not_divide_are_refused():
    verifier = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    verifier.num_key_value_heads = 3
    with pytest.raises(ValueError, match=r"4 attention heads over 3 .*--draft-config"):
        draft_config(verifier, keys())


def test_rope_keeps_only_what_a_plain_decoder_reads():
    verifier = Qwen3Config(vocab_size=100, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    verifier.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "type": "x", "partial_rotary_factor": 0.25}
    rope = draft_config(verifier, keys()).rope_parameters
    assert rope["rope_theta"] == 1e6 and "type" not in rope and rope.get("partial_rotary_factor", 1.0) == 1.0
    verifier.rope_parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert draft_config(verifier, keys()).rope_parameters["rope_theta"] == 1e4


def test_a_file_gives_the_shape_of_a_decoder_or_of_a_whole_speculator(tmp_path):
    decoder = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 7}
    path = tmp_path / "config.json"
    for values in (decoder, {"speculators_model_type": "eagle3", "transformer_layer_config": decoder}):
        path.write_text(json.dumps(values))
        with pytest.warns(UserWarning, match="vocab_size=7 replaced by the verifier's 100"):
            shape = draft_config(VERIFIER, keys(draft_config=str(tmp_path)))
        assert (shape.model_type, shape.num_hidden_layers, shape.vocab_size) == ("qwen3", 3, 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("{}", "has no model_type"), ('{"model_type": "llama"}', "hidden_size=None")],
)
def test_a_file_that_does_not_do_is_refused(tmp_path, text, message):
    (tmp_path / "draft.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        draft_config(VERIFIER, keys(draft_config=str(tmp_path / "draft.json")))
