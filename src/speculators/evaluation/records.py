"""Records of a measurement: rows of the results table, what stands behind them prompt by prompt, tokens by origin.

They are the schema of a result's JSON (`report.result_schema`): a field more needs a default, so that results of
earlier releases stay readable; one that changes its meaning needs another `SCHEMA_VERSION`. Times are wall-clock
seconds.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from speculators.decoding.method import PLAIN
from speculators.evaluation.statistics import Estimate, Trend
from speculators.provenance import find_package_repo, git_diff, git_sha, package_versions

SCHEMA_VERSION = 2
"""1, which was not written down, had one cell: a row per method."""
FEWEST_SIZES = 3
"""Of training data, for a line with an interval."""
SIGNIFICANCE = 0.001
"""A lossless method fails the sampled check once in so many runs."""

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Origin = Literal["verifier", "draft", "recovered", "bonus"]
"""Who wrote a token: the verifier with no draft before it, the drafter (and the verifier agreed), the verifier in the
place of the first rejected draft, or the verifier after all drafts were accepted."""


@dataclass(frozen=True, kw_only=True)
class GroupFigures:
    """What was counted of prompts that were decoded together: one, unless batches were asked for."""

    prompts: tuple[str, ...]
    """Hash of each prompt's tokens, by which results are paired."""
    task: str | None = None
    num_tokens: Count
    num_rounds: Count
    num_accepted: Count
    time_s: Amount


@dataclass(frozen=True, kw_only=True)
class KeptToken:
    """One token of an answer."""

    token_id: int
    text: str
    origin: Origin
    position: Positive | None = None
    """Of an accepted draft: its place in the draft, from 1."""
    probability: Share
    """The verifier's, before temperature and penalties."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """The verifier's likeliest tokens, with their probabilities."""
    draft_probability: Share | None = None
    """Of an accepted draft: the drafter's own, before temperature; None: it has none, or the draft is of a tree."""
    rejected: tuple[str, Share | None] | None = None
    """Of a recovered token: the draft that stood there, and the drafter's probability of it; None for trees."""


@dataclass(frozen=True, kw_only=True)
class KeptAnswer:
    """An answer, token by token."""

    prompt: str
    task: str | None = None
    tokens: tuple[KeptToken, ...]


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """Holds the figures that every row of a results table has, measured in this process or on a server."""

    method: str
    num_speculative_tokens: Count
    temperature: Amount
    num_prompts: Positive
    num_tokens: Count
    acceptance_length: Estimate
    acceptance_rate: Share
    """accepted / drafted"""
    conditional_acceptance: tuple[Share, ...]
    tokens_per_s: Amount


