"""Reports an evaluation: one row per method, shown as a table for people and one JSON document for machines.

Words: acceptance length counts the recovered or bonus token (1 + accepted / rounds); conditional acceptance of
position i is the share of rounds accepting draft i among those that accepted draft i - 1. Times are wall-clock seconds.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from speculators.evaluation.records import SCHEMA_VERSION, Cell, MethodRow, cannot_be_true
from speculators.evaluation.statistics import Estimate
from speculators.utils.files import atomic_write, read_json_object
from speculators.utils.report import TableReport

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


@dataclass(frozen=True)
class EvaluationReport(SavedReport):
    """Everything needed to read the rows, and to measure them again."""

    verifier: str
    dataset: str
    rows: tuple[MethodRow, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    interrupted: str | None = None
    """After how many prompts or cells the measurement ended early; None when it did not."""
    schema_version: int = SCHEMA_VERSION
    cells: tuple[Cell, ...] = ()
    """Those that were measured to their end, in the order of their rows."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """What a call must have in common with the one that began the file, to go on with it."""

    def row(self, method: str) -> MethodRow:
        """The first row of a method."""
        for row in self.rows:
            if row.method == method:
                return row
        raise ValueError(f"no method '{method}' in this report; it has {[row.method for row in self.rows]}")

    @property
    def whole_rows(self) -> tuple[MethodRow, ...]:
        """The rows about whole data sets."""
        return tuple(row for row in self.rows if row.task is None)

    def plain_of(self, row: MethodRow) -> MethodRow | None:
        """The row of plain decoding that was measured beside `row`: the nearest before it."""
        before = self.whole_rows[: self.whole_rows.index(row) + 1]
        return next((other for other in reversed(before) if other.is_plain), None)

    @property
    def lossless(self) -> bool | None:
        """Whether every method that was checked is; None when none was."""
        checked = [row.lossless for row in self.rows if row.lossless is not None]
        return all(checked) if checked else None

    def raise_for_errors(self) -> None:
        """Raises `NotLosslessError` when a method that was checked does not give the verifier's text."""
        if self.lossless is False:
            raise NotLosslessError(self.whole_rows, str(self.settings.get("dtype", "float32")))

    def warnings(self) -> list[str]:
        """Lists what makes a figure doubtful, by method."""
        several = len(self.cells) > 1
        return [f"{row.place if several else row.method}: {told}" for row in self.rows for told in row.doubts()]

    def tables(self) -> list[Table]:
        """The results tables, one per data set, temperature and batch size, and one per data set that has tasks.
        Acceptance length counts the recovered or bonus token."""
        return [
            table
            for rows in together(self.rows)
            for table in [table_of(rows, self.dataset), *([table_of_tasks(rows)] if has_tasks(rows) else [])]
        ]

    @property
    def best(self) -> MethodRow | None:
        """The fastest method that drafts, on a whole data set, of those whose speedup can be true if there is one; None
        when only plain decoding was measured."""
        drafting = [row for row in self.whole_rows if not row.is_plain]
        return max(drafting, key=lambda row: (row.is_possible, row.speedup.value), default=None)

    def sentence(self) -> str:
        best = self.best
        if best is None:
            return f"plain decoding makes {self.rows[0].tokens_per_s:.1f} tokens per second"
        parts = [gain(best.speedup, best.acceptance_length), "" if best.lossless is None else sameness(best)]
        name_of = (lambda row: row.place) if len(self.cells) > 1 else (lambda row: row.method)
        lossy = [row for row in self.whole_rows if row is not best and row.lossless is False]
        parts += [f"{name_of(row)} is not lossless" for row in lossy]
        name = f"{name_of(best)}: " if len(self.whole_rows) > 2 else ""
        return name + ", ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lossless": self.lossless}


def together(rows: Sequence[MethodRow]) -> list[list[MethodRow]]:
    """Rows of one data set, temperature and batch size, with the first of plain decoding alone: it was measured beside
    each number of draft tokens."""
    groups: dict[tuple[Any, ...], list[MethodRow]] = {}
    for row in rows:
        group = groups.setdefault((row.dataset, row.temperature, row.batch_size), [])
        if not (row.is_plain and any(other.is_plain and other.task == row.task for other in group)):
            group.append(row)
    return list(groups.values())


