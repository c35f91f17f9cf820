"""The ways of drafting that one engine holds, and what the requests of a batch ask of them in a round.

A request may say which of them drafts for it (`SamplingParams.method`) and how much at most
(`num_speculative_tokens`). Each sees its own rows only; the others are idle to it. All drafts are verified in one
forward.

Shapes: B rows, K draft slots, V verifier vocabulary, D width of captured states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad
from transformers import PreTrainedModel

from speculators.decoding.adaptive import AdaptiveLength
from speculators.decoding.drafting import Drafting
from speculators.decoding.method import PLAIN
from speculators.decoding.request import ActiveRequest
from speculators.decoding.rows import Batch
from speculators.decoding.settings import SamplingParams
from speculators.decoding.trees.token_tree import depths
from speculators.decoding.verification import resolve_rule, seed_drafts
from speculators.interfaces import (
    AcceptanceRule,
    CaptureSpec,
    Committed,
    DraftSampling,
    Proposal,
    RemembersRequests,
    Verifier,
)
from speculators.nn.device import to_device
from speculators.nn.draft_tokens import own_probs_of
from speculators.nn.graphs import HasFixedShapes, Record
from speculators.utils.names import did_you_mean
from speculators.verifier import verifier_parts

PLAIN_RULE = resolve_rule("strict")
"""Draws the next token where nothing is ever drafted."""


class Drafters:
    """Ways of drafting, by name. A request that names none gets the first; an empty sequence is plain decoding.

    Raises ValueError for names that cannot be told apart, and for acceptance rules that differ: rows of one forward are
    verified by one rule."""

    def __init__(self, methods: Sequence[Drafting], verifier: PreTrainedModel | Verifier, record: Record | None = None):
        """`record`: of fixed shapes, where a proposer has them (`nn.graphs`)."""
        names = [method.name for method in methods]
        if len(set(names)) < len(names) or PLAIN in names:
            raise ValueError(f"methods {names}: each needs a name of its own, other than {PLAIN!r} (plain decoding)")
        rules = {method.name: method.rule for method in methods}
        if any(rule != methods[0].rule for rule in rules.values()):
            raise ValueError(
                f"the methods of one engine need one acceptance rule, and have {rules}; give rule=, or the same "
                "rejection_sample_method"
            )
        for method in methods:
            if isinstance(method.proposer, HasFixedShapes):
                method.proposer.use_graphs(record)
        self.methods = tuple(methods)
        self.rule: AcceptanceRule = methods[0].rule if methods else PLAIN_RULE
        self._generator = torch.Generator(device=verifier.device)
        self._captures = [as_aux_layers(method.proposer.capture, verifier, len(methods)) for method in methods]
        self.capture = union(self._captures)
        """What the verifier captures: each proposer gets the layers that it reads."""
        self.own_probs_by_row: dict[int, list[float | None]] = {}
        """Of the last round's chains, the drafter's own probability of each draft: in rows of requests that ask for
        log-probabilities, and of methods that have them."""

    @property
    def most_tokens(self) -> dict[str, int]:
        """The largest `num_speculative_tokens` of each method."""
        return {method.name: method.most_tokens for method in self.methods}

    def index_of(self, params: SamplingParams) -> int | None:
        """Which method drafts for a request; None: none does. Raises ValueError for one that is not here, and for more
        drafts than it makes."""
        name, number = params.method, params.num_speculative_tokens
        if not self.methods and (name not in (None, PLAIN) or number):
            said = f"method={name!r}" if name not in (None, PLAIN) else f"num_speculative_tokens={number}"
            raise ValueError(f"{said} but this engine drafts nothing; give it a speculative_config (a drafter)")
        if name == PLAIN and number:
            raise ValueError(f"num_speculative_tokens={number} with method={PLAIN!r}: plain decoding drafts nothing")
        names = [method.name for method in self.methods]
        if name not in (None, PLAIN, *names):
            known = [PLAIN, *names]
            raise ValueError(f"method={name!r} is none of this engine's: {known}.{did_you_mean(str(name), known)}")
        if not self.methods or name == PLAIN:
            return None
        index = 0 if name is None else names.index(name)
        most = self.methods[index].most_tokens
        if number is not None and number > most:
            raise ValueError(
                f"num_speculative_tokens={number}: this engine's {names[index]!r} drafts at most {most} (its own "
                "num_speculative_tokens)"
            )
        return None if number == 0 else index

    def learning(self, requests: Mapping[int, ActiveRequest]) -> AdaptiveLength | None:
        """What chooses K from measured rounds, where this round is one of those: one method drafts for all, and nobody
        says a number."""
        indices = {request.drafter for request in requests.values()}
        is_said = any(request.params.num_speculative_tokens is not None for request in requests.values())
        index = indices.pop() if len(indices) == 1 else None
        return None if index is None or is_said else self.methods[index].adaptive

    def forget_requests(self) -> None:
        for method in self.methods:
            if isinstance(method.proposer, RemembersRequests):
                method.proposer.reset()

    def propose(self, batch: Batch, requests: dict[int, ActiveRequest]) -> Proposal | None:
        """The drafts of all rows; None where nothing is to be drafted."""
        learns = self.learning(requests) is not None
        parts: list[Proposal] = []
        self.own_probs_by_row.clear()
        sampling = batch.sampling(0, batch.width)
        for index, method in enumerate(self.methods):
            own = {row: request for row, request in requests.items() if request.drafter == index}
            if not own:
                continue
            default = method.num_tokens(len(requests), batch.width, learns=learns)
            numbers = {row: default if (n := q.params.num_speculative_tokens) is None else n for row, q in own.items()}
            num_tokens = max(numbers.values())
            if num_tokens == 0:
                continue
            probabilistic = method.is_probabilistic and not sampling.all_greedy
            if probabilistic and all(
                part.probs_BKV is None for part in parts
            ):  # once per round: not the same draws again
                seed_drafts(self._generator, sampling.host_seed_B, batch.lengths(0, batch.width))
            asking = [row for row, request in own.items() if request.params.logprobs is not None]
            own_probs: list[Tensor] | None = [] if asking else None
            draft_sampling = DraftSampling(sampling.temperature_B, self._generator, probabilistic, learns, own_probs)
            proposal = method.propose(self._read_by(index, batch.committed(index)), num_tokens, draft_sampling)
            if len(own) < len(requests) or len(set(numbers.values())) > 1:
                proposal = limited(proposal, numbers)
            parts.append(proposal)
            own_probs_BK = own_probs_of(draft_sampling)
            if own_probs_BK is not None and proposal.parents_K is None:
                probs_BK = own_probs_BK.tolist()
                self.own_probs_by_row |= {row: [p if p == p else None for p in probs_BK[row]] for row in asking}
        return merged(parts, batch.vocab_size) if parts else None

    def _read_by(self, index: int, committed: Committed) -> Committed:
        """With the states that a method reads, of all that were captured."""
        own, states_BTD = self._captures[index], committed.states_BTD
        if own == self.capture or states_BTD is None:
            return committed
        if own == CaptureSpec():
            return replace(committed, states_BTD=None)
        layers = states_BTD.chunk(len(self.capture.aux_layer_ids), dim=-1)
        read = [layers[self.capture.aux_layer_ids.index(layer_id)] for layer_id in own.aux_layer_ids]
        return replace(committed, states_BTD=torch.cat(read, dim=-1))


def as_aux_layers(capture: CaptureSpec, verifier: PreTrainedModel | Verifier, num_methods: int) -> CaptureSpec:
    """Where several methods read states: the last state as what it also is, the stream after the last layer."""
    if num_methods == 1 or not capture.last_hidden or capture.aux_layer_ids or not isinstance(verifier, nn.Module):
        return capture
    return CaptureSpec(aux_layer_ids=(len(verifier_parts(verifier).layers),))


def union(captures: Sequence[CaptureSpec]) -> CaptureSpec:
    different = {capture for capture in captures if capture != CaptureSpec()}
    if len(different) < 2:
        return next(iter(different), CaptureSpec())
    return CaptureSpec(aux_layer_ids=tuple(sorted({i for capture in different for i in capture.aux_layer_ids})))


def limited(proposal: Proposal, numbers: Mapping[int, int]) -> Proposal:
    """The drafts up to each row's number of them (in a tree: its depth); none in rows that are not named."""
    token_ids_BK = proposal.token_ids_BK
    B, K = token_ids_BK.shape
    number_B1 = to_device([numbers.get(row, 0) for row in range(B)], token_ids_BK.device)[:, None]
    of_slots = range(1, K + 1) if proposal.parents_K is None else depths(proposal.parents_K.tolist())
    depth_K = to_device(list(of_slots), token_ids_BK.device)
    return replace(proposal, token_ids_BK=token_ids_BK.masked_fill(depth_K > number_B1, -1))


