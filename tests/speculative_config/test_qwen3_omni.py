"""DSpark for a Qwen3-Omni target: a config that fits passes, each thing that is wrong is named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from speculators.decoding.config import ModelInfo, SpeculativeConfig

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
DRAFT = {
    "architectures": ["Qwen3OmniDSparkModel"],
    "model_type": "qwen3",
    "block_size": 4,
    "hidden_size": 64,
    "target_hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "target_layer_ids": [1, 3, 6],
    "use_aux_hidden_state": True,
    "markov_rank": 8,
    "markov_head_type": "vanilla",
    "sample_from_anchor": True,
    "vocab_size": 101,
    "draft_vocab_size": 50,
    "dflash_config": {"mask_token_id": 100},
}


def resolved(tmp_path, num_tokens=4, **changes):
    (tmp_path / "config.json").write_text(json.dumps({**DRAFT, **changes}))
    target = SimpleNamespace(
        architectures=["Qwen3OmniMoeForConditionalGeneration"],
        model_type="qwen3_omni_moe",
        thinker_config=SimpleNamespace(text_config=SimpleNamespace(**TEXT)),
    )
    return SpeculativeConfig(
        method="dspark",
        model=str(tmp_path),
        num_speculative_tokens=num_tokens,
        target_model_config=ModelInfo("omni", target),
    )


def test_a_draft_that_fits_is_taken(tmp_path):
    assert resolved(tmp_path).num_speculative_tokens == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3DSparkModel"]}, "convert it to 'Qwen3OmniDSparkModel'"),
        ({"block_size": 0}, "block_size=0; it must be a positive integer"),
        ({"num_tokens": 3}, "block_size=4 but num_speculative_tokens=3"),
        ({"target_hidden_size": 32}, "target_hidden_size=32; the target's text hidden_size is 64"),
        ({"hidden_size": 32}, "hidden_size=32; the target's text hidden_size is 64"),
        ({"num_attention_heads": 8}, "num_attention_heads=8; the target's text model has 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"head_dim": 32}, "head_dim=32"),
        ({"target_layer_ids": []}, r"target_layer_ids=\[\]; it must list increasing layers in \[0, 7\]"),
        ({"target_layer_ids": [3, 3]}, "must list increasing layers"),
        ({"target_layer_ids": [3, 8]}, "must list increasing layers"),
        ({"use_aux_hidden_state": False}, "use_aux_hidden_state=true"),
        ({"markov_rank": 0}, "markov_rank=0"),
        ({"markov_head_type": "gated"}, "markov_head_type='gated'"),
        ({"sample_from_anchor": False}, "sample_from_anchor=true"),
        ({"dspark_bonus_anchor": True}, "dspark_bonus_anchor=false"),
        ({"draft_vocab_size": 200}, "draft_vocab_size=200; the target has 100 tokens"),
        ({"dflash_config": {"mask_token_id": 101}}, "mask token 101, outside its own vocabulary of 101"),
        ({"rope_scaling": {"mrope_section": [8, 4, 4], "rope_type": "default"}}, "mrope"),
    ],
)
def test_what_is_wrong_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"Qwen3-Omni DSpark.*{message}"):
        resolved(tmp_path, **changes)


def test_attention_backends_are_known_names():
    base = {"method": "ngram", "num_speculative_tokens": 2}
    assert SpeculativeConfig(**base, attention_backend="flash_attn").attention_backend == "FLASH_ATTN"
    assert SpeculativeConfig(**base, attention_backend="Auto").attention_backend is None
    with pytest.raises(ValueError, match="attention_backend='FLASH' is unknown; use auto or one of FLASH_ATTN, "):
        SpeculativeConfig(**base, attention_backend="FLASH")