def has_tasks(rows: Sequence[MethodRow]) -> bool:
    return any(row.task is not None for row in rows)


def table_of(rows: Sequence[MethodRow], dataset: str) -> Table:
    first = rows[0]
    caption = "± 95 % bootstrap over prompts; speeds interleaved in one process; conditional: given all before"
    measured = f"{first.num_prompts} prompts of {first.dataset or dataset}"
    measured += f", {first.batch_size} together" if first.batch_size > 1 else ""
    table = results_table(measured, first.temperature, caption, COLUMNS)
    for row in rows:
        if row.task is None:
            table.add_row(*map(escape, cells(row)))
    return table


def table_of_tasks(rows: Sequence[MethodRow]) -> Table:
    """Acceptance length and speedup of each method by task."""
    tasks = list(dict.fromkeys(row.task for row in rows if row.task is not None))
    caption = "acceptance length τ and speedup, ± 95 % bootstrap over the prompts of the task"
    columns = ["K", *(task.replace("_", "\n") for task in tasks)]
    table = results_table(f"tasks of {rows[0].dataset}", rows[0].temperature, caption, columns)
    for method, num_drafts in dict.fromkeys((row.method, row.num_speculative_tokens) for row in rows):
        of_method = [row for row in rows if (row.method, row.num_speculative_tokens) == (method, num_drafts)]
        found = {row.task: row for row in of_method}
        if not of_method[0].is_plain:
            table.add_row(escape(method), str(num_drafts), *(cell_of_task(found.get(task)) for task in tasks))
    return table


def cell_of_task(row: MethodRow | None) -> str:
    if row is None:
        return ""
    if row.num_prompts <= row.batch_size:  # one measurement has no interval
        return f"τ {row.acceptance_length.value:.2f}\n{row.speedup.value:.2f}x"
    return f"τ {with_interval(row.acceptance_length)}\n{with_interval(row.speedup)}x"


def gain(speedup: Estimate, length: Estimate) -> str:
    """Says whether drafting pays: only an interval on one side of 1 is evidence, and none above the acceptance length
    can be true."""
    if cannot_be_true(speedup, length):
        return f"{speedup.value:.2f}x cannot be true, it is above the acceptance length {length.value:.2f}"
    if speedup.is_above(1):
        return f"{speedup.value:.2f}x faster"
    if speedup.is_below(1):
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
    table.add_column("method", style="bold", min_width=8)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def cells(row: MethodRow) -> list[str]:
    if row.is_plain:
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


# -- reading a result again


def load_result(path: str | os.PathLike[str]) -> EvaluationReport:
    """Reads what `evaluate --output` or `EvaluationReport.save` wrote, of this release or an earlier one.

    Raises `ValueError` for a file that is no JSON, no result of methods in one process, or of a later schema.
    """
    document = read_json_object(Path(path), "name what `evaluate --output` wrote")
    version = document.setdefault("schema_version", 1)
    if "server" in document:
        raise ValueError(f"{path} was measured on a server, which has no plain decoding in one process beside it")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version}, this release reads up to {SCHEMA_VERSION}: update it")
    try:
        report = ADAPTER.validate_python(document if version > 1 else upgraded(document))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()[:3]]
        raise ValueError(f"{path} is no result of `evaluate`: {'; '.join(wrong)}") from error
    if not report.rows:
        raise ValueError(f"{path} has no rows: nothing was measured before it was interrupted")
    return report


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A result of one cell without a version: what its rows say now was said by its settings."""
    settings, rows = document.get("settings"), document.get("rows")
    if not isinstance(settings, dict) or not isinstance(rows, list):
        return document
    configs = settings.get("speculative_configs") or {}
    said = {"dataset": document.get("dataset"), "batch_size": settings.get("batch_size", 1)}
    filled = [{**said, "speculative_config": configs.get(row.get("method")), **row} for row in rows]
    return {**document, "rows": filled, "schema_version": SCHEMA_VERSION}


def result_schema() -> dict[str, Any]:
    """The JSON schema of a result."""
    return ADAPTER.json_schema()


ADAPTER = TypeAdapter(EvaluationReport)
