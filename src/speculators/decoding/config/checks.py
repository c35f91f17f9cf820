"""Checks of a whole SpeculativeConfig, after inference, in the contract's order. Below them the checks of its lists
(draft lengths by batch size, synthetic rates) and of DSpark on a Qwen3-Omni target."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators.decoding.config.draft import TARGETS_WITH_AUX_STATES, architectures_of, lookup
from speculators.decoding.config.methods import METHODS_THAT_NEED_AUX_STATES
from speculators.decoding.trees.token_tree import TokenTree
from speculators.verifier.config import text_config
from speculators.verifier.loading import tokenizer_facts

if TYPE_CHECKING:
    from speculators.decoding.config.speculative import SpeculativeConfig

BatchSizeRange = tuple[int, int, int]
"""(first batch size, last batch size, K), both inclusive."""

DRAFT_ARCHITECTURE = "Qwen3OmniDSparkModel"
TARGET_ARCHITECTURES = frozenset(
    {"Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"}
)
"""Beside the model type `qwen3_omni_moe`."""
SECTIONS = ("dflash_config.", "eagle_config.", "")
"""Where a draft's config may hold a setting: the first that has it counts."""
ATTENTION = ("num_attention_heads", "num_key_value_heads", "head_dim")
"""Sizes that the draft shares with the target."""


def check(config: SpeculativeConfig) -> None:
    if config.tensor_parallel_size is not None:
        raise ValueError(
            "'tensor_parallel_size' is not a valid argument in the speculative_config. Please pass "
            "'draft_tensor_parallel_size' instead."
        )
    if config.num_speculative_tokens is None:
        raise ValueError(
            "num_speculative_tokens must be provided with speculative model unless the draft model config contains an "
            "n_predict parameter."
        )
    if config.num_speculative_tokens <= 0:
        raise ValueError(f"Expected num_speculative_tokens to be greater than zero ({config.num_speculative_tokens}).")
    _resolve_synthetic(config, config.num_speculative_tokens)
    if config.draft_model_config is not None and config.draft_parallel_config is not None:
        verify = getattr(config.draft_model_config, "verify_with_parallel_config", None)
        if verify is not None:
            verify(config.draft_parallel_config)
    _check_target_gives_aux_states(config)
    target, draft = lookup(config.target_model_config, "hf_config"), lookup(config.draft_model_config, "hf_config")
    if config.method == "dspark" and draft is not None and is_qwen3_omni(target):
        check_qwen3_omni_dspark(target, draft, config.num_speculative_tokens)
    _check_vocabularies(config)
    _check_our_rules(config, config.num_speculative_tokens)


def _resolve_synthetic(config: SpeculativeConfig, num_tokens: int) -> None:
    rates, length = config.synthetic_acceptance_rates, config.synthetic_acceptance_length
    if config.rejection_sample_method == "synthetic":
        config.synthetic_acceptance_rates = synthetic_rates(num_tokens, rates, length)
        config.synthetic_acceptance_length = None
    elif rates is not None or length is not None:
        raise ValueError(
            "synthetic_acceptance_rates / synthetic_acceptance_length are only valid with "
            "rejection_sample_method='synthetic'."
        )


def _check_target_gives_aux_states(config: SpeculativeConfig) -> None:
    """Serving engines return intermediate states for some model types only; our own engine for all."""
    target = config.target_model_config
    if config.method not in METHODS_THAT_NEED_AUX_STATES or target is None or lookup(target, "gives_aux_states", False):
        return
    target_type = lookup(text_config(target.hf_config), "model_type", "")
    if not any(part in target_type for part in TARGETS_WITH_AUX_STATES):
        raise ValueError(
            f"{config.method} is only supported for {list(TARGETS_WITH_AUX_STATES)} models. Got {target_type=}"
        )


def _check_vocabularies(config: SpeculativeConfig) -> None:
    if config.use_heterogeneous_vocab:
        if not config.uses_draft_model():
            raise ValueError("use_heterogeneous_vocab only works with method='draft_model'")
        if config.draws_drafts:
            raise ValueError(
                "use_heterogeneous_vocab currently only supports greedy draft sampling. Set "
                "draft_sample_method='greedy' (the default) or omit it."
            )
        return
    if config.uses_draft_model() and config.target_model_config and config.draft_model_config:
        refuse_other_vocabulary(config.target_model_config, config.draft_model_config)


