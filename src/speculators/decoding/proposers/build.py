"""Builds the proposer that a `SpeculativeConfig` names. Trained drafters come from the model registry."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speculators.decoding.config import SpeculativeConfig
from speculators.decoding.config.draft import lookup, naming_the_guess
from speculators.decoding.proposers.draft_model import DraftModelProposer, TokenIntersection, first_layers
from speculators.decoding.proposers.suffix import NgramProposer, SuffixProposer
from speculators.decoding.trees.dynamic_tree import DynamicTreeProposer
from speculators.decoding.trees.static_tree import StaticTreeProposer, TreeDraftModelProposer
from speculators.decoding.verifiers.recurrent_verifier import is_recurrent
from speculators.interfaces import CaptureSpec, Proposer, Verifier
from speculators.model import SpeculatorModel
from speculators.utils.progress import doing
from speculators.utils.quantized import tokenizer_source
from speculators.verifier import load_verifier, verifier_parts
from speculators.verifier.loading import loading

EARLY_EXIT_SHARE = 4
"""Without `early_exit_layer`, the verifier's first 1/4 of layers drafts."""


@dataclass(frozen=True)
class ProposerContext:
    """Holds what a proposer is built for: the verifier, its tokenizer and the sizes of the engine."""

    verifier: PreTrainedModel | Verifier
    tokenizer: PreTrainedTokenizerBase | None
    max_batch_size: int
    max_length: int

    def model_for(self, method: str) -> PreTrainedModel:
        """The verifier, where a method reads its modules; ValueError if it is not a transformers model."""
        if not isinstance(self.verifier, nn.Module):
            raise ValueError(
                f"{method} reads the verifier's layers and weights, and the verifier is a "
                f"{type(self.verifier).__name__}; give the engine a transformers model, or draft with ngram or suffix"
            )
        return self.verifier


def build_proposer(config: SpeculativeConfig, context: ProposerContext) -> Proposer:
    """The proposer that a config asks for. Raises ValueError for a method that is not drafted with here."""
    with naming_the_guess(config):
        refuse_unsupported_settings(config)
        if is_speculator(config):
            return build_from_checkpoint(config, context)
        if config.method not in BUILDERS:
            raise ValueError(
                f"method={config.method!r} needs a speculators checkpoint and {config.model!r} is not one (no "
                "config.json with speculators_model_type); convert it with `speculators convert`, or use one of "
                f"{sorted(BUILDERS)}"
            )
        return BUILDERS[config.method](config, context)


def build_from_checkpoint(config: SpeculativeConfig, context: ProposerContext) -> Proposer:
    """Loads a trained drafter, and wraps it if the config asks for a tree."""
    assert config.model is not None
    # in the verifier's dtype: its embedding and head must not be rounded to the checkpoint's dtype
    verifier = context.model_for(f"the speculators checkpoint {config.model!r}")
    with doing(loading(config.model)):
        speculator = SpeculatorModel.from_pretrained(
            config.model, dtype=verifier.dtype, verifier=directory_of(verifier), revision=config.revision or "main"
        )
    sizes = {"max_batch_size": context.max_batch_size, "max_length": context.max_length}
    if config.dynamic_tree is not None:
        return DynamicTreeProposer(speculator.make_tree_drafter(verifier, **sizes), config.dynamic_tree)
    if config.token_tree is not None:
        return StaticTreeProposer(speculator.make_tree_drafter(verifier, **sizes), config.token_tree)
    return speculator.make_proposer(verifier, **sizes)


def directory_of(verifier: PreTrainedModel) -> str | None:
    """The directory the verifier was loaded from: the drafter reads its verifier weights there, wherever the verifier
    lay when the drafter was trained. None (made in memory, or from the hub): the name that the checkpoint recorded."""
    name = str(getattr(getattr(verifier, "config", None), "name_or_path", None) or "")
    return name if name and (Path(name) / "config.json").is_file() else None


def refuse_unsupported_settings(config: SpeculativeConfig) -> None:
    """Raise ValueError for settings that no proposer here follows: they must not be skipped quietly."""
    is_checkpoint = is_speculator(config)
    if config.token_tree is not None and not is_checkpoint and config.method not in STATIC_TREE_METHODS:
        raise ValueError(
            f"speculative_token_tree={config.token_tree}: method={config.method!r} drafts chains only; leave the tree "
            f"out, or draft with a speculators checkpoint or one of {STATIC_TREE_METHODS}"
        )
    if config.dynamic_tree is not None and not is_checkpoint:
        raise ValueError(
            f"dynamic_tree: method={config.method!r} cannot grow one; leave it out, or draft with a speculators "
            "checkpoint"
        )
    if config.method == "draft_model" and config.given.get("parallel_drafting"):
        raise ValueError("parallel_drafting with method='draft_model' (PARD) is served by vLLM only; leave it out here")
    if config.enable_adaptive_verification and config.num_speculative_tokens_per_batch_size is not None:
        raise ValueError(
            "enable_adaptive_verification and num_speculative_tokens_per_batch_size both choose how many tokens to "
            "draft; leave one of them out"
        )
    if config.quantization is not None:
        raise ValueError(f"quantization={config.quantization!r} of the draft is served by vLLM only; leave it out here")


