"""Checks of a whole SpeculativeConfig, after inference, in the contract's order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speculators.decoding.config.draft import lookup
from speculators.decoding.config.methods import METHODS_THAT_NEED_AUX_STATES, TARGETS_WITH_AUX_STATES
from speculators.decoding.config.qwen3_omni import check_qwen3_omni_dspark, is_qwen3_omni
from speculators.decoding.config.schedule import check_batch_size_ranges, synthetic_rates
from speculators.decoding.trees.token_tree import TokenTree
from speculators.verifier.config import text_config

if TYPE_CHECKING:
    from speculators.decoding.config.speculative import SpeculativeConfig


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
        ours, theirs = config.target_model_config.get_vocab_size(), config.draft_model_config.get_vocab_size()
        if ours != theirs and None not in (ours, theirs):
            raise ValueError(
                f"Target and draft model should have the same vocabulary size. Target model vocab_size={ours}. Draft "
                f"model vocab_size={theirs}. Using models with different tokenizers can cause out-of-bounds errors "
                f"during speculative decoding. With another tokenizer set use_heterogeneous_vocab."
            )


def _check_our_rules(config: SpeculativeConfig, num_tokens: int) -> None:
    """What vLLM leaves to the scheduler, or to chance."""
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
