"""Compares for the parity gate: rounds of the engine beside the training forward, and texts. A failed check names the
first thing that differs.

Shapes: T tokens, L of them known when drafting, K drafts, V vocabulary, D width of states.

    text the engine emitted   x0 .. x[L-1] | x[L] ...            one forward of the verifier gives its states, as in
    states when drafting      g0 .. g[L-2]                       training; row L - 1 and later were not known: zeros
    training forward          x0 .. x[L-1]   d1 .. dK            what it answers in the places of d1 .. dK (teacher
                                                                 forcing) must be d1 .. dK
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from speculators.decoding.request import RequestOutput
from speculators.draft_vocab import DraftVocabMixin
from speculators.evaluation.statistics import first_difference
from speculators.interfaces import Committed, DraftSampling, Proposal, Proposer, VerifierStates
from speculators.model import SpeculatorModel
from speculators.nn.draft_tokens import verifier_ids

TIE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Two logits closer than this share of the largest one are a tie: sums in another order may swap them."""
LOW_PRECISION_TIE_TOLERANCE = 5e-2
MAX_TIE_SHARE = 0.1
"""More ties than this among the drafts, and nothing can be told from them."""
ACCEPTED_TOLERANCE = 0.03
"""Accepted drafts in vLLM and in our engine differ by ties alone: over a few hundred rounds by less than this share."""

IsTie = Callable[[int, int, int], bool]
"""(prompt, position, other token) -> whether the verifier cannot tell that token from plain decoding's."""


def tie_tolerance(dtype: torch.dtype) -> float:
    return TIE_TOLERANCE.get(dtype, LOW_PRECISION_TIE_TOLERANCE)


@dataclass
class DraftedText:
    """One request as the proposer saw it."""

    token_ids: list[int] = field(default_factory=list)
    rounds: list[tuple[int, list[int]]] = field(default_factory=list)
    """(tokens known, drafts) of each round in which something was drafted."""


class RecordingProposer:
    """A proposer whose drafts are kept, with the text they were made after."""

    def __init__(self, inner: Proposer, vocab_size: int):
        self.inner, self.capture, self.vocab_size = inner, inner.capture, vocab_size
        self.texts: list[DraftedText] = []
        self.text_of_row: dict[int, DraftedText] = {}

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        counts = zip(committed.num_new_B.tolist(), committed.num_committed_B.tolist(), strict=True)
        for row, (new, total) in enumerate(counts):
            if 0 < new == total:
                self.text_of_row[row] = DraftedText()
                self.texts.append(self.text_of_row[row])
            if new:
                self.text_of_row[row].token_ids += committed.token_ids_BT[row, :new].tolist()
        proposal = self.inner.propose(committed, num_tokens, sampling)
        for row, drafts in enumerate(proposal.token_ids_BK.tolist()):
            drafts = [token_id for token_id in drafts if token_id >= 0]
            if drafts:
                text = self.text_of_row[row]
                text.rounds.append((len(text.token_ids), drafts))
        # a token outside the vocabulary is a finding of the gate, not a crash of the verifier's embedding
        is_token_BK = proposal.token_ids_BK < self.vocab_size
        return replace(proposal, token_ids_BK=proposal.token_ids_BK.where(is_token_BK.cummin(1).values, -1))


@dataclass
class RoundsCompared:
    """Drafts that were compared, and the first that differs."""

    num_rounds: int = 0
    num_drafts: int = 0
    num_ties: int = 0
    largest_tie: float = 0.0
    num_differing: int = 0
    first_difference: str | None = None
    is_comparable: bool = True
    """False: the algorithm has no training forward to compare with."""


@torch.no_grad()
def compare_rounds(
    model: SpeculatorModel, texts: Sequence[DraftedText], states: Sequence[VerifierStates], dtype: torch.dtype
) -> RoundsCompared:
    """The training forward of `model` against every recorded round. `dtype` is the engine's."""
    found = RoundsCompared()
    for number, (text, of_text) in enumerate(zip(texts, states, strict=True)):
        for index, (num_known, drafts) in enumerate(text.rounds):
            if num_known < 2:
                continue  # no state is known yet: drafters that draft all the same are not trained on it
            logits_KV = model.draft_logits(states_when_drafting(of_text, num_known, drafts), len(drafts))
            if logits_KV is None:
                return RoundsCompared(is_comparable=False)
            where = f"prompt {number}, round {index} (after {num_known} tokens)"
            compare_drafts(found, where, logits_KV.float(), drafts, tie_tolerance(dtype))
            found.num_rounds += 1
    return found


def compare_drafts(
    found: RoundsCompared, where: str, logits_KV: Tensor, drafts: Sequence[int], tolerance: float
) -> None:
    """Add one round. Slots the training forward does not answer would be a bug, and count as differing."""
    vocab_size = logits_KV.shape[-1]
    for k, drafted in enumerate(drafts):
        found.num_drafts += 1
        if k >= len(logits_KV) or not 0 <= drafted < vocab_size:
            differs, says = True, "nothing" if k >= len(logits_KV) else f"a token of 0..{vocab_size - 1}"
        else:
            best = int(logits_KV[k].argmax())
            gap = float(logits_KV[k, best] - logits_KV[k, drafted])
            differs = not gap <= tolerance * max(1.0, abs(float(logits_KV[k, best])))
            says = f"{best} ({gap:.3g} above it)" if gap == gap else "scores that are not finite"
            if not differs and drafted != best:
                found.num_ties += 1
                found.largest_tie = max(found.largest_tie, gap)
        if differs:
            found.num_differing += 1
            if found.first_difference is None:
                found.first_difference = f"{where}, draft {k + 1}: drafted {drafted}, training says {says}"


def states_when_drafting(states: VerifierStates, num_known: int, drafts: Sequence[int]) -> VerifierStates:
    """The known tokens and their drafts, with the states that were known; the others are zeros."""
    num_states, num_tokens = num_known - 1, num_known + len(drafts)

    def known(of_text: Tensor | None) -> Tensor | None:
        if of_text is None:
            return None
        rows = of_text.new_zeros(num_tokens, of_text.shape[1], dtype=torch.float32)
        rows[:num_states] = of_text[:num_states]
        return rows

    token_ids_T = torch.cat((states.token_ids_T[:num_known], states.token_ids_T.new_tensor(list(drafts))))
    return VerifierStates(token_ids_T, known(states.aux_TD), known(states.last_hidden_TH))


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


def finite_check(outputs: Sequence[RequestOutput]) -> Check:
    """Two empty answers of a verifier without numbers are equal too."""
    name = "the verifier's scores are finite"
    errors = [output.error for output in outputs if output.error is not None]
    if errors:
        return Check(name, False, f"{len(errors)} of {len(outputs)} requests ended so; first: {errors[0]}")
    return Check(name, True, f"{len(outputs)} requests")


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
