"""Settings that only a serving engine honours: the rules among them, and what one release of vLLM takes of a
`SpeculativeConfig`. Which release has which method, setting and value is data: `checkpoint/engine_profiles/`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from speculators.checkpoint.engine_profile import VLLM, EngineProfile, profile_named, releases
from speculators.decoding.config.draft import lookup
from speculators.decoding.config.methods import ATTENTION_BACKENDS, METHODS
from speculators.decoding.trees.token_tree import TokenTree

if TYPE_CHECKING:
    from speculators.decoding.config.speculative import SpeculativeConfig

K_BY_BATCH_SIZE = (
    "num_speculative_tokens_per_batch_size=[[1, 8, 3], [9, 4096, 0]] drafts 3 tokens for up to 8 requests and none "
    "above"
)
OTHER_TEXT = "typical acceptance changed the output: leave it out"
OTHER_RULE = "say rejection_sample_method ('standard'; typical acceptance changed the output)"
ONE_PASS = "drafts are always scored in one pass: leave it out"
OWN_LOGPROBS = "a request's own logprobs say what is returned: leave it out"
RETIRED_SETTINGS = {
    "speculative_model": "say model",
    "speculative_method": "say method",
    "speculative_max_model_len": "say max_model_len",
    "speculative_draft_tensor_parallel_size": "say draft_tensor_parallel_size",
    "speculative_model_quantization": "say quantization",
    "speculative_model_revision": "say revision",
    "speculative_disable_by_batch_size": K_BY_BATCH_SIZE,
    "speculative_disable_mqa_scorer": ONE_PASS,
    "ngram_prompt_lookup_max": "say prompt_lookup_max",
    "ngram_prompt_lookup_min": "say prompt_lookup_min",
    "spec_decoding_acceptance_method": OTHER_RULE,
    "typical_acceptance_sampler_posterior_threshold": OTHER_TEXT,
    "typical_acceptance_sampler_posterior_alpha": OTHER_TEXT,
    "disable_logprobs_during_spec_decoding": OWN_LOGPROBS,
    "disable_by_batch_size": K_BY_BATCH_SIZE,
    "acceptance_method": OTHER_RULE,
    "posterior_threshold": OTHER_TEXT,
    "posterior_alpha": OTHER_TEXT,
    "disable_mqa_scorer": ONE_PASS,
    "disable_logprobs": OWN_LOGPROBS,
}
"""Keys of earlier vLLM releases (0.9 and before), and that one's flags -> what to use instead."""
OURS_ALONE = {
    "early_exit_layer": "early exit is a drafter of this library",
    "dynamic_tree": "vLLM drafts chains only",
    "verifier_accept_k": "vLLM has no lenient verification",
    "accept_tolerance": "vLLM has no lenient verification",
}
RULES_IN_VLLM = {
    # our name: vLLM's settings
    "strict": {},
    "standard": {"rejection_sample_method": "standard"},
    "probabilistic": {"rejection_sample_method": "standard", "draft_sample_method": "probabilistic"},
    "block": {"rejection_sample_method": "block"},
    "fly": {"rejection_sample_method": "fly"},
    "synthetic": {"rejection_sample_method": "synthetic"},
}
ENGINE_FIELDS = ("target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config")
QUANTIZED_HEAD_METHODS = ("eagle", "eagle3", "mtp")
HAS_XPRESS = frozenset({"Qwen3XPressModel", "DFlashQwen3XPressModel"})
"""Architectures of drafts with the refiner that `xpress_topc` is about."""


def attention_backend(value: Any) -> Any:
    """Returns the name as vLLM writes it, None for "auto". Raises `ValueError` for an unknown one."""
    if not isinstance(value, str) or value.lower() == "auto":
        return value if not isinstance(value, str) else None
    if value.upper() not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend={value!r} is unknown; use auto or one of {', '.join(ATTENTION_BACKENDS)}")
    return value.upper()


