"""DSpark on a Qwen3-Omni target: what the draft's config must say, since its states come from the thinker."""

from __future__ import annotations

import itertools
from typing import Any

from speculators.decoding.config.draft import architectures_of, lookup
from speculators.verifier.config import text_config

DRAFT_ARCHITECTURE = "Qwen3OmniDSparkModel"
TARGET_ARCHITECTURES = frozenset(
    {"Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"}
)
"""Beside the model type `qwen3_omni_moe`."""
SECTIONS = ("dflash_config.", "eagle_config.", "")
"""Where a draft's config says a thing: the first that does counts."""


def is_qwen3_omni(hf_config: Any) -> bool:
    is_named = lookup(hf_config, "model_type") == "qwen3_omni_moe"
    return is_named or bool(TARGET_ARCHITECTURES & set(architectures_of(hf_config)))


def check_qwen3_omni_dspark(target: Any, draft: Any, num_tokens: int) -> None:
    """Both are Hugging Face configs. The first thing that is wrong is an error."""
    text = text_config(target)
    if text is target:
        raise ValueError("Qwen3-Omni DSpark: the target has no thinker_config.text_config to compare the draft with")
    for is_right, problem in requirements(text, draft, num_tokens):
        if not is_right:
            raise ValueError(f"Qwen3-Omni DSpark: the draft's config {problem}")


def requirements(text: Any, draft: Any, num_tokens: int) -> list[tuple[bool, str]]:
    architectures, block_size = architectures_of(draft), said(draft, "block_size", "dspark_block_size")
    hidden_size, target_hidden_size = lookup(draft, "hidden_size"), lookup(draft, "target_hidden_size")
    width, layers, vocab_size = (lookup(text, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    layer_ids = lookup(draft, "dflash_config.target_layer_ids") or lookup(draft, "dspark_target_layer_ids")
    layer_ids = list(layer_ids or lookup(draft, "target_layer_ids") or [])
    are_ids = bool(layer_ids) and all(i == 0 or is_count(i) for i in layer_ids) and layer_ids[-1] < (layers or 0)
    rank, head = lookup(draft, "markov_rank"), lookup(draft, "markov_head_type")
    own_vocab, draft_vocab = lookup(draft, "vocab_size"), lookup(draft, "draft_vocab_size")
    mask_id = said(draft, "mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")
    rope = lookup(draft, "rope_parameters") or lookup(draft, "rope_scaling") or {}
    return [
        (DRAFT_ARCHITECTURE in architectures, f"has {architectures=}; convert it to {DRAFT_ARCHITECTURE!r}"),
        (is_count(block_size), f"has {block_size=}; it must be a positive integer"),
        (block_size == num_tokens, f"has {block_size=} but num_speculative_tokens={num_tokens}; they must be equal"),
        (target_hidden_size == width, f"has {target_hidden_size=}; the target's text hidden_size is {width}"),
        (hidden_size == width, f"has {hidden_size=}; the target's text hidden_size is {width}"),
        *(
            (is_count(theirs) and ours == theirs, f"has {name}={ours}; the target's text model has {theirs}")
            for name, ours, theirs in zip(ATTENTION, attention(draft), attention(text), strict=True)
        ),
        (
            are_ids and all(a < b for a, b in itertools.pairwise(layer_ids)),
            f"has target_layer_ids={layer_ids}; it must list increasing layers in [0, {(layers or 0) - 1}]",
        ),
        (said(draft, "use_aux_hidden_state") is True, "must have use_aux_hidden_state=true"),
        (is_count(rank), f"has markov_rank={rank}; it must be a positive integer"),
        (head == "vanilla", f"has markov_head_type={head!r}; only 'vanilla' is served"),
        (
            lookup(draft, "sample_from_anchor", True) is True and not lookup(draft, "dspark_bonus_anchor", False),
            "must have sample_from_anchor=true and dspark_bonus_anchor=false",
        ),
        (is_count(own_vocab), f"has vocab_size={own_vocab}; it must be a positive integer"),
        (
            draft_vocab is None or (is_count(draft_vocab) and draft_vocab <= (vocab_size or 0)),
            f"has draft_vocab_size={draft_vocab}; the target has {vocab_size} tokens",
        ),
        (
            mask_id is not None and 0 <= mask_id < (own_vocab or 0),
            f"has mask token {mask_id}, outside its own vocabulary of {own_vocab}",
        ),
        ("mrope_section" not in rope, "asks for mrope; the draft sees text positions only"),
    ]


ATTENTION = ("num_attention_heads", "num_key_value_heads", "head_dim")


def attention(config: Any) -> tuple[Any, Any, Any]:
    num_heads, width = lookup(config, "num_attention_heads"), lookup(config, "hidden_size")
    head_dim = lookup(config, "head_dim") or (width // num_heads if width and num_heads else None)
    return num_heads, lookup(config, "num_key_value_heads", num_heads), head_dim


def said(draft: Any, *names: str) -> Any:
    found = (lookup(draft, section + name) for name in names for section in SECTIONS)
    return next((value for value in found if value is not None), None)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
