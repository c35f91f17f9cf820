"""Measurements behind the adaptive draft length: acceptance per slot, cost of a round, calibration of confidence.

Timings are few and noisy, and those of draft lengths that are seldom used are old: `rising` makes one curve of them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class AcceptanceRates:
    """Conditional acceptance rates per slot, with exponential forgetting; and how often a slot had a draft.

    The prior weighs as much as `prior_tests` tests: as old tests are forgotten, a slot that was not tried for long
    returns to it, and is tried again if the prior makes it worthwhile. Rounds without drafts are forgotten only with
    the next draft: a drafter that was idle for long is expensive to call, and a mere prior is no reason to call it.
    """

    num_slots: int
    prior_rate: float = 0.6
    prior_tests: float = 2.0
    memory_rounds: float = 200.0
    """Rounds after which an observation counts 1/e."""
    num_rounds_without_drafts: int = 0
    """Rounds without drafts since the last one with drafts."""
    tested: list[float] = field(init=False)
    tried: list[float] = field(init=False)
    """Tests of a slot that had a draft."""
    accepted: list[float] = field(init=False)
    requested: list[float] = field(init=False)
    offered: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.tested, self.tried, self.accepted, self.requested, self.offered = (
            [0.0] * self.num_slots for _ in range(5)
        )

    def observe(self, num_requested: int, num_drafted: Sequence[int], num_accepted: Sequence[int]) -> None:
        """Record one round, by row: slots 0..accepted - 1 passed; the next, if any, failed or had no draft."""
        if num_requested == 0:
            self.num_rounds_without_drafts += 1
            return
        keep = math.exp(-(1 + self.num_rounds_without_drafts) / self.memory_rounds)
        self.num_rounds_without_drafts = 0
        for counts in (self.tested, self.tried, self.accepted, self.requested, self.offered):
            counts[:] = [count * keep for count in counts]
        for drafted, accepted in zip(num_drafted, num_accepted, strict=True):
            for slot in range(min(num_requested, self.num_slots)):
                self.requested[slot] += 1
                self.offered[slot] += slot < drafted
                if slot <= accepted:
                    self.tested[slot] += 1
                    self.tried[slot] += slot < drafted
                    self.accepted[slot] += slot < accepted

    def conditional(self) -> list[float]:
        return self._rates(self.tested)

    def when_offered(self) -> list[float]:
        """P(slot i accepted | it has a draft, the slots before it were accepted)."""
        return self._rates(self.tried)

    def _rates(self, tests: list[float]) -> list[float]:
        rates, rate = [], self.prior_rate
        for tested, accepted in zip(tests, self.accepted, strict=True):
            # the prior of a slot is the rate of the slot before it
            rate = (accepted + rate * self.prior_tests) / (tested + self.prior_tests)
            rates.append(rate)
        return rates

    def offers(self) -> list[float]:
        """P(a row has a draft in the slot | it was requested); 1 before the first request."""
        return [
            (offered + self.prior_tests) / (requested + self.prior_tests)
            for offered, requested in zip(self.offered, self.requested, strict=True)
        ]


# -- costs


@dataclass(frozen=True)
class CostModel:
    """Measured seconds of one round."""

    other_s: tuple[float, ...]
    """Drafting and bookkeeping, by K: other_s[0] is a round without drafts."""
    verify_s: Mapping[int, float]
    """The verifier, by tokens scored in one forward (rows times columns); linear between measured points and beyond."""

    def round_s(self, num_drafted: int, num_scored: float) -> float:
        return self.other_s[num_drafted] + interpolate(self.verify_s, num_scored)


def interpolate(points: Mapping[int, float], at: float) -> float:
    """Linear through the neighbouring points; outer segments are extended, but never below the smallest value seen."""
    known = sorted(points)
    if len(known) == 1:
        return points[known[0]]
    right = min(max(bisect.bisect_left(known, at), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    slope = (points[high] - points[low]) / (high - low)
    return max(points[low] + slope * (at - low), min(points.values()))


@dataclass
class CostMeter:
    """Running averages of costs: of the verifier by tokens scored (rows times columns), of all else by K."""

    weight: float = 0.2
    other_s: dict[int, float] = field(default_factory=dict)
    verify_s: dict[int, float] = field(default_factory=dict)
    """Both ordered by time of measurement, newest last."""

    def observe(self, num_drafted: int, num_scored: int, *, verify_s: float, other_s: float) -> None:
        self._blend(self.other_s, num_drafted, other_s)
        self._blend(self.verify_s, num_scored, verify_s)

    def _blend(self, costs: dict[int, float], at: int, new: float) -> None:
        known = costs.pop(at, new)
        costs[at] = known + self.weight * (min(new, 2 * known) - known)  # one slow round counts at most twice

    def model(self, max_num_tokens: int) -> CostModel | None:
        """Costs of K = 0..max_num_tokens; None until a round with drafts was measured."""
        if not any(num_drafted > 0 for num_drafted in self.other_s):
            return None
        points = rising(self.other_s if 0 in self.other_s else {0: 0.0, **self.other_s})
        return CostModel(tuple(interpolate(points, k) for k in range(max_num_tokens + 1)), rising(self.verify_s))


def rising(costs: Mapping[int, float]) -> dict[int, float]:
    """Costs made non-decreasing: where two measurements contradict that, the older moves to the newer (newest last).

    Without it a plain round that was measured once, slowly, would make drafts look free for ever."""
    risen: dict[int, float] = {}
    for at, seconds in reversed(list(costs.items())):
        least = max((value for other, value in risen.items() if other < at), default=0.0)
        most = min((value for other, value in risen.items() if other > at), default=math.inf)
        risen[at] = min(max(seconds, least), most)
    return risen


# -- confidence


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


def logit(prob: float) -> float:
    prob = min(max(prob, 1e-6), 1 - 1e-6)
    return math.log(prob / (1 - prob))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