def refuse_other_vocabulary(target: Any, draft: Any) -> None:
    """Raises `ValueError` for tables of different sizes, and says whether the tokenizers differ too."""
    ours, theirs = target.get_vocab_size(), draft.get_vocab_size()
    if ours == theirs or None in (ours, theirs):
        return
    names = [lookup(model, "model", "") for model in (target, draft)]
    tokenizers = [tokenizer_facts(name) if Path(name, "config.json").is_file() else None for name in names]
    if None not in tokenizers and tokenizers[0] == tokenizers[1]:
        reason = (
            "The tokenizer is the same, the tables are padded to different numbers of rows: set "
            "use_heterogeneous_vocab, which drafts the tokens that both have."
        )
    else:
        reason = (
            "Using models with different tokenizers can cause out-of-bounds errors during speculative decoding. With "
            "another tokenizer set use_heterogeneous_vocab."
        )
    raise ValueError(
        f"Target and draft model should have the same vocabulary size. Target model vocab_size={ours}. Draft model "
        f"vocab_size={theirs}. {reason}"
    )


def _check_our_rules(config: SpeculativeConfig, num_tokens: int) -> None:
    """Rules that vLLM checks elsewhere or not at all."""
    if config.enable_adaptive_verification and config.use_local_argmax_reduction and config.method != "dspark":
        raise ValueError(
            "Adaptive verification estimates per-position acceptance from the draft logits, which "
            "use_local_argmax_reduction never materializes. Disable one of them."
        )
    if config.num_speculative_tokens_per_batch_size is not None:
        check_batch_size_ranges(config.num_speculative_tokens_per_batch_size)
    if config.dspark_draft_topk is not None and config.method != "dspark":
        raise ValueError(f"dspark_draft_topk is only supported with method='dspark', not {config.method!r}")
    draft = lookup(config.draft_model_config, "hf_config")
    draft_vocab_size = lookup(draft, "draft_vocab_size") or lookup(draft, "vocab_size")
    if draft_vocab_size is not None and (config.dspark_draft_topk or 1) > draft_vocab_size:
        raise ValueError(f"dspark_draft_topk must be between 1 and the draft vocabulary size ({draft_vocab_size})")
    if config.is_lenient and "rejection_sample_method" in config.given:
        raise ValueError(
            f"verifier_accept_k and accept_tolerance accept drafts by a rule of their own, not by "
            f"rejection_sample_method={config.rejection_sample_method!r}; drop one or the other"
        )
    _check_trees(config, num_tokens)


def _check_trees(config: SpeculativeConfig, num_tokens: int) -> None:
    rule = config.rejection_sample_method
    if config.dynamic_tree is not None:
        if "speculative_token_tree" in config.given:
            raise ValueError("speculative_token_tree and dynamic_tree are both given; drop one of them")
        if rule in ("block", "synthetic"):
            raise ValueError(
                f"rejection_sample_method={rule!r} verifies chains only; drop dynamic_tree or use 'standard'"
            )
        if config.draws_drafts:
            raise ValueError(
                "dynamic_tree keeps the draft's likeliest tokens and cannot draw them (drawn tokens that are chosen by "
                "their own probability would change the output); drop draft_sample_method='probabilistic'"
            )
    if config.speculative_token_tree is not None:
        tree = TokenTree.parse(config.speculative_token_tree)
        if tree.depth > num_tokens:
            raise ValueError(
                f"speculative_token_tree is {tree.depth} tokens deep but num_speculative_tokens={num_tokens}; raise "
                f"it or cut the tree"
            )
        if rule in ("block", "synthetic") and not tree.is_chain:
            raise ValueError(
                f"rejection_sample_method={rule!r} verifies chains only; drop speculative_token_tree or use 'standard'"
            )


# -- lists


def check_batch_size_ranges(ranges: list[BatchSizeRange]) -> None:
    name = "num_speculative_tokens_per_batch_size"
    if not ranges:
        raise ValueError(f"{name} must not be empty; leave it out for a fixed number of tokens")
    ordered = sorted(ranges)
    for first, last, num_tokens in ordered:
        if first < 1 or last < first:
            raise ValueError(f"{name} range ({first}, {last}) must satisfy 1 <= start <= end")
        if num_tokens < 0:
            raise ValueError(f"{name} range ({first}, {last}) has K={num_tokens}; K must be >= 0")
    if ordered[0][0] != 1:
        raise ValueError(f"{name} must start at batch size 1, not {ordered[0][0]}")
    for before, after in itertools.pairwise(ordered):
        if after[0] <= before[1]:
            raise ValueError(f"{name} ranges {before[:2]} and {after[:2]} overlap")


