"""Making a proposer from a `SpeculativeConfig`. Trained drafters come from the model registry, by checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from speculators.decoding.adaptive import AdaptiveLength
from speculators.decoding.config import ModelInfo, SpeculativeConfig
from speculators.decoding.config.draft import lookup
from speculators.decoding.proposers.draft_model import DraftModelProposer
from speculators.decoding.proposers.dynamic_tree import DynamicTreeProposer
from speculators.decoding.proposers.early_exit import first_layers
from speculators.decoding.proposers.ngram import NgramProposer
from speculators.decoding.proposers.static_tree import StaticTreeProposer
from speculators.decoding.proposers.suffix import SuffixProposer
from speculators.decoding.proposers.tree_draft_model import TreeDraftModelProposer
from speculators.decoding.proposers.vocabulary import TokenIntersection
from speculators.decoding.recurrent_verifier import is_recurrent
from speculators.decoding.verification import resolve_rule
from speculators.interfaces import AcceptanceRule, CaptureSpec, Committed, DraftSampling, Proposal, Proposer
from speculators.model import SpeculatorModel
from speculators.verifier import load_verifier, verifier_parts

EARLY_EXIT_SHARE = 4
"""Without `early_exit_layer` a quarter of the verifier's layers draft."""


@dataclass(frozen=True)
class Drafting:
    """How an engine drafts and verifies."""

    proposer: Proposer
    num_tokens_at: Callable[[int], int]
    """K, by how many requests are running, unless `adaptive` chooses it."""
    rule: AcceptanceRule
    is_probabilistic: bool = False
    """Drafts are drawn from the draft's distribution."""
    max_length: int | None = None
    """Rows longer than this are not drafted for."""
    adaptive: AdaptiveLength | None = None
    """Told what each round did, when K follows from that."""

    def num_tokens(self, num_running: int, num_rows: int) -> int:
        """K of the next round. A forward has `num_rows` rows, idle ones included."""
        return self.num_tokens_at(num_running) if self.adaptive is None else self.adaptive.num_tokens(num_rows)

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        """What the proposer drafts, less what is not to be verified."""
        proposal = self.proposer.propose(committed, num_tokens, sampling)
        if self.adaptive is not None:
            proposal = self.adaptive.shorten(proposal)
        if self.max_length is not None:
            is_too_long_B1 = (committed.num_committed_B > self.max_length)[:, None]
            proposal = replace(proposal, token_ids_BK=proposal.token_ids_BK.masked_fill(is_too_long_B1, -1))
        return proposal


@dataclass(frozen=True)
class Workplace:
    """What a proposer may be built around."""

    verifier: Any
    tokenizer: Any
    max_batch_size: int
    max_length: int


def build_drafting(
    speculative_config: SpeculativeConfig | dict[str, Any] | Proposer | None,
    verifier: Any,
    *,
    tokenizer: Any = None,
    max_batch_size: int,
    max_length: int,
    num_speculative_tokens: int | None = None,
    rule: AcceptanceRule | str | None = None,
) -> Drafting | None:
    """None = plain decoding. See `Engine` for what may be given."""
    if speculative_config is None:
        if num_speculative_tokens is not None:
            raise ValueError(
                f"num_speculative_tokens={num_speculative_tokens} but no speculative_config says what drafts them; "
                'give one such as {"method": "ngram"}, or leave both out to decode plainly'
            )
        return None
    rule = resolve_rule(rule) if isinstance(rule, str) else rule
    if isinstance(speculative_config, (dict, SpeculativeConfig)):
        config = resolve(speculative_config, verifier, num_speculative_tokens)
        proposer = build_proposer(config, Workplace(verifier, tokenizer, max_batch_size, max_length))
        return Drafting(
            proposer,
            config.num_tokens_at,
            rule or config.acceptance_rule(),
            config.draws_drafts,
            longest_drafted_for(config),
            AdaptiveLength(config.max_depth) if config.enable_adaptive_verification else None,
        )
    if not callable(getattr(speculative_config, "propose", None)):
        raise ValueError(
            f"speculative_config is a {type(speculative_config).__name__}; give a SpeculativeConfig, a dict of its "
            "fields, an object with a propose method, or None"
        )
    if num_speculative_tokens is None:
        raise ValueError("a ready proposer needs num_speculative_tokens: how many tokens to draft a round")
    num_tokens = num_speculative_tokens
    return Drafting(speculative_config, lambda num_running: num_tokens, rule or resolve_rule("standard"), True)


def longest_drafted_for(config: SpeculativeConfig) -> int | None:
    """A draft model sees positions of its own, which may be fewer than the verifier's."""
    if config.uses_draft_model() and config.draft_model_config is not None:
        return config.draft_model_config.max_model_len
    return config.max_model_len


def resolve(
    config: SpeculativeConfig | dict[str, Any], verifier: Any, num_speculative_tokens: int | None
) -> SpeculativeConfig:
    """The user's settings, resolved against the verifier at hand."""
    given = dict(config) if isinstance(config, dict) else config.given
    if num_speculative_tokens is not None:
        given["num_speculative_tokens"] = num_speculative_tokens
    if isinstance(verifier, torch.nn.Module) and "target_model_config" not in given:
        hf_config: Any = verifier.config
        length = getattr(hf_config.get_text_config(decoder=True), "max_position_embeddings", None)
        given["target_model_config"] = ModelInfo(hf_config.name_or_path, hf_config, length)
    return SpeculativeConfig(**given)


