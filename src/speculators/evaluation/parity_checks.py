"""The checks of the parity gate: each says what it compared, and a failure names the first thing that differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from speculators.draft_vocab import DraftVocabMixin
from speculators.evaluation.losslessness import first_difference
from speculators.evaluation.parity_rounds import RoundsCompared
from speculators.model import SpeculatorModel
from speculators.nn.draft_vocab import verifier_ids

MAX_TIE_SHARE = 0.1
"""More ties than this among the drafts, and nothing can be told from them."""
ACCEPTED_TOLERANCE = 0.03
"""Accepted drafts in vLLM and in our engine differ by ties alone: over a few hundred rounds by less than this share."""

IsTie = Callable[[int, int, int], bool]
"""(prompt, position, other token) -> whether the verifier cannot tell that token from plain decoding's."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool | None
    """None: it could not be made; `detail` says why."""
    detail: str


def vocabulary_check(model: SpeculatorModel) -> Check:
    """`d2t`, by which drafts become tokens, against `t2d`, by which the targets of training are chosen."""
    name = "draft vocabulary: d2t = t2d"
    if not isinstance(model, DraftVocabMixin) or model.t2d is None or model.d2t is None:
        return Check(name, None, "drafts over the whole vocabulary")
    trained, drafted = model.t2d.nonzero().flatten(), verifier_ids(model.d2t)
    if torch.equal(trained, drafted):
        return Check(name, True, f"{len(trained)} of {model.verifier_vocab_size} tokens")
    if len(trained) != len(drafted):
        return Check(name, False, f"t2d keeps {len(trained)} tokens, d2t names {len(drafted)}")
    index = int((trained != drafted).nonzero()[0])
    detail = (
        f"draft id {index} is token {int(trained[index])} in training (t2d) and {int(drafted[index])} when drafting "
        "(draft id + d2t); d2t must hold offsets"
    )
    return Check(name, False, detail)


def drafts_tokens(model: SpeculatorModel) -> bool:
    """Whether every draft id stands for a token of the verifier: otherwise nothing can be replayed."""
    if not isinstance(model, DraftVocabMixin) or model.d2t is None:
        return True
    ids = verifier_ids(model.d2t)
    return bool(((ids >= 0) & (ids < model.verifier_vocab_size)).all())


def drafts_check(rounds: RoundsCompared) -> Check:
    name = "drafts: training = engine"
    if not rounds.is_comparable:
        return Check(name, None, "the algorithm has no draft_logits: its training forward cannot be asked")
    if rounds.first_difference is not None:
        differing = f"{rounds.num_differing} of {rounds.num_drafts} drafts differ"
        return Check(name, False, f"{differing}; first: {rounds.first_difference}")
    if rounds.num_drafts == 0:
        return Check(name, False, "the proposer drafted nothing")
    ties = f"{rounds.num_ties} ties" + (f" (gap <= {rounds.largest_tie:.2g})" if rounds.num_ties else "")
    detail = f"{rounds.num_drafts} drafts of {rounds.num_rounds} rounds, {ties}"
    if rounds.num_ties > MAX_TIE_SHARE * rounds.num_drafts:
        return Check(name, False, f"{detail}: so many ties that nothing can be told")
    return Check(name, True, detail)


def text_check(name: str, plain: Sequence[list[int]], found: Sequence[list[int]], is_tie: IsTie) -> Check:
    """Token for token. Where the verifier cannot tell two tokens apart either text is its own: counted, not compared
    further."""
    num_ties = 0
    for number, (expected, given) in enumerate(zip(plain, found, strict=True)):
        at = first_difference(expected, given)
        if at is None:
            continue
        if at >= min(len(expected), len(given)) or not is_tie(number, at, given[at]):
            says = f"{given[at : at + 1]}, plain decoding {expected[at : at + 1]}"
            return Check(name, False, f"prompt {number}, token {at}: {says}")
        num_ties += 1
    ties = f", {num_ties} part ways at a tie" if num_ties else ""
    return Check(name, True, f"{len(found)} answers, {sum(map(len, found))} tokens{ties}")


def accepted_check(name: str, ours: Sequence[int], theirs: Sequence[int], num_drafts: int) -> Check:
    """Within `ACCEPTED_TOLERANCE`, or one round's drafts where that is more."""
    allowed = max(ACCEPTED_TOLERANCE * sum(ours), num_drafts)
    num_equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    detail = (
        f"{sum(theirs)} accepted in vLLM, {sum(ours)} in the engine (allowed: +-{allowed:.0f}); the same for "
        f"{num_equal} of {len(ours)} prompts"
    )
    return Check(name, abs(sum(ours) - sum(theirs)) <= allowed, detail)
