"""Uncertainty by resampling prompts. Pure numpy.

Shapes: N prompts (or groups of prompts measured together), R resamples.
Every figure of a report is a ratio of sums over prompts, so the bootstrap resamples prompts and recomputes the ratio:
tokens of one prompt depend on each other, prompts do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure and its bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def bootstrap(
    counts: Mapping[str, Sequence[float]],
    figure: Callable[[dict[str, np.ndarray]], np.ndarray],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """`figure` of the sums of `counts` over prompts, with its percentile interval.

    counts: name -> one number a prompt. figure: maps the sums (arrays of shape [R]) to the figure (shape [R]).
    """
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in counts.items()}
    num_prompts = len(next(iter(columns.values())))
    if num_prompts == 0:
        raise ValueError("nothing was measured: a report needs at least one prompt")
    value = float(figure({name: column_N.sum(keepdims=True) for name, column_N in columns.items()})[0])
    picks_RN = np.random.default_rng(seed).integers(0, num_prompts, size=(num_resamples, num_prompts))
    with np.errstate(divide="ignore", invalid="ignore"):
        figures_R = figure({name: column_N[picks_RN].sum(axis=1) for name, column_N in columns.items()})
    figures_R = figures_R[np.isfinite(figures_R)]
    if figures_R.size == 0:
        return Estimate(value, value, value)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(figures_R, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
