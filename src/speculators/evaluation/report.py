"""How a report is shown: a table for people, one JSON document for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table

from speculators.decoding.method import PLAIN
from speculators.evaluation.records import EvaluationReport, MethodRow
from speculators.evaluation.statistics import Estimate
from speculators.utils.files import atomic_write

COLUMNS = ("K", "acceptance\nlength τ", "conditional\nacceptance", "tokens/s", "speedup", "speedup\n/ τ", "lossless")


class Report(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def report_table(report: EvaluationReport) -> Table:
    """The house table. Acceptance length counts the recovered or bonus token; ± is a 95 % bootstrap over prompts."""
    first = report.rows[0]
    caption = "± 95 % bootstrap over prompts; speeds interleaved in one process; conditional: given all before"
    table = house_table(f"{first.num_prompts} prompts of {report.dataset}", first.temperature, caption, COLUMNS)
    for row in report.rows:
        table.add_row(*cells(row))
    return table


def house_table(measured: str, temperature: float, caption: str, columns: Sequence[str]) -> Table:
    """An empty one: its title says what was measured and how it was sampled."""
    sampling = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    table = Table(
        title=f"{measured}, {sampling}",
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


def save_report(report: Report, path: str | Path) -> Path:
    """Write the report as one JSON document."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(report.to_dict(), file, indent=2)
        file.write("\n")
    return path
