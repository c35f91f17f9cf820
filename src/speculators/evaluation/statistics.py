"""Uncertainty by resampling prompts, and whether two sets of answers follow one law. Pure numpy.

Shapes: N prompts (or groups of prompts measured together), R resamples; S answers drawn of one prompt (half plain,
half speculative), T tokens of an answer, P permutations.
Every figure of a report is a ratio of sums over prompts, so the bootstrap resamples prompts and recomputes the ratio:
tokens of one prompt depend on each other, prompts do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
HALF_INTERVAL = 1.96
"""Half of a 95 % interval, in standard deviations."""
FURTHER = (2, 4)
"""Times the largest size for which a trend is followed. Beyond, a line through the past says nothing."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def is_above(self, other: float) -> bool:
        """Whether all of the interval is. One measurement has no interval: its resamples are itself."""
        return self.high > self.low > other

    def is_below(self, other: float) -> bool:
        return self.low < self.high < other


def bootstrap(
    counts: Mapping[str, Sequence[float] | np.ndarray],
    figure: Callable[[dict[str, np.ndarray]], np.ndarray],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """`figure` of the sums of `counts` over prompts, with its percentile interval.

    counts: name -> one number per prompt. figure: maps the sums (arrays of shape [R]) to the figure (shape [R]).
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


def count_identical(plain: Sequence[Sequence[int]], speculative: Sequence[Sequence[int]]) -> int:
    return sum(first_difference(a, b) is None for a, b in zip(plain, speculative, strict=True))


def first_difference(plain: Sequence[int], speculative: Sequence[int]) -> int | None:
    """Position of the first token that differs (a missing token differs); None when the sequences are equal."""
    for position, (a, b) in enumerate(zip(plain, speculative, strict=False)):
        if a != b:
            return position
    return None if len(plain) == len(speculative) else min(len(plain), len(speculative))


def two_sample_p_value(
    plain: Sequence[Sequence[Sequence[int]]],
    speculative: Sequence[Sequence[Sequence[int]]],
    *,
    num_permutations: int = 2000,
    seed: int = 0,
) -> float:
    """Chance of a difference this large if both were drawn from one law. [prompt][answer] -> token ids.

    A permutation test, exact for any vocabulary and any number of answers: within each prompt the labels plain and
    speculative are shuffled. The statistic is the squared mean difference under the kernel of `similarity`.
    """
    rng = np.random.default_rng(seed)
    observed, shuffled_P = 0.0, np.zeros(num_permutations)
    for ours, theirs in zip(plain, speculative, strict=True):
        similarity_SS = similarity([*ours, *theirs])
        sign_S = np.concatenate([np.full(len(ours), 1 / len(ours)), np.full(len(theirs), -1 / len(theirs))])
        signs_PS = rng.permuted(np.tile(sign_S, (num_permutations, 1)), axis=1)
        observed += sign_S @ similarity_SS @ sign_S
        shuffled_P += np.einsum("ps,st,pt->p", signs_PS, similarity_SS, signs_PS, optimize=True)
    return float((1 + (shuffled_P >= observed * (1 - 1e-9)).sum()) / (1 + num_permutations))


def similarity(answers: Sequence[Sequence[int]]) -> np.ndarray:
    """[S, S]: positions at which two answers agree, plus the length of what they begin with alike.

    The first part sees wrong frequencies of single tokens, the second wrong frequencies of sequences.
    """
    length = max(map(len, answers), default=0)
    ids_ST = np.array([[*answer, *[-1] * (length - len(answer))] for answer in answers])
    agree_SST = ids_ST[:, None] == ids_ST[None]
    return (agree_SST.sum(-1) + np.cumprod(agree_SST, axis=-1).sum(-1)).astype(np.float64)


@dataclass(frozen=True)
class Trend:
    """A line through figures against the logarithm of their sizes."""

    per_doubling: Estimate
    """What twice the size adds."""
    sizes: tuple[int, ...]
    """Those for which the line predicts."""
    predicted: tuple[Estimate, ...]


def trend_of(sizes: Sequence[int], figures: Sequence[Estimate], most: float = np.inf) -> Trend:
    """Least squares, again and again with figures drawn from their intervals. What the line misses of them is drawn
    too: few points that lie off a line must not look certain. Needs three sizes; `most`: what no figure exceeds.
    """
    design_N2 = np.stack([np.ones(len(sizes)), np.log(sizes)], axis=1)
    solve_2N = np.linalg.pinv(design_N2)
    figure_N = np.array([figure.value for figure in figures])
    line_2 = solve_2N @ figure_N
    missed = float(np.sum((figure_N - design_N2 @ line_2) ** 2) / (len(sizes) - 2))
    deviation_N = np.array([figure.half_width / HALF_INTERVAL for figure in figures])
    spread_N = np.sqrt(np.maximum(deviation_N**2, missed))
    draws_RN = np.random.default_rng(0).normal(figure_N, spread_N, size=(NUM_RESAMPLES, len(sizes)))
    lines_R2 = draws_RN @ solve_2N.T
    further = tuple(max(sizes) * times for times in FURTHER)

    def along(at_2: np.ndarray, most: float) -> Estimate:
        low, high = np.quantile(lines_R2 @ at_2, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Estimate(*(float(min(value, most)) for value in (line_2 @ at_2, low, high)))

    predicted = tuple(along(np.array([1.0, np.log(size)]), most) for size in further)
    return Trend(along(np.array([0.0, np.log(2)]), np.inf), further, predicted)
