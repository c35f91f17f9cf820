"""Translates a SpeculativeConfig into vLLM 0.32's settings, and names the settings that vLLM does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from speculators.decoding.config.methods import METHODS
from speculators.decoding.trees.token_tree import TokenTree

if TYPE_CHECKING:
    from speculators.decoding.config.speculative import SpeculativeConfig

OURS_ALONE = {
    "early_exit_layer": "early exit is a drafter of this library",
    "dynamic_tree": "vLLM 0.32 drafts chains only",
    "verifier_accept_k": "vLLM has no lenient verification",
    "accept_tolerance": "vLLM has no lenient verification",
}
RULES_IN_VLLM = {
    # our name: vLLM's settings
    "strict": {},
    "standard": {"rejection_sample_method": "standard"},
    "probabilistic": {"rejection_sample_method": "standard", "draft_sample_method": "probabilistic"},
    "block": {"rejection_sample_method": "block"},
    "synthetic": {"rejection_sample_method": "synthetic"},
}
ENGINE_FIELDS = ("target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config")


def vllm_settings(config: SpeculativeConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings for vLLM, settings it would not accept with the reason)."""
    settings = {
        name: value
        for name, value in config.given.items()
        if name not in ENGINE_FIELDS or isinstance(value, dict)  # overrides of the draft's config are a user's
    }
    unsupported = {name: reason for name, reason in OURS_ALONE.items() if settings.pop(name, None) is not None}
    settings |= {"method": config.method, "num_speculative_tokens": config.num_speculative_tokens}
    if config.model is not None and config.model != config.method:
        settings["model"] = config.model
    elif config.method is not None and not METHODS[config.method].has_network:
        settings.pop("model", None)
    if config.parallel_drafting and config.method is not None and not METHODS[config.method].is_parallel:
        settings["parallel_drafting"] = True  # else the method implies it
    if "rejection_sample_method" in settings or config.rejection_sample_method != "strict":
        sampled_as = settings.pop("draft_sample_method", "greedy")
        settings.pop("rejection_sample_method", None)
        settings |= RULES_IN_VLLM[config.rejection_sample_method]
        if config.rejection_sample_method not in ("strict", "probabilistic") and sampled_as != "greedy":
            settings["draft_sample_method"] = sampled_as
    if config.method is not None and not METHODS[config.method].in_vllm:
        unsupported["method"] = f"{config.method!r} is a drafter of this library"
        del settings["method"]
    tree = settings.pop("speculative_token_tree", None)
    if tree is not None and not TokenTree.parse(tree).is_chain:
        unsupported["speculative_token_tree"] = "vLLM 0.32 drafts chains only"
    return settings, unsupported