def check_engine_settings(config: SpeculativeConfig) -> None:
    """The rules of vLLM 0.33's own settings, in its words (config/speculative.py, `_verify_args`)."""
    tokens = config.num_speculative_tokens
    if config.draft_lm_head_quantization is not None and (
        config.method not in QUANTIZED_HEAD_METHODS or config.use_gemma4_mtp()
    ):
        raise ValueError(f"draft_lm_head_quantization is not supported for method {config.method!r}.")
    if config.rejection_sample_method == "fly" and tokens is not None:
        if config.uses_extract_hidden_states():
            raise ValueError(
                "FLy is not compatible with method='extract_hidden_states', which does not perform speculative "
                "decoding."
            )
        if tokens < 2:
            raise ValueError("FLy requires num_speculative_tokens to be at least 2.")
        if config.fly_window_size is not None and config.fly_window_size >= tokens:
            raise ValueError("FLy requires fly_window_size to be smaller than num_speculative_tokens.")
    if config.xpress_topc is not None and not config.is_xpress():
        raise ValueError("xpress_topc is only supported by XPress")


def parse_settings(text: str) -> dict[str, Any]:
    """Reads the value of `--speculative-config`. Raises `ValueError` for anything but a JSON object."""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the speculative config {text[:200]!r} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f'the speculative config {text!r} must be a JSON object such as {{"method": "ngram"}}')
    return settings


def computation_hash(config: SpeculativeConfig) -> str:
    """Hashes what changes the verifier's computation graph (vLLM's `SpeculativeConfig.compute_hash`)."""
    reads_aux = config.method is not None and METHODS[config.method].reads_aux_states
    factors: list[Any] = [reads_aux]
    layer_ids = lookup(config.draft_model_config, "hf_config.eagle_aux_hidden_state_layer_ids")
    if reads_aux and layer_ids is not None:
        factors.append(tuple(layer_ids))
    if config.use_dspark():
        factors.append(config.enable_adaptive_verification)
    if config.method == "mtp" and config.draft_model_config is not None:
        factors.append(lookup(config.draft_model_config, "hf_config.index_share_for_mtp_iteration", False))
    return hashlib.md5(str(factors).encode(), usedforsecurity=False).hexdigest()


def release(version: str | None) -> EngineProfile:
    """Returns the profile of "0.33" or "vllm-0.33"; None: of the newest release that our tests run."""
    if version is None:
        return [profile for profile in releases(VLLM) if profile.held_against == "process"][-1]
    return profile_named(version if version.startswith(f"{VLLM}-") else f"{VLLM}-{version}")


def vllm_settings(config: SpeculativeConfig, version: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings for that release of vLLM, settings it would not accept with the reason)."""
    profile, known = release(version), releases(VLLM)
    settings, unsupported = vllm_words(config)
    for name in [name for name in settings if name not in profile.settings]:
        del settings[name]
        others = [other for other in known if name in other.settings]
        unsupported[name] = f"{profile.title} has no such setting" + taken_by(others)
    for name, words in profile.choices.items():
        value = settings.get(name)
        if value is not None and value not in words:
            del settings[name]
            others = [other for other in known if value in other.choices.get(name, ())]
            unsupported[name] = f"{profile.title} takes {', '.join(words)}, not {value!r}" + taken_by(others)
    method = settings["method"]
    if method is not None and not profile.takes_method(method):
        del settings["method"]
        unsupported["method"] = why_not_served(method, profile)
    return settings, unsupported


def why_not_served(method: str, profile: EngineProfile) -> str:
    described = releases(VLLM)
    if not any(method in other.methods for other in described):
        return f"{method!r} is a drafter of this library"
    why = profile.refused_methods.get(method)
    others = taken_by([other for other in described if other.takes_method(method)])
    return f"{profile.title} does not serve {method!r}" + (f": {why}" if why else others)


def taken_by(others: Sequence[EngineProfile]) -> str:
    """Says which releases take what one does not, for its message."""
    return f"; {' and '.join(other.title for other in others)} takes it" if others else ""


def vllm_words(config: SpeculativeConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """(all settings in vLLM's words, those that no release of it has)."""
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
    tree = settings.pop("speculative_token_tree", None)
    if tree is not None and not TokenTree.parse(tree).is_chain:
        unsupported["speculative_token_tree"] = "vLLM drafts chains only"
    return settings, unsupported