def merged(parts: Sequence[Proposal], vocab_size: int) -> Proposal:
    """The drafts of several methods, each of which has none in the others' rows. Beside drafts that were drawn, a point
    mass is a law of one token."""
    if len(parts) == 1:
        return parts[0]
    if any(part.parents_K is not None for part in parts):
        return side_by_side(parts, vocab_size)
    K = max(part.token_ids_BK.shape[1] for part in parts)
    token_ids = [pad(part.token_ids_BK, (0, K - part.token_ids_BK.shape[1]), value=-1) for part in parts]
    token_ids_BK = torch.stack(token_ids).amax(0)
    if all(part.probs_BKV is None for part in parts):
        return Proposal(token_ids_BK)
    laws = [law_of(part, vocab_size) for part in parts]
    return Proposal(token_ids_BK, torch.stack([pad(law, (0, 0, 0, K - law.shape[1])) for law in laws]).sum(0))


def side_by_side(parts: Sequence[Proposal], vocab_size: int) -> Proposal:
    """One tree, whose root has the trees and chains of all parts below it: all rows share a shape, and each has drafts
    in the slots of its own method alone.

        tree -1 -1 0   beside   chain -1 0   gives   -1 -1 0 -1 3"""
    parents: list[int] = []
    for part in parts:
        K, first = part.token_ids_BK.shape[1], len(parents)
        own = range(-1, K - 1) if part.parents_K is None else part.parents_K.tolist()
        parents += [parent if parent < 0 else first + parent for parent in own]
    token_ids_BK = torch.cat([part.token_ids_BK for part in parts], 1)
    is_drawn = any(part.probs_BKV is not None for part in parts)
    probs_BKV = torch.cat([law_of(part, vocab_size) for part in parts], 1) if is_drawn else None
    return Proposal(token_ids_BK, probs_BKV, torch.tensor(parents, dtype=torch.int64))


def law_of(proposal: Proposal, vocab_size: int) -> Tensor:
    """q of each draft, [B, K, V]; zeros where there is none."""
    has_draft_BK1 = (proposal.token_ids_BK >= 0)[..., None]
    if proposal.probs_BKV is not None:
        return torch.where(has_draft_BK1, proposal.probs_BKV, 0.0)
    token_ids_BK = proposal.token_ids_BK.clamp(0, vocab_size - 1)  # a token outside is no draft: `usable_drafts`
    return one_hot(token_ids_BK, vocab_size).float() * has_draft_BK1
