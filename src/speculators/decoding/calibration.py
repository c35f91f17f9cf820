"""What a drafter's own confidence is worth: P(accepted) fitted to what was accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


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