def scheduled_num_tokens(ranges: list[BatchSizeRange], batch_size: int, most: int) -> int:
    """K of the last range that starts at or before the batch size (gaps carry the previous K), at most `most`."""
    started = [num_tokens for first, _, num_tokens in sorted(ranges) if first <= batch_size]
    return min(started[-1], most) if started else most


def synthetic_rates(num_tokens: int, rates: list[float] | None, length: float | None) -> list[float]:
    """Unconditional rates per position, from rates or a mean acceptance length."""
    if (rates is None) == (length is None):
        raise ValueError(
            "rejection_sample_method='synthetic' requires exactly one of synthetic_acceptance_rates or "
            "synthetic_acceptance_length."
        )
    if rates is None:
        assert length is not None
        if not 1 <= length <= num_tokens + 1:
            raise ValueError(f"synthetic_acceptance_length must be in [1, {num_tokens + 1}], got {length}.")
        return rates_of_length(length, num_tokens)
    if len(rates) != num_tokens:
        raise ValueError(f"synthetic_acceptance_rates must have length {num_tokens}, got {rates}.")
    if not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"synthetic_acceptance_rates entries must be in [0, 1], got {rates}.")
    if any(after > before for before, after in itertools.pairwise(rates)):
        raise ValueError(f"synthetic_acceptance_rates must be non-increasing, got {rates}.")
    return list(rates)


def rates_of_length(length: float, num_tokens: int) -> list[float]:
    """Least variance: whole positions always, one in part, the rest never. 1 + sum(rates) == length."""
    num_drafts = length - 1
    return [min(1.0, max(0.0, num_drafts - position)) for position in range(num_tokens)]


# -- DSpark on a Qwen3-Omni target: the draft reads the states of the thinker


def is_qwen3_omni(hf_config: Any) -> bool:
    is_named = lookup(hf_config, "model_type") == "qwen3_omni_moe"
    return is_named or bool(TARGET_ARCHITECTURES & set(architectures_of(hf_config)))


def check_qwen3_omni_dspark(target: Any, draft: Any, num_tokens: int) -> None:
    """Raise ValueError for the first requirement that the draft misses. Both are Hugging Face configs."""
    text = text_config(target)
    if text is target:
        raise ValueError("Qwen3-Omni DSpark: the target has no thinker_config.text_config to compare the draft with")
    for is_right, problem in requirements(text, draft, num_tokens):
        if not is_right:
            raise ValueError(f"Qwen3-Omni DSpark: the draft's config {problem}")


def requirements(text: Any, draft: Any, num_tokens: int) -> list[tuple[bool, str]]:
    architectures, block_size = architectures_of(draft), setting(draft, "block_size", "dspark_block_size")
    hidden_size, target_hidden_size = lookup(draft, "hidden_size"), lookup(draft, "target_hidden_size")
    width, layers, vocab_size = (lookup(text, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    layer_ids = lookup(draft, "dflash_config.target_layer_ids") or lookup(draft, "dspark_target_layer_ids")
    layer_ids = list(layer_ids or lookup(draft, "target_layer_ids") or [])
    are_ids = bool(layer_ids) and all(i == 0 or is_count(i) for i in layer_ids) and layer_ids[-1] < (layers or 0)
    rank, head = lookup(draft, "markov_rank"), lookup(draft, "markov_head_type")
    own_vocab, draft_vocab = lookup(draft, "vocab_size"), lookup(draft, "draft_vocab_size")
    mask_id = setting(draft, "mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")
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
        (setting(draft, "use_aux_hidden_state") is True, "must have use_aux_hidden_state=true"),
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


def attention(config: Any) -> tuple[Any, Any, Any]:
    num_heads, width = lookup(config, "num_attention_heads"), lookup(config, "hidden_size")
    head_dim = lookup(config, "head_dim") or (width // num_heads if width and num_heads else None)
    return num_heads, lookup(config, "num_key_value_heads", num_heads), head_dim


def setting(draft: Any, *names: str) -> Any:
    found = (lookup(draft, section + name) for name in names for section in SECTIONS)
    return next((value for value in found if value is not None), None)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