def is_speculator(config: SpeculativeConfig) -> bool:
    """Whether the draft is a speculators checkpoint, by its config.json (read when the config was resolved)."""
    draft = config.draft_model_config
    return draft is not None and lookup(draft.hf_config, "speculators_model_type") is not None


def build_ngram(config: SpeculativeConfig, context: ProposerContext) -> Proposer:
    assert config.prompt_lookup_min is not None and config.prompt_lookup_max is not None
    return NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max, max_batch_size=context.max_batch_size)


def build_suffix(config: SpeculativeConfig, context: ProposerContext) -> Proposer:
    return SuffixProposer(config, max_batch_size=context.max_batch_size)


def build_draft_model(config: SpeculativeConfig, context: ProposerContext) -> Proposer:
    assert config.model is not None
    verifier = context.model_for("method='draft_model'")
    parameter = next(verifier.parameters())
    model = load_verifier(config.model, dtype=parameter.dtype, device=parameter.device, revision=config.revision)
    refuse_recurrent(model, f"draft model {config.model!r}")
    intersection = None
    if config.use_heterogeneous_vocab:
        if context.tokenizer is None:
            raise ValueError("use_heterogeneous_vocab needs the verifier's tokenizer; pass Engine(..., tokenizer=...)")
        intersection = TokenIntersection(
            context.tokenizer,
            AutoTokenizer.from_pretrained(**tokenizer_source(config.model), revision=config.revision),
            num_verifier=verifier_parts(verifier).config.vocab_size,
            num_draft=verifier_parts(model).config.vocab_size,
        )
    proposer = DraftModelProposer(model, max_batch_size=context.max_batch_size, intersection=intersection)
    return with_tree(config, proposer)


def refuse_recurrent(model: PreTrainedModel, what: str) -> None:
    """Raise ValueError for a recurrent draft model: rejected drafts are overwritten in a cache, but stay in a state."""
    if is_recurrent(model):
        raise ValueError(
            f"{what}: {type(model).__name__} keeps recurrent states, which cannot be rolled back when drafts are "
            "rejected; draft with ngram, suffix, a speculators checkpoint or a draft model whose layers are attention"
        )


def build_early_exit(config: SpeculativeConfig, context: ProposerContext) -> Proposer:
    verifier = context.model_for("method='early_exit'")
    refuse_recurrent(verifier, "method='early_exit'")
    total = len(verifier_parts(verifier).layers)
    num_layers = config.early_exit_layer or max(1, total // EARLY_EXIT_SHARE)
    proposer = DraftModelProposer(first_layers(verifier, num_layers), max_batch_size=context.max_batch_size)
    return with_tree(config, proposer)


def with_tree(config: SpeculativeConfig, proposer: DraftModelProposer) -> Proposer:
    """The proposer itself, or one that drafts the config's tree with it."""
    if config.token_tree is not None and config.use_heterogeneous_vocab:
        raise ValueError("use_heterogeneous_vocab drafts chains only; leave out speculative_token_tree")
    return proposer if config.token_tree is None else TreeDraftModelProposer(proposer, config.token_tree)


def build_custom_class(config: SpeculativeConfig, context: ProposerContext) -> Proposer:
    """Builds `package.module.Class(config)`; it must have `propose`, and `capture` when it reads verifier states."""
    assert config.model is not None
    module_name, _, class_name = config.model.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"custom_class: cannot import module {module_name!r} of {config.model!r}: {error}") from error
    proposer_class = getattr(module, class_name, None)
    if proposer_class is None or not callable(getattr(proposer_class, "propose", None)):
        missing = "no such class" if proposer_class is None else "the class has no method `propose`"
        raise AttributeError(f"custom_class: {config.model!r}: {missing}")
    try:
        proposer = proposer_class(config)
    except Exception as error:
        raise RuntimeError(f"custom_class: {config.model}(config) failed: {error}") from error
    if not hasattr(proposer, "capture"):
        proposer.capture = CaptureSpec()
    return proposer


BUILDERS: dict[str, Callable[[SpeculativeConfig, ProposerContext], Proposer]] = {
    "ngram": build_ngram,
    "ngram_gpu": build_ngram,
    "suffix": build_suffix,
    "draft_model": build_draft_model,
    "early_exit": build_early_exit,
    "custom_class": build_custom_class,
}
"""Methods that need no speculators checkpoint."""
STATIC_TREE_METHODS = ("draft_model", "early_exit")
"""Those that draft a `speculative_token_tree`."""
