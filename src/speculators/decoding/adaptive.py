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

from speculators.interfaces import Proposal


@dataclass(frozen=True)
class CostModel:
    """Measured seconds of one round."""

    draft_s: tuple[float, ...]
    """By K: draft_s[0] is what remains when nothing is drafted."""
    verify_s: Mapping[int, float]
    """By tokens scored in one forward, over all rows; linear between the measured points, and beyond them."""
    overhead_s: float = 0.0

    def round_s(self, num_drafted: int, num_scored: int) -> float:
        return self.draft_s[num_drafted] + interpolate(self.verify_s, num_scored) + self.overhead_s


def interpolate(points: Mapping[int, float], at: int) -> float:
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


def best_num_tokens(conditional_rates: Sequence[float], cost: CostModel, batch_size: int = 1) -> int:
    """The fastest K in 0..len(rates); the smallest of equals. A scan: measured costs need not be convex."""

    def speed(num_tokens: int) -> float:
        tokens = expected_tokens(conditional_rates[:num_tokens])
        return tokens / cost.round_s(num_tokens, batch_size * (num_tokens + 1))

    return max(range(min(len(conditional_rates), len(cost.draft_s) - 1) + 1), key=lambda k: (speed(k), -k))


def lengths_within_budget(confidence_BK: Tensor, cost: CostModel) -> Tensor:
    """int64 [B]: how many drafts of each row to verify, so that the batch is fastest. Point-mass drafts only.

    Slots are ranked by survival (never above the slot before it, so each row keeps a prefix); all drafts are paid for,
    verification by the token. A confidence below 0 marks a slot without a draft.
    """
    B, K = confidence_BK.shape
    survival_BK = confidence_BK.double().clamp_min(0).cumprod(-1)
    ranked_N, order_N = survival_BK.flatten().sort(descending=True, stable=True)
    tokens = B + torch.cat([ranked_N.new_zeros(1), ranked_N.cumsum(0)])
    num_drafted = min(K, len(cost.draft_s) - 1)
    round_s = torch.tensor([cost.round_s(num_drafted, B + extra) for extra in range(B * K + 1)], dtype=torch.float64)
    budget = int((tokens.cpu() / round_s).argmax())
    kept_N = torch.zeros(B * K, dtype=torch.int64, device=confidence_BK.device)
    kept_N[order_N[:budget]] = 1
    return (kept_N.view(B, K) * (survival_BK > 0)).sum(-1)


@dataclass
class AcceptanceRates:
    """Conditional rates per slot from the rounds so far, the past fading out.

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

    def __post_init__(self) -> None:
        self.tested, self.accepted = [0.0] * self.num_slots, [0.0] * self.num_slots

    def observe(self, num_drafted: Sequence[int], num_accepted: Sequence[int]) -> None:
        """One round, by row: slots 0..accepted - 1 passed, the next one failed unless all passed."""
        keep = math.exp(-1 / self.memory_rounds)
        self.tested = [tested * keep for tested in self.tested]
        self.accepted = [accepted * keep for accepted in self.accepted]
        for drafted, accepted in zip(num_drafted, num_accepted, strict=True):
            for slot in range(min(drafted, accepted + 1, self.num_slots)):
                self.tested[slot] += 1
                self.accepted[slot] += slot < accepted

    def conditional(self) -> list[float]:
        rates, rate = [], self.prior_rate
        for tested, accepted in zip(self.tested, self.accepted, strict=True):
            # an untested slot is taken for as good as the one before it
            rate = (accepted + rate * self.prior_tests) / (tested + self.prior_tests)
            rates.append(rate)
        return rates


@dataclass
class ConfidenceFit:
    """P(accepted) from the draft's log-odds: a logistic curve refitted to the last observations."""

    slope: float = 0.5
    bias: float = -0.2
    refit_every: int = 100
    window: int = 1000
    log_odds: list[float] = field(default_factory=list)
    outcomes: list[bool] = field(default_factory=list)

    def rate(self, top_prob: float) -> float:
        return _sigmoid(self.slope * logit(top_prob) + self.bias)

    def observe(self, top_prob: float, accepted: bool) -> None:
        self.log_odds.append(logit(top_prob))
        self.outcomes.append(accepted)
        if len(self.outcomes) % self.refit_every == 0:
            del self.log_odds[: -self.window], self.outcomes[: -self.window]
            self.slope, self.bias = fit_logistic(self.log_odds, self.outcomes, self.slope, self.bias)


