"""Builds an engine's ways of drafting: proposer, the number of tokens per round and its rule, from the arguments of
`Engine`. What requests ask of them is in `drafters`.

Shapes: B rows, K draft slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators.decoding.adaptive import AdaptiveLength
from speculators.decoding.config import ModelInfo, SpeculativeConfig
from speculators.decoding.method import name_of
from speculators.decoding.proposers.build import ProposerContext, build_proposer
from speculators.decoding.verification import resolve_rule
from speculators.interfaces import AcceptanceRule, Committed, DraftSampling, Proposal, Proposer, Verifier
from speculators.utils.util import NestedContext
from speculators.verifier.config import text_config


@dataclass(frozen=True)
class Drafting:
    """One way of drafting, and the rule that verifies it."""

    name: str
    """What requests call it."""
    proposer: Proposer
    num_tokens_at: Callable[[int], int]
    """K, by how many requests are running, unless `adaptive` chooses it."""
    most_tokens: int
    """The largest K that a request may ask for."""
    rule: AcceptanceRule
    is_probabilistic: bool = False
    """Drafts are drawn from the draft's distribution."""
    max_length: int | None = None
    """Rows longer than this get no drafts."""
    adaptive: AdaptiveLength | None = None
    """Chooses K from what the rounds before cost and accepted."""

    def num_tokens(self, num_running: int, num_rows: int, *, learns: bool) -> int:
        """K of the next round, for requests that say none. A forward has `num_rows` rows, idle ones included.
        `learns`: the round is like those that `adaptive` measures; if not, it is neither asked nor told."""
        if self.adaptive is None:
            return self.num_tokens_at(num_running)
        return self.adaptive.num_tokens(num_rows) if learns else self.adaptive.current

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        """The proposer's drafts, without those that are not worth verifying and those of rows that are too long."""
        proposal = self.proposer.propose(committed, num_tokens, sampling)
        if self.adaptive is not None and sampling.wants_confidence:
            proposal = self.adaptive.shorten(proposal)
        if self.max_length is not None:
            is_too_long_B1 = (committed.num_committed_B > self.max_length)[:, None]
            proposal = replace(proposal, token_ids_BK=proposal.token_ids_BK.masked_fill(is_too_long_B1, -1))
        return proposal


Drafts: TypeAlias = SpeculativeConfig | dict[str, Any] | Proposer


def build_drafting(
    speculative_config: Drafts | None,
    verifier: PreTrainedModel | Verifier,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_batch_size: int,
    max_length: int,
    num_speculative_tokens: int | None = None,
    rule: AcceptanceRule | str | None = None,
    others: Mapping[str, Drafts] | None = None,
) -> list[Drafting]:
    """The ways of drafting of an engine, the first one first; none = plain decoding. `Engine` documents the arguments.

    Raises ValueError for settings that contradict one another or that no proposer here can follow.
    """
    if speculative_config is None:
        if num_speculative_tokens is not None:
            raise ValueError(
                f"num_speculative_tokens={num_speculative_tokens} but no speculative_config says what drafts them; "
                'give one such as {"method": "ngram"}, or leave both out to decode plainly'
            )
        if others:
            raise ValueError(f"other_methods={sorted(others)} but no first one: give it as speculative_config")
        return []
    rule = resolve_rule(rule) if isinstance(rule, str) else rule
    given = [(None, speculative_config), *(others or {}).items()]
    context = ProposerContext(verifier, tokenizer, max_batch_size, max_length)
    return [build_one(drafts, name, context, num_speculative_tokens, rule) for name, drafts in given]


def build_one(
    drafts: Drafts,
    name: str | None,
    context: ProposerContext,
    num_speculative_tokens: int | None,
    rule: AcceptanceRule | None,
) -> Drafting:
    """Without a `name` it is called as its configuration names the method."""
    if isinstance(drafts, (dict, SpeculativeConfig)):
        config = resolve(drafts, context.verifier, num_speculative_tokens)
        return Drafting(
            name or name_of(config.given),
            build_proposer(config, context),
            config.num_tokens_at,
            config.max_depth,
            rule or config.acceptance_rule(),
            config.draws_drafts,
            longest_drafted_for(config),
            AdaptiveLength(config.max_depth) if config.enable_adaptive_verification else None,
        )
    if not callable(getattr(drafts, "propose", None)):
        raise ValueError(
            f"speculative_config is a {type(drafts).__name__}; give a SpeculativeConfig, a dict of its fields, an "
            "object with a propose method, or None"
        )
    if num_speculative_tokens is None:
        raise ValueError("a ready proposer needs num_speculative_tokens: how many tokens to draft per round")
    most = num_speculative_tokens
    rule = rule or resolve_rule("standard")
    return Drafting(name or type(drafts).__name__, drafts, lambda num_running: most, most, rule, True)


def longest_drafted_for(config: SpeculativeConfig) -> int | None:
    """The longest row that gets drafts: a draft model may have fewer positions than the verifier."""
    if config.uses_draft_model() and config.draft_model_config is not None:
        return config.draft_model_config.max_model_len
    return config.max_model_len


def resolve(
    config: SpeculativeConfig | dict[str, Any], verifier: PreTrainedModel | Verifier, num_speculative_tokens: int | None
) -> SpeculativeConfig:
    """The user's settings, resolved against the verifier at hand."""
    given = dict(config) if isinstance(config, dict) else config.given
    if num_speculative_tokens is not None:
        given["num_speculative_tokens"] = num_speculative_tokens
    if isinstance(verifier, nn.Module) and "target_model_config" not in given:
        hf_config = verifier.config
        length = getattr(text_config(hf_config), "max_position_embeddings", None)
        given["target_model_config"] = ModelInfo(hf_config.name_or_path or "", hf_config, length)
    return SpeculativeConfig(**given)


class ReadyModels(NestedContext):
    """Inside, the verifier and the proposers' own models are set up for decoding, without gradients. Nests cheaply."""

    def __init__(self, verifier: Verifier, proposers: Sequence[Proposer]):
        self.verifier, self.proposers = verifier, proposers

    def set_up(self, stack: ExitStack) -> None:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(self.verifier)
        for proposer in self.proposers:
            if isinstance(proposer, AbstractContextManager):
                stack.enter_context(proposer)
