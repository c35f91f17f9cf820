"""Infers what a SpeculativeConfig leaves open: method, model, defaults, draft config. Order matters, as in vLLM."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from speculators.decoding.config.draft import (
    ModelInfo,
    architectures_of,
    draft_max_model_len,
    draft_parallel_config,
    draft_tensor_parallel_size,
    is_readable_here,
    lookup,
    name_as_served,
    read_hf_config,
    rename,
)
from speculators.decoding.config.methods import (
    LAYER_FOR_EACH_TOKEN,
    METHODS,
    METHODS_WITH_A_MODEL_TYPE,
    MTP_TYPE_NAMES,
    RENAMED_DRAFTS,
    SPECULATORS_METHODS,
    TARGETS_WITHOUT_MTP,
)
from speculators.decoding.config.mtp_families import hf_config_override
from speculators.decoding.trees.token_tree import TokenTree

if TYPE_CHECKING:
    from speculators.decoding.config.speculative import SpeculativeConfig

logger = logging.getLogger(__name__)

DEFAULT_LOOKUP = 5
"""n-gram window when none is given, smallest and largest (vLLM's)."""


def infer(config: SpeculativeConfig) -> None:
    """Fill in everything that follows from what was given."""
    is_explicit = config.method is not None
    _infer_depth_from_tree(config)
    _infer_method(config)
    if config.model is None and config.num_speculative_tokens is not None:
        _infer_model(config)
    _infer_rejection_rule(config)
    assert config.method is not None
    if config.method in ("ngram", "ngram_gpu"):
        _fill_in_ngram(config)
    elif config.method == "suffix":
        _fill_in_suffix(config)
    else:
        config.prompt_lookup_max = config.prompt_lookup_min = 0
        if config.method == "extract_hidden_states":
            _fill_in_extraction(config)
        elif METHODS[config.method].has_network and config.model is not None:
            _fill_in_network(config, is_explicit)
    if config.method in ("ngram", "ngram_gpu", "custom_class"):
        config.draft_model_config = config.target_model_config
        config.draft_parallel_config = config.target_parallel_config
    _apply_index_sharing(config)


def _infer_depth_from_tree(config: SpeculativeConfig) -> None:
    """Without a number of tokens, the depth of the tree gives it."""
    if config.num_speculative_tokens is not None:
        return
    if config.dynamic_tree is not None:
        config.num_speculative_tokens = config.dynamic_tree.max_depth
    elif config.speculative_token_tree is not None:
        config.num_speculative_tokens = TokenTree.parse(config.speculative_token_tree).depth


def _infer_method(config: SpeculativeConfig) -> None:
    if config.method is None and is_import_path(config.model):
        config.method = "custom_class"
    elif config.method is None:
        config.method = "ngram" if config.model in ("ngram", "[ngram]") else "draft_model"
    if config.method in MTP_TYPE_NAMES:
        logger.warning("method %r is deprecated: say 'mtp'", config.method)
        config.method = "mtp"


def is_import_path(model: str | None) -> bool:
    """Whether `model` is a dotted Python path such as `my_package.MyProposer`."""
    if model is None or "/" in model or is_readable_here(model):
        return False
    parts = model.split(".")
    return len(parts) >= 2 and all(part.isidentifier() for part in parts)


def _infer_model(config: SpeculativeConfig) -> None:
    assert config.method is not None
    facts, target = METHODS[config.method], config.target_model_config
    if facts.model_defaults_to_method:
        config.model = config.method
    elif facts.model_defaults_to_target:
        if target is None:
            raise ValueError(f"target_model_config must be present for {config.method}")
        if lookup(target.hf_config, "model_type") == "deepseek_v32":
            config.enforce_eager = True
        config.model = lookup(target, "model_weights") or target.model
        config.quantization = config.quantization or lookup(target, "quantization")
    elif config.method == "custom_class":
        raise ValueError(
            "method='custom_class' requires 'model' to contain the custom proposer module path "
            "(e.g., 'my_module.MyProposer')."
        )
    else:
        raise ValueError("num_speculative_tokens was provided but without speculative model.")


def _infer_rejection_rule(config: SpeculativeConfig) -> None:
    """Drawn drafts are verified by rejection sampling, unless the user chose another rule."""
    if "rejection_sample_method" not in config.given and config.draft_sample_method == "probabilistic":
        config.rejection_sample_method = "standard"


def _fill_in_ngram(config: SpeculativeConfig) -> None:
    low, high = config.prompt_lookup_min, config.prompt_lookup_max
    config.prompt_lookup_min = low or high or DEFAULT_LOOKUP
    config.prompt_lookup_max = high or low or DEFAULT_LOOKUP
    if config.prompt_lookup_min > config.prompt_lookup_max:
        raise ValueError(
            f"prompt_lookup_min={config.prompt_lookup_min} must be <= prompt_lookup_max={config.prompt_lookup_max}"
        )


def _fill_in_suffix(config: SpeculativeConfig) -> None:
    if config.num_speculative_tokens is None:
        config.num_speculative_tokens = config.suffix_decoding_max_tree_depth
        logger.warning("num_speculative_tokens=%d: the suffix tree's depth", config.num_speculative_tokens)
    for name, is_valid, rule in (
        ("suffix_decoding_max_tree_depth", config.suffix_decoding_max_tree_depth >= 1, ">= 1"),
        ("suffix_decoding_max_cached_requests", config.suffix_decoding_max_cached_requests >= 0, ">= 0"),
        ("suffix_decoding_max_spec_factor", config.suffix_decoding_max_spec_factor >= 0, ">= 0"),
        ("suffix_decoding_min_token_prob", 0 <= config.suffix_decoding_min_token_prob <= 1, "in [0, 1]"),
    ):
        if not is_valid:
            raise ValueError(f"{name}={getattr(config, name)} must be {rule}")


def _fill_in_extraction(config: SpeculativeConfig) -> None:
    """Extraction reads the target's states and drafts nothing. Its config is the target's with the user's overrides."""
    config.model = "extract_hidden_states"
    target, given = config.target_model_config, config.draft_model_config
    overrides: Any = lookup(given, "hf_config", {})
    overrides = overrides if isinstance(overrides, dict) else overrides.to_dict()
    if target is None:
        return
    draft = copy.copy(target)
    draft.hf_config = copy.deepcopy(target.hf_config)
    overlay = overrides | {"architectures": ["ExtractHiddenStatesModel"], "model_type": "extract_hidden_states"}
    for name, value in overlay.items():
        setattr(draft.hf_config, name, value)
    config.draft_model_config, config.draft_parallel_config = draft, config.target_parallel_config


def _fill_in_network(config: SpeculativeConfig, is_explicit: bool) -> None:
    """Read the draft's config if possible, recognise the method, and apply the draft's own settings."""
    hf_config = _draft_hf_config(config)
    speculators_type = lookup(hf_config, "speculators_model_type")
    if speculators_type is not None:
        _apply_speculators_checkpoint(config, hf_config, speculators_type, is_explicit)
    else:
        if hf_config is not None and config.method != "medusa" and architectures_of(hf_config):
            hf_config = hf_config_override(hf_config)
            rename(hf_config, RENAMED_DRAFTS)
        _detect_method(config, hf_config, is_explicit)
        name_as_served(hf_config, METHODS[str(config.method)].draft_prefix)
    assert config.method is not None
    if METHODS[config.method].is_parallel:
        config.parallel_drafting = True
    if hf_config is not None:
        _apply_n_predict(config, hf_config)
    _fill_in_tree(config)
    _make_draft_model_config(config, hf_config)


def _draft_hf_config(config: SpeculativeConfig) -> Any:
    target = config.target_model_config
    assert config.model is not None
    if target is not None and config.model in (target.model, lookup(target, "model_weights")):
        return copy.deepcopy(target.hf_config)
    if target is None and not is_readable_here(config.model):
        return None  # not downloaded yet: it is read once the verifier is known
    return read_hf_config(
        config.model, config.revision, config.code_revision, bool(lookup(target, "trust_remote_code", False))
    )


def _apply_speculators_checkpoint(
    config: SpeculativeConfig, hf_config: Any, speculators_type: str, is_explicit: bool
) -> None:
    means = SPECULATORS_METHODS.get(speculators_type)
    if means is None:
        logger.warning("speculators_model_type=%r has no name in vLLM; kept for local decoding", speculators_type)
        means = {"method": "draft_model"}
    elif is_explicit and config.method != means["method"]:
        raise ValueError(
            f"method={config.method!r} but {config.model} is a speculator of type {speculators_type!r}; leave the "
            f"method out or give {means['method']!r}"
        )
    for name, value in means.items():
        setattr(config, name, value)
    proposal: dict[str, Any] = next(iter(lookup(hf_config, "speculators_config.proposal_methods", [])), {})
    if config.num_speculative_tokens is None:
        config.num_speculative_tokens = lookup(proposal, "speculative_tokens")
    if lookup(proposal, "verifier_accept_k", 1) > 1 and lookup(proposal, "accept_tolerance", 0.0) > 0:
        logger.warning(
            "%s asks for verifier_accept_k=%s, accept_tolerance=%s, which changes the output; verifying losslessly. "
            "Give both in the speculative config to have them",
            config.model,
            lookup(proposal, "verifier_accept_k"),
            lookup(proposal, "accept_tolerance"),
        )


def _detect_method(config: SpeculativeConfig, hf_config: Any, is_explicit: bool) -> None:
    """First match wins; a method that the user named is kept, if the draft fits it."""
    assert config.model is not None and config.method is not None
    model_type, architectures = lookup(hf_config, "model_type", ""), set(architectures_of(hf_config))
    if is_explicit:
        is_wrong = config.method in METHODS_WITH_A_MODEL_TYPE and hf_config is not None
        is_wrong = is_wrong and model_type and model_type not in METHODS[config.method].detect_by_model_type
        if is_wrong:
            raise NotImplementedError(
                f"Unsupported speculative method: '{config.method}' (model_type {model_type!r} of {config.model})"
            )
    else:
        by_name = [m for m, facts in METHODS.items() if any(n in config.model.lower() for n in facts.detect_by_name)]
        by_architecture = [m for m, facts in METHODS.items() if architectures & facts.detect_by_architecture]
        by_type = [m for m, facts in METHODS.items() if model_type in facts.detect_by_model_type]
        found: list[Any] = [*by_name, *by_architecture, *by_type, "draft_model"]
        config.method = found[0]
    if config.method != "mtp":
        return
    target_type = lookup(config.target_model_config, "hf_config.model_type", "")
    if target_type in TARGETS_WITHOUT_MTP:
        raise ValueError(
            f"a target of type {target_type!r} ships no MTP layers; use speculative method "
            f"'{TARGETS_WITHOUT_MTP[target_type]}' instead of 'mtp'"
        )
    if (config.num_speculative_tokens or 1) > 1 and model_type not in LAYER_FOR_EACH_TOKEN:
        logger.warning("num_speculative_tokens > 1 runs the same MTP layer repeatedly; acceptance may be lower")


def _apply_n_predict(config: SpeculativeConfig, hf_config: Any) -> None:
    if lookup(hf_config, "num_lookahead_tokens") is not None and config.num_speculative_tokens is not None:
        hf_config.num_lookahead_tokens = config.num_speculative_tokens
    if config.method == "dspark":
        block_size = lookup(hf_config, "block_size") or lookup(hf_config, "dspark_block_size")
        config.num_speculative_tokens = config.num_speculative_tokens or block_size
        return
    n_predict = lookup(hf_config, "n_predict")
    if n_predict is None:
        return
    if config.num_speculative_tokens is None:
        config.num_speculative_tokens = n_predict
    elif config.num_speculative_tokens > n_predict and config.num_speculative_tokens % n_predict:
        raise ValueError(f"num_speculative_tokens:{config.num_speculative_tokens} must be divisible by {n_predict=}")


def _fill_in_tree(config: SpeculativeConfig) -> None:
    if config.speculative_token_tree is not None:
        config.speculative_token_tree = str(TokenTree.parse(config.speculative_token_tree))
    elif config.num_speculative_tokens is None:
        raise ValueError(
            "A speculative model was provided, but neither `speculative_token_tree` nor `num_speculative_tokens` was "
            "provided"
        )
    else:
        config.speculative_token_tree = TokenTree.written_chain(config.num_speculative_tokens)


def _make_draft_model_config(config: SpeculativeConfig, hf_config: Any) -> None:
    target, target_parallel = config.target_model_config, config.target_parallel_config
    if target_parallel is not None:
        config.draft_tensor_parallel_size = draft_tensor_parallel_size(
            config.draft_tensor_parallel_size, target_parallel.tensor_parallel_size, lookup(hf_config, "model_type")
        )
        config.draft_parallel_config = draft_parallel_config(target_parallel, config.draft_tensor_parallel_size)
    if hf_config is None:
        return
    assert config.model is not None
    own_length = lookup(hf_config, "max_position_embeddings")
    length = draft_max_model_len(config.max_model_len, own_length, lookup(target, "max_model_len"))
    config.draft_model_config = ModelInfo(config.model, hf_config, length, config.quantization)


def _apply_index_sharing(config: SpeculativeConfig) -> None:
    if config.index_share_for_mtp_iteration is None:
        return
    if config.method != "mtp" or config.draft_model_config is None:
        raise ValueError("index_share_for_mtp_iteration is only supported with method='mtp'")
    config.draft_model_config.hf_config.index_share_for_mtp_iteration = config.index_share_for_mtp_iteration