def fit_logistic(
    inputs: Sequence[float], outcomes: Sequence[bool], slope: float, bias: float, *, ridge: float = 1.0, steps: int = 8
) -> tuple[float, float]:
    """Newton steps on the log-likelihood, pulled towards the starting values (so that it exists when all succeed)."""
    start = (slope, bias)
    for _ in range(steps):
        rates = [_sigmoid(slope * x + bias) for x in inputs]
        errors = [float(y) - rate for y, rate in zip(outcomes, rates, strict=True)]
        weights = [rate * (1 - rate) for rate in rates]
        gradient_slope = sum(e * x for e, x in zip(errors, inputs, strict=True)) - ridge * (slope - start[0])
        gradient_bias = sum(errors) - ridge * (bias - start[1])
        ss = sum(w * x * x for w, x in zip(weights, inputs, strict=True)) + ridge
        sb = sum(w * x for w, x in zip(weights, inputs, strict=True))
        bb = sum(weights) + ridge
        determinant = ss * bb - sb * sb
        slope += (bb * gradient_slope - sb * gradient_bias) / determinant
        bias += (ss * gradient_bias - sb * gradient_slope) / determinant
    return slope, bias


@dataclass
class CostMeter:
    """Running costs by K and by tokens scored."""

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
    never be noticed), so seldom that it costs `probe_share` of the time. A new K must be `margin` faster than the
    current one, plain decoding excepted: noise is no reason to change.
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
        if self.num_rounds <= self.most + 1:
            return self.most + 1 - self.num_rounds  # most, most - 1, ..., 0
        cost = self.costs.model(self.most)
        if cost is not None:
            extra = cost.round_s(self.most, batch_size * (self.most + 1)) / cost.round_s(0, batch_size)
            if (self.num_rounds - self.last_probe) * self.probe_share > extra:
                self.last_probe = self.num_rounds
                return self.most
            rates = self.rates.conditional()
            best = best_num_tokens(rates, cost, batch_size)

            def speed(k: int) -> float:
                return expected_tokens(rates[:k]) / cost.round_s(k, batch_size * (k + 1))

            if best == 0 or speed(best) > speed(self.current) * (1 + self.margin):
                self.current = best
        return self.current

    def shorten(self, proposal: Proposal) -> Proposal:
        """Chains of point masses only: a draft that was drawn may not be dropped for what it is."""
        is_point_mass_chain = proposal.probs_BKV is None and proposal.parents_K is None
        if proposal.confidence_BK is None or not is_point_mass_chain:
            return proposal
        self.confidence_by_row = proposal.confidence_BK.tolist()
        cost = self.costs.model(self.most)
        if cost is None or self.num_rounds <= self.most + 1:
            return proposal
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
        self.rates.observe(depths, num_accepted)
        self.costs.observe(
            self.asked, sum(depths) + len(depths), draft_s=draft_s, verify_s=verify_s, overhead_s=overhead_s
        )
        if self.confidence_by_row is not None:
            for row, depth, accepted in zip(rows, depths, num_accepted, strict=True):
                for slot in range(min(depth, accepted + 1)):
                    self.fit.observe(self.confidence_by_row[row][slot], slot < accepted)


def logit(prob: float) -> float:
    prob = min(max(prob, 1e-6), 1 - 1e-6)
    return math.log(prob / (1 - prob))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
