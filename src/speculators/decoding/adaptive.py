"""How many tokens to draft: expected tokens a round against its measured cost. K = 0, plain decoding, always competes.

Shapes: B sequences, K draft slots. Conditional rate a_i = P(slot i accepted | the slots before it were); survival =
their running product; expected tokens of a round = 1 + sum of survivals.

    speed(K) = (1 + sum_{k<=K} prod_{i<=k} a_i) / (draft_s(K) + verify_s(tokens scored) + overhead_s)

Lossless adaptation looks only at what precedes the token it decides about. Whether slot i is drafted may depend on the
context, on d_1..d_{i-1} and on the LAW q_i (its largest probability, say), never on the token drawn from q_i: keeping
only well-liked draws changes the law of what is verified. For point-mass drafts d_i is a function of the context, so
anything known before verification may be used (`lengths_within_budget`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculators.decoding.calibration import ConfidenceFit
from speculators.interfaces import Proposal


@dataclass(frozen=True)
class CostModel:
    """Measured seconds of one round."""

    draft_s: tuple[float, ...]
    """By K: draft_s[0] is what remains when nothing is drafted."""
    verify_s: Mapping[int, float]
    """By tokens scored in one forward, rows times columns; linear between the measured points, and beyond them."""
    overhead_s: float = 0.0

    def round_s(self, num_drafted: int, num_scored: float) -> float:
        return self.draft_s[num_drafted] + interpolate(self.verify_s, num_scored) + self.overhead_s


def interpolate(points: Mapping[int, float], at: float) -> float:
    """Linear through the neighbouring points; the outer segments go on; never below the smallest value seen."""
    known = sorted(points)
    if len(known) == 1:
        return points[known[0]]
    right = min(max(bisect.bisect_left(known, at), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    slope = (points[high] - points[low]) / (high - low)
    return max(points[low] + slope * (at - low), min(points.values()))


def expected_tokens(conditional_rates: Sequence[float]) -> float:
    """Tokens a round emits on average, the recovered or bonus token included."""
    survival, total = 1.0, 1.0
    for rate in conditional_rates:
        survival *= rate
        total += survival
    return total


def expected_columns(offer_rates: Sequence[float], batch_size: int) -> float:
    """Columns a forward scores on average: slot i is one of them when any of the rows has a draft there."""
    return 1.0 + sum(1.0 - (1.0 - rate) ** batch_size for rate in offer_rates)


def speeds_by_num_tokens(
    conditional_rates: Sequence[float], cost: CostModel, batch_size: int = 1, offer_rates: Sequence[float] | None = None
) -> list[float]:
    """Tokens a second of each row, by K. `offer_rates`: P(a row has a draft in slot i, which was asked for), or 1."""
    offer_rates = offer_rates if offer_rates is not None else [1.0] * len(conditional_rates)
    most = min(len(conditional_rates), len(cost.draft_s) - 1)
    return [
        expected_tokens(conditional_rates[:k])
        / cost.round_s(k, batch_size * expected_columns(offer_rates[:k], batch_size))
        for k in range(most + 1)
    ]


def best_num_tokens(speeds: Sequence[float]) -> int:
    """The fastest K, the smallest of equals. A scan: measured costs need not be convex."""
    return max(range(len(speeds)), key=lambda k: (speeds[k], -k))


def lengths_within_budget(confidence_BK: Tensor, cost: CostModel) -> Tensor:
    """int64 [B]: how many drafts of each row to verify, so that the batch is fastest. Point-mass drafts only.

    A forward is as wide as its longest row, so what is chosen is the width; all drafts are paid for. A confidence below
    0 marks a slot without a draft.
    """
    B, K = confidence_BK.shape
    survival_BK = confidence_BK.double().clamp_min(0).cumprod(-1)
    emitted_K = B + survival_BK.sum(0).cumsum(0).cpu()
    tokens = torch.cat([emitted_K.new_full((1,), B), emitted_K])
    num_drafted = min(K, len(cost.draft_s) - 1)
    round_s = torch.tensor([cost.round_s(num_drafted, B * (1 + width)) for width in range(K + 1)], dtype=torch.float64)
    width = int((tokens / round_s).argmax())
    return (survival_BK[:, :width] > 0).sum(-1)


@dataclass
class AcceptanceRates:
    """Conditional rates per slot from the rounds so far, the past fading out; and how often a slot had a draft.

    What is left is filled up by the prior, weighted as `prior_tests` tests: a slot that was not tried for long is
    judged by it again, so it will be tried if the prior makes it worth while.
    """

    num_slots: int
    prior_rate: float = 0.6
    prior_tests: float = 2.0
    memory_rounds: float = 200.0
    """Rounds after which an observation counts 1/e."""
    tested: list[float] = field(init=False)
    accepted: list[float] = field(init=False)
    asked: list[float] = field(init=False)
    offered: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.tested, self.accepted, self.asked, self.offered = ([0.0] * self.num_slots for _ in range(4))

    def observe(self, num_asked: int, num_drafted: Sequence[int], num_accepted: Sequence[int]) -> None:
        """One round, by row: slots 0..accepted - 1 passed, the next one failed (or had no draft) unless all passed."""
        keep = math.exp(-1 / self.memory_rounds)
        for counts in (self.tested, self.accepted, self.asked, self.offered):
            counts[:] = [count * keep for count in counts]
        for drafted, accepted in zip(num_drafted, num_accepted, strict=True):
            for slot in range(min(num_asked, self.num_slots)):
                self.asked[slot] += 1
                self.offered[slot] += slot < drafted
                if slot <= accepted:
                    self.tested[slot] += 1
                    self.accepted[slot] += slot < accepted

    def conditional(self) -> list[float]:
        rates, rate = [], self.prior_rate
        for tested, accepted in zip(self.tested, self.accepted, strict=True):
            # an untested slot is taken for as good as the one before it
            rate = (accepted + rate * self.prior_tests) / (tested + self.prior_tests)
            rates.append(rate)
        return rates

    def offers(self) -> list[float]:
        """P(a row has a draft in the slot, when asked for it); 1 before it was."""
        return [
            (offered + self.prior_tests) / (asked + self.prior_tests)
            for offered, asked in zip(self.offered, self.asked, strict=True)
        ]


@dataclass
class CostMeter:
    """Running costs by K and by tokens scored (rows times columns)."""

    weight: float = 0.2
    draft_s: dict[int, float] = field(default_factory=dict)
    verify_s: dict[int, float] = field(default_factory=dict)
    overhead_s: float | None = None

    def observe(
        self, num_drafted: int, num_scored: int, *, draft_s: float, verify_s: float, overhead_s: float = 0.0
    ) -> None:
        self.draft_s[num_drafted] = self._blend(self.draft_s.get(num_drafted), draft_s)
        self.verify_s[num_scored] = self._blend(self.verify_s.get(num_scored), verify_s)
        self.overhead_s = self._blend(self.overhead_s, overhead_s)

    def _blend(self, known: float | None, new: float) -> float:
        if known is None:
            return new
        return known + self.weight * (min(new, 2 * known) - known)  # one slow round must not scare speculation off

    def model(self, most: int) -> CostModel | None:
        """Costs of K = 0..most; None until a round with drafts was measured."""
        drafted = {k: seconds for k, seconds in self.draft_s.items() if k > 0}
        if not drafted:
            return None
        points = {0: self.draft_s.get(0, 0.0), **drafted}
        return CostModel(tuple(interpolate(points, k) for k in range(most + 1)), self.verify_s, self.overhead_s or 0.0)


@dataclass
class AdaptiveLength:
    """K for each round from what the rounds before it showed. Use as `num_tokens(batch_size)`; then `observe`.
    Between the two, `shorten` drops drafts whose own confidence says that verifying them does not pay.

    It starts with one round of each K, and drafts at full length now and then (else a drafter that got better would
    never be noticed): at first after twice as many rounds each time, for its start says little, then so seldom that it
    costs `probe_share` of the time. A new K must be `margin` faster than the current one, plain decoding excepted:
    noise is no reason to change.
    """

    most: int
    probe_share: float = 0.01
    margin: float = 0.02
    rates: AcceptanceRates = field(init=False)
    costs: CostMeter = field(default_factory=CostMeter)
    fit: ConfidenceFit = field(default_factory=ConfidenceFit)
    confidence_by_row: list[list[float]] | None = None
    """What the drafter thought of this round's drafts."""
    asked: int = 0
    num_rounds: int = 0
    last_probe: int = 0
    is_probe: bool = False
    current: int = field(init=False)

    def __post_init__(self) -> None:
        self.rates = AcceptanceRates(self.most)
        self.current = self.most

    def num_tokens(self, batch_size: int) -> int:
        self.confidence_by_row = None
        self.asked = self._choose(batch_size)
        return self.asked

    def _choose(self, batch_size: int) -> int:
        self.num_rounds += 1
        self.is_probe = False
        if self.num_rounds <= self.most + 1:
            return self.most + 1 - self.num_rounds  # most, most - 1, ..., 0
        cost = self.costs.model(self.most)
        if cost is not None:
            extra = cost.round_s(self.most, batch_size * (self.most + 1)) / cost.round_s(0, batch_size)
            since = self.num_rounds - self.last_probe
            if since * self.probe_share > extra or since > max(self.last_probe, self.most + 1):
                self.last_probe, self.is_probe = self.num_rounds, True
                return self.most
            speeds = speeds_by_num_tokens(self.rates.conditional(), cost, batch_size, self.rates.offers())
            best = best_num_tokens(speeds)
            if best == 0 or speeds[best] > speeds[self.current] * (1 + self.margin):
                self.current = best
        return self.current

    def shorten(self, proposal: Proposal) -> Proposal:
        """Chains of point masses only: a draft that was drawn may not be dropped for what it is."""
        is_point_mass_chain = proposal.probs_BKV is None and proposal.parents_K is None
        if proposal.confidence_BK is None or not is_point_mass_chain:
            return proposal
        self.confidence_by_row = proposal.confidence_BK.tolist()
        cost = self.costs.model(self.most)
        if cost is None or self.num_rounds <= self.most + 1 or self.is_probe:
            return proposal  # verified as they are: what is never verified cannot be found to be better than it says
        rate_BK = torch.tensor([[self.fit.rate(prob) for prob in row] for row in self.confidence_by_row])
        length_B = lengths_within_budget(rate_BK.masked_fill(proposal.token_ids_BK.cpu() < 0, -1.0), cost)
        length_B1 = length_B[:, None].to(proposal.token_ids_BK.device)
        slot_K = torch.arange(int(length_B.max()), device=length_B1.device)
        token_ids_BK = proposal.token_ids_BK[:, : len(slot_K)].masked_fill(slot_K >= length_B1, -1)
        return Proposal(token_ids_BK)

    def observe(
        self,
        depths: Sequence[int],
        num_accepted: Sequence[int],
        *,
        draft_s: float,
        verify_s: float,
        overhead_s: float = 0.0,
        rows: Sequence[int] = (),
    ) -> None:
        """One round: of each request how deep the drafts went that were verified, how many were accepted and which row
        it has; and what the round cost. A tree counts as deep as it is: it costs the same whenever it is that deep."""
        self.rates.observe(self.asked, depths, num_accepted)
        num_scored = len(depths) * (1 + max(depths))
        self.costs.observe(self.asked, num_scored, draft_s=draft_s, verify_s=verify_s, overhead_s=overhead_s)
        if self.confidence_by_row is not None:
            for row, depth, accepted in zip(rows, depths, num_accepted, strict=True):
                for slot in range(min(depth, accepted + 1)):
                    self.fit.observe(self.confidence_by_row[row][slot], slot < accepted)
