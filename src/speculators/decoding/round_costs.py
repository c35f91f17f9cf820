"""What a round costs, measured while decoding: the verifier by tokens scored, everything else by K.

Timings are few and noisy, and those of lengths that are seldom used are old: `rising` makes one curve of them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CostModel:
    """Measured seconds of one round."""

    other_s: tuple[float, ...]
    """Of drafting and bookkeeping, by K: other_s[0] is what remains when nothing is drafted."""
    verify_s: Mapping[int, float]
    """By tokens scored in one forward, rows times columns; linear between the measured points, and beyond them."""

    def round_s(self, num_drafted: int, num_scored: float) -> float:
        return self.other_s[num_drafted] + interpolate(self.verify_s, num_scored)


def interpolate(points: Mapping[int, float], at: float) -> float:
    """Linear through the neighbouring points; the outer segments go on; never below the smallest value seen."""
    known = sorted(points)
    if len(known) == 1:
        return points[known[0]]
    right = min(max(bisect.bisect_left(known, at), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    slope = (points[high] - points[low]) / (high - low)
    return max(points[low] + slope * (at - low), min(points.values()))


@dataclass
class CostMeter:
    """Running costs: of everything but the verifier by K, and of the verifier by tokens scored (rows times columns)."""

    weight: float = 0.2
    other_s: dict[int, float] = field(default_factory=dict)
    verify_s: dict[int, float] = field(default_factory=dict)
    """Both with what was measured last at the end."""

    def observe(self, num_drafted: int, num_scored: int, *, verify_s: float, other_s: float) -> None:
        self._blend(self.other_s, num_drafted, other_s)
        self._blend(self.verify_s, num_scored, verify_s)

    def _blend(self, costs: dict[int, float], at: int, new: float) -> None:
        known = costs.pop(at, new)
        costs[at] = known + self.weight * (min(new, 2 * known) - known)  # one slow round must not scare speculation off

    def model(self, most: int) -> CostModel | None:
        """Costs of K = 0..most; None until a round with drafts was measured."""
        if not any(num_drafted > 0 for num_drafted in self.other_s):
            return None
        points = rising(self.other_s if 0 in self.other_s else {0: 0.0, **self.other_s})
        return CostModel(tuple(interpolate(points, k) for k in range(most + 1)), rising(self.verify_s))


def rising(costs: Mapping[int, float]) -> dict[int, float]:
    """More never costs less: where measurements say so, the older one is moved to the newer (`costs`: newest last).

    Without it a plain round that was measured once, slowly, makes drafts look free for ever."""
    risen: dict[int, float] = {}
    for at, seconds in reversed(list(costs.items())):
        least = max((value for other, value in risen.items() if other < at), default=0.0)
        most = min((value for other, value in risen.items() if other > at), default=math.inf)
        risen[at] = min(max(seconds, least), most)
    return risen
