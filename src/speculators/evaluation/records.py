"""What an evaluation hands over: one record a prompt and method while measuring, one row a method in the report.

Words: acceptance length counts the recovered or bonus token (1 + accepted / rounds); conditional acceptance of
position i is the share of rounds accepting draft i among those that accepted draft i - 1. Times are wall-clock seconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from speculators.decoding.stats import DecodeStats
from speculators.evaluation.statistics import Estimate

SIGNIFICANCE = 0.001
"""A lossless method fails the sampled check once in so many runs."""


@dataclass(frozen=True)
class Measurement:
    """One method on one group of prompts (a single prompt unless batches are asked for)."""

    token_ids: tuple[tuple[int, ...], ...]
    """What was generated, a prompt each."""
    time_s: float
    stats: DecodeStats

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids)


@dataclass(frozen=True)
class MethodRow:
    """One row of the house table: a method on a data set, beside plain decoding of the same prompts."""

    method: str
    num_speculative_tokens: int
    temperature: float
    num_prompts: int
    num_tokens: int
    acceptance_length: Estimate
    acceptance_rate: float
    """accepted / drafted"""
    conditional_acceptance: tuple[float, ...]
    tokens_per_s: float
    plain_tokens_per_s: float
    speedup: Estimate
    speedup_per_token: float
    """speedup / acceptance length: the share of the possible gain that was realised"""
    num_identical: int | None
    """prompts whose tokens equal plain decoding's; None where sampling makes the question meaningless"""
    draft_share: float
    """share of the time spent making drafts"""
    draft_cost: float | None
    """seconds of drafting a round, over seconds of a plain step; None when no plain step was taken"""
    verify_cost: float | None
    """seconds of the rest of a round (scoring the drafts, keeping books), over seconds of a plain step"""
    sampling_p_value: float | None = None
    """two-sample test of sampled answers against plain decoding's; None when it was not made"""
    warnings: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool | None:
        """None when nothing was checked."""
        if self.num_identical is not None:
            return self.num_identical == self.num_prompts
        return None if self.sampling_p_value is None else self.sampling_p_value >= SIGNIFICANCE


@dataclass(frozen=True)
class EvaluationReport:
    """Everything needed to read the rows, and to measure them again."""

    verifier: str
    dataset: str
    rows: tuple[MethodRow, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def row(self, method: str) -> MethodRow:
        for row in self.rows:
            if row.method == method:
                return row
        raise ValueError(f"no method '{method}' in this report; it has {[row.method for row in self.rows]}")

    @property
    def lossless(self) -> bool | None:
        """Whether every method that was checked is; None when none was."""
        checked = [row.lossless for row in self.rows if row.lossless is not None]
        return all(checked) if checked else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lossless": self.lossless}