@dataclass(frozen=True, kw_only=True)
class MethodRow(ResultRow):
    """One row of the results table: a method on a data set, beside plain decoding of the same prompts."""

    plain_tokens_per_s: Amount
    speedup: Estimate
    speedup_per_token: Amount
    """speedup / acceptance length: the share of the possible gain that was realised"""
    num_identical: Count | None
    """prompts whose tokens equal plain decoding's; None where sampling makes the question meaningless"""
    draft_share: Amount
    """share of the time spent making drafts"""
    draft_cost: Amount | None
    """seconds of drafting per round, over seconds of a plain step; None when no plain step was taken"""
    verify_cost: Amount | None
    """seconds of the rest of a round (scoring the drafts, bookkeeping), over seconds of a plain step"""
    sampling_p_value: Share | None = None
    """two-sample test of sampled answers against plain decoding's; None when it was not made"""
    warnings: tuple[str, ...] = ()
    dataset: str = ""
    """Name of its prompts."""
    task: str | None = None
    """The part of the data set that the row is about; None: all of it."""
    batch_size: Positive = 1
    speculative_config: dict[str, Any] | None = None
    """What drafted, in vLLM's spelling; None for plain decoding."""
    training_rows: Positive | None = None
    """Rows that the drafter was trained on, where its training run still says so."""
    time_shares: dict[str, float] = field(default_factory=dict)
    """prefill, draft, verify, overhead -> share of the time. The rest passed outside of the engine."""
    groups: tuple[GroupFigures, ...] = ()
    """Of rows about a whole data set."""
    answers: tuple[KeptAnswer, ...] = ()
    """Those that were kept token by token."""

    @property
    def lossless(self) -> bool | None:
        """None when nothing was checked."""
        if self.num_identical is not None:
            return self.num_identical == self.num_prompts
        return None if self.sampling_p_value is None else self.sampling_p_value >= SIGNIFICANCE

    @property
    def is_plain(self) -> bool:
        return self.method == PLAIN

    @property
    def place(self) -> str:
        """Says which row of a result this is: "eagle3 K=4, spec-bench/qa, batch 8, temperature 0.7"."""
        where = [self.dataset, *([] if self.task is None else [self.task])]
        words = [f"{self.method} K={self.num_speculative_tokens}", "/".join(filter(None, where))]
        words += [f"batch {self.batch_size}"] if self.batch_size > 1 else []
        words += [f"temperature {self.temperature:g}"] if self.temperature else []
        return ", ".join(filter(None, words))

    @property
    def is_possible(self) -> bool:
        """Whether the speedup is not surely above the acceptance length. What is not possible is not recommended."""
        return not cannot_be_true(self.speedup, self.acceptance_length)

    def doubts(self) -> tuple[str, ...]:
        """What makes the figures doubtful: what was noted when they were measured, and what they say themselves."""
        if self.task is not None and self.num_prompts <= self.batch_size:
            return ()  # one measurement of a part: noise is what it is made of
        found = speedup_warnings(self.speedup, self.acceptance_length, self.batch_size)
        return tuple(dict.fromkeys([*self.warnings, *found]))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement in one go: plain decoding and the methods, interleaved, on the prompts of one data set."""

    dataset: str
    num_speculative_tokens: Positive | None = None
    """None: each method's own."""
    temperature: Amount = 0.0
    batch_size: Positive = 1
    time_s: Amount = 0.0
    num_threads: Positive | None = None
    num_rows: Count = 0
    """Of the report: cells follow one another there."""

    @property
    def key(self) -> tuple[str, int | None, float, int]:
        return self.dataset, self.num_speculative_tokens, self.temperature, self.batch_size


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Acceptance length against training rows: tau(n) = a + b ln n, of drafters that differ in their n rows alone."""

    method: str
    dataset: str
    num_speculative_tokens: int
    temperature: float
    batch_size: int
    sizes: tuple[int, ...]
    acceptance_lengths: tuple[Estimate, ...]
    trend: Trend | None = None
    """None: too few sizes to say."""

    def sentence(self) -> str:
        name = f"{self.method} K={self.num_speculative_tokens} on {self.dataset}"
        if self.trend is None:
            found = ", ".join(f"{size:,}" for size in self.sizes)
            return (
                f"{name}: cannot say what more data is worth: trained on {found} rows, and a line with an interval "
                f"takes {FEWEST_SIZES} sizes"
            )
        added = self.trend.per_doubling
        gain = f"{added.value:+.2f} ({added.low:+.2f} to {added.high:+.2f})"
        if added.low <= 0:
            return f"{name}: no evidence that more data helps: {gain} tokens per round for each doubling"
        ahead = ", ".join(
            f"{size:,} rows {found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
            for size, found in zip(self.trend.sizes, self.trend.predicted, strict=True)
        )
        return f"{name}: each doubling of the data adds {gain} tokens per round; expected with {ahead}"


def cannot_be_true(speedup: Estimate, length: Estimate) -> bool:
    """Whether a speedup is surely above the acceptance length."""
    return speedup.low > length.high


def speedup_warnings(speedup: Estimate, length: Estimate, batch_size: int = 1) -> tuple[str, ...]:
    """A round costs at least one verifier step, so no method gains more than the tokens that it emits per round.

    A batch lasts as long as its longest answer: where that one is the easiest, the gain may be a little above the mean.
    """
    if cannot_be_true(speedup, length):
        return (
            f"speedup {speedup.value:.2f} exceeds the acceptance length {length.value:.2f}: this cannot be true, "
            "the plain baseline was slowed down by something else; measure again on an idle machine",
        )
    if speedup.value > length.value and batch_size == 1:
        return (
            f"speedup {speedup.value:.2f} is above the acceptance length {length.value:.2f}, which noise alone "
            "explains (their intervals overlap); more prompts or --num-repeats 3 tell",
        )
    return ()


def environment() -> dict[str, Any]:
    """Records where figures were measured (versions, commit, machine), for every report."""
    repo = find_package_repo()
    return {
        "versions": {"python": platform.python_version(), **package_versions()},
        "commit": git_sha(repo),
        "uncommitted_changes": bool(git_diff(repo)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
    }
