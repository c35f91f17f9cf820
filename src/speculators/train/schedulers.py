"""The learning rate as a pure function of the step: nothing to save but the step itself."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    kind: Literal["linear", "cosine", "none"]
    num_warmup_steps: int
    num_steps: int
    num_cosine_cycles: float = 0.5

    def scale(self, step: int) -> float:
        """Multiplier of the peak rate at this step (0 = the first). Warm-up rises to 1, then decays to 0."""
        if step < self.num_warmup_steps:
            return (step + 1) / (self.num_warmup_steps + 1)
        if self.kind == "none":
            return 1.0
        progress = min(1.0, (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps))
        if self.kind == "linear":
            return 1.0 - progress
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * self.num_cosine_cycles * progress)))


def make_schedule(
    kind: Literal["linear", "cosine", "none"],
    num_run_steps: int,
    *,
    total_steps: int | None = None,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    num_cosine_cycles: float = 0.5,
) -> Schedule:
    """Explicit totals win over the run's own length, warm-up steps over the ratio, the ratio over 1 %."""
    num_steps = total_steps if total_steps is not None else num_run_steps
    if warmup_ratio is not None and not 0.0 <= warmup_ratio <= 1.0:
        raise ValueError(f"scheduler_warmup_ratio={warmup_ratio} is a share of all steps, so it must be within 0..1")
    if warmup_steps is not None and warmup_ratio is not None:
        warnings.warn("both scheduler_warmup_steps and scheduler_warmup_ratio are given: the steps count", stacklevel=2)
    if warmup_steps is None:
        warmup_steps = int(num_steps * warmup_ratio) if warmup_ratio is not None else num_steps // 100
    return Schedule(kind, warmup_steps, num_steps, num_cosine_cycles)