def build_proposer(config: SpeculativeConfig, place: Workplace) -> Proposer:
    """The proposer that a config asks for."""
    refuse_what_no_proposer_does(config)
    if is_speculator(config):
        return build_from_checkpoint(config, place)
    if config.method not in BUILDERS:
        raise ValueError(
            f"method={config.method!r} needs a speculators checkpoint and {config.model!r} is not one (no config.json "
            f"with speculators_model_type); convert it with `speculators convert`, or use one of {sorted(BUILDERS)}"
        )
    return BUILDERS[config.method](config, place)


def build_from_checkpoint(config: SpeculativeConfig, place: Workplace) -> Proposer:
    """A trained drafter, and the tree it is to draft."""
    assert config.model is not None
    # in the verifier's type: its embedding and head are not rounded to the checkpoint's type on their way here
    speculator = SpeculatorModel.from_pretrained(
        config.model,
        dtype=place.verifier.dtype,
        verifier=directory_of(place.verifier),
        revision=config.revision or "main",
    )
    sizes = {"max_batch_size": place.max_batch_size, "max_length": place.max_length}
    if config.dynamic_tree is not None:
        return DynamicTreeProposer(speculator.make_tree_drafter(place.verifier, **sizes), config.dynamic_tree)
    if config.token_tree is not None:
        return StaticTreeProposer(speculator.make_tree_drafter(place.verifier, **sizes), config.token_tree)
    return speculator.make_proposer(place.verifier, **sizes)


def directory_of(verifier: Any) -> str | None:
    """Where the verifier at hand was loaded from: a drafter takes its share of weights there, wherever the verifier lay
    when it was trained. None: made in memory or of the hub, so what the checkpoint recorded has to do."""
    name = str(getattr(getattr(verifier, "config", None), "name_or_path", None) or "")
    return name if name and (Path(name) / "config.json").is_file() else None


def refuse_what_no_proposer_does(config: SpeculativeConfig) -> None:
    """Settings that would otherwise be passed over in silence."""
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
    """By the draft's config.json, which was read when the config was resolved: from a directory or from the hub."""
    draft = config.draft_model_config
    return draft is not None and lookup(draft.hf_config, "speculators_model_type") is not None


def build_ngram(config: SpeculativeConfig, place: Workplace) -> Proposer:
    assert config.prompt_lookup_min is not None and config.prompt_lookup_max is not None
    return NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max, max_batch_size=place.max_batch_size)


def build_suffix(config: SpeculativeConfig, place: Workplace) -> Proposer:
    return SuffixProposer(config, max_batch_size=place.max_batch_size)


def build_draft_model(config: SpeculativeConfig, place: Workplace) -> Proposer:
    assert config.model is not None
    parameter = next(place.verifier.parameters())
    model = load_verifier(config.model, dtype=parameter.dtype, device=parameter.device, revision=config.revision)
    refuse_recurrent(model, f"draft model {config.model!r}")
    intersection = None
    if config.use_heterogeneous_vocab:
        if place.tokenizer is None:
            raise ValueError("use_heterogeneous_vocab needs the verifier's tokenizer; pass Engine(..., tokenizer=...)")
        intersection = TokenIntersection(
            place.tokenizer,
            AutoTokenizer.from_pretrained(config.model, revision=config.revision),
            num_verifier=verifier_parts(place.verifier).config.vocab_size,
            num_draft=verifier_parts(model).config.vocab_size,
        )
    proposer = DraftModelProposer(model, max_batch_size=place.max_batch_size, intersection=intersection)
    return with_tree(config, proposer)


def refuse_recurrent(model: Any, what: str) -> None:
    """A drafter writes over its own drafts; a state has taken them in."""
    if is_recurrent(model):
        raise ValueError(
            f"{what}: {type(model).__name__} folds the past into states, which cannot be rolled back when drafts are "
            "rejected; draft with ngram, suffix, a speculators checkpoint or a draft model whose layers are attention"
        )


def build_early_exit(config: SpeculativeConfig, place: Workplace) -> Proposer:
    refuse_recurrent(place.verifier, "method='early_exit'")
    total = len(verifier_parts(place.verifier).layers)
    num_layers = config.early_exit_layer or max(1, total // EARLY_EXIT_SHARE)
    proposer = DraftModelProposer(first_layers(place.verifier, num_layers), max_batch_size=place.max_batch_size)
    return with_tree(config, proposer)


def with_tree(config: SpeculativeConfig, proposer: DraftModelProposer) -> Proposer:
    """The same drafter drafting the config's tree, if that is more than a chain."""
    if config.token_tree is not None and config.use_heterogeneous_vocab:
        raise ValueError("use_heterogeneous_vocab drafts chains only; leave out speculative_token_tree")
    return proposer if config.token_tree is None else TreeDraftModelProposer(proposer, config.token_tree)


def build_custom_class(config: SpeculativeConfig, place: Workplace) -> Proposer:
    """`package.module.Class(config)`; it must have `propose`, and `capture` when it reads verifier states."""
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


BUILDERS: dict[str, Callable[[SpeculativeConfig, Workplace], Proposer]] = {
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
