"""Reports an evaluation: one row per method, shown as a table for people and one JSON document for machines.

Words: acceptance length counts the recovered or bonus token (1 + accepted / rounds); conditional acceptance of
position i is the share of rounds accepting draft i among those that accepted draft i - 1. Times are wall-clock seconds.
"""

from __future__ import annotations

import json
import os
import platform
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from speculators.decoding.method import PLAIN
from speculators.evaluation.statistics import Estimate
from speculators.provenance import find_package_repo, git_diff, git_sha, package_versions
from speculators.utils.files import atomic_write
from speculators.utils.report import TableReport

SIGNIFICANCE = 0.001
"""A lossless method fails the sampled check once in so many runs."""
COLUMNS = ("K", "acceptance\nlength τ", "conditional\nacceptance", "tokens/s", "speedup", "speedup\n/ τ", "lossless")


class SavedReport(TableReport):
    """A report that is also one JSON document."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]: ...

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON; makes the directories above it."""
        path = Path(path)
        with atomic_write(path, "w") as file:
            json.dump(self.to_dict(), file, indent=2, default=str)
            file.write("\n")
        return path


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """Holds the figures that every row of a results table has, measured in this process or on a server."""

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


@dataclass(frozen=True, kw_only=True)
class MethodRow(ResultRow):
    """One row of the results table: a method on a data set, beside plain decoding of the same prompts."""

    plain_tokens_per_s: float
    speedup: Estimate
    speedup_per_token: float
    """speedup / acceptance length: the share of the possible gain that was realised"""
    num_identical: int | None
    """prompts whose tokens equal plain decoding's; None where sampling makes the question meaningless"""
    draft_share: float
    """share of the time spent making drafts"""
    draft_cost: float | None
    """seconds of drafting per round, over seconds of a plain step; None when no plain step was taken"""
    verify_cost: float | None
    """seconds of the rest of a round (scoring the drafts, bookkeeping), over seconds of a plain step"""
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
class EvaluationReport(SavedReport):
    """Everything needed to read the rows, and to measure them again."""

    verifier: str
    dataset: str
    rows: tuple[MethodRow, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    interrupted: str | None = None
    """After how many prompts Ctrl-C ended the measurement; None when it did not."""

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

    def raise_for_errors(self) -> None:
        """Raises `NotLosslessError` when a method that was checked does not give the verifier's text."""
        if self.lossless is False:
            raise NotLosslessError(self.rows, str(self.settings.get("dtype", "float32")))

    def warnings(self) -> list[str]:
        """Lists what makes a figure doubtful, by method."""
        return [f"{row.method}: {warning}" for row in self.rows for warning in row.warnings]

    def tables(self) -> list[Table]:
        """The results table: acceptance length counts the recovered or bonus token."""
        first = self.rows[0]
        caption = "± 95 % bootstrap over prompts; speeds interleaved in one process; conditional: given all before"
        table = results_table(f"{first.num_prompts} prompts of {self.dataset}", first.temperature, caption, COLUMNS)
        for row in self.rows:
            table.add_row(*map(escape, cells(row)))
        return [table]

    @property
    def best(self) -> MethodRow | None:
        """The fastest method that drafts; None when nothing but plain decoding was measured."""
        drafting = [row for row in self.rows if row.method != PLAIN]
        return max(drafting, key=lambda row: row.speedup.value, default=None)

    def sentence(self) -> str:
        best = self.best
        if best is None:
            return f"plain decoding makes {self.rows[0].tokens_per_s:.1f} tokens per second"
        parts = [gain(best.speedup), "" if best.lossless is None else sameness(best)]
        parts += [f"{row.method} is not lossless" for row in self.rows if row is not best and row.lossless is False]
        name = f"{best.method}: " if len(self.rows) > 2 else ""
        return name + ", ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lossless": self.lossless}


def gain(speedup: Estimate) -> str:
    """Says whether drafting pays: only an interval on one side of 1 is evidence."""
    if speedup.low > 1:
        return f"{speedup.value:.2f}x faster"
    if speedup.high < 1:
        return f"{speedup.value:.2f}x, slower than plain decoding: better without this drafter"
    return f"{speedup.value:.2f}x, no evidence of a difference from plain decoding"


def sameness(row: MethodRow) -> str:
    if row.num_identical is None:
        return "same law of sampled text" if row.lossless else "ANOTHER law of sampled text"
    return f"{'same text' if row.lossless else 'ANOTHER text'}, {row.num_identical} of {row.num_prompts}"


class EvaluationStoppedError(KeyboardInterrupt):
    """Ctrl-C during an evaluation; `report` is of the prompts that were measured until then."""

    def __init__(self, report: EvaluationReport) -> None:
        super().__init__(f"{report.interrupted}: the table is of these; the same command measures all")
        self.report = report


class NotLosslessError(RuntimeError):
    """Greedy answers differ from plain decoding's, or sampled ones follow another law."""

    def __init__(self, rows: Sequence[MethodRow], dtype: str) -> None:
        found = "; ".join(f"{row.method}: {evidence(row)}" for row in rows if row.lossless is False)
        reason = "" if dtype == "float32" else f" ({dtype} has ties that rounding decides; --dtype float32 has none)"
        super().__init__(f"not lossless: {found}{reason}")


def evidence(row: MethodRow) -> str:
    if row.num_identical is not None:
        return f"{row.num_identical} of {row.num_prompts} answers are identical"
    return f"answers drawn both ways differ (p = {row.sampling_p_value:.4f})"


def results_table(measured: str, temperature: float, caption: str, columns: Sequence[str]) -> Table:
    """An empty one: its title says what was measured and how it was sampled."""
    sampling = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    table = Table(
        title=escape(f"{measured}, {sampling}"),
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )
    table.add_column("method", style="bold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def cells(row: MethodRow) -> list[str]:
    if row.method == PLAIN:
        return [row.method, "0", "1", "", f"{row.tokens_per_s:.1f}", "1", "", ""]
    return [
        row.method,
        str(row.num_speculative_tokens),
        with_interval(row.acceptance_length),
        " ".join(f"{rate:.2f}" for rate in row.conditional_acceptance),
        f"{row.tokens_per_s:.1f}",
        with_interval(row.speedup) + "x",
        f"{row.speedup_per_token:.2f}",
        verdict(row),
    ]


def verdict(row: MethodRow) -> str:
    if row.num_identical is not None:
        return f"{row.num_identical}/{row.num_prompts}"
    return "sampled" if row.sampling_p_value is None else f"p = {row.sampling_p_value:.3f}"


def with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ±{estimate.half_width:.2f}"


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
