"""The table of a server's report."""

from __future__ import annotations

import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from speculators.evaluation.report import with_interval
from speculators.evaluation.server import ServerReport, ServerRow
from speculators.utils.files import atomic_write

COLUMNS = (
    "clients",
    "K",
    "acceptance\nlength τ",
    "conditional\nacceptance",
    "tokens/s",
    "plain\ntokens/s",
    "speedup",
    "speedup\n/ τ",
    "lossless",
)
UNKNOWN = "-"


def server_table(report: ServerReport) -> Table:
    """The house table with a row for each number of clients. A dash: it needs a plain server, and none was given."""
    first = report.rows[0]
    temperature = "greedy" if first.temperature == 0 else f"temperature {first.temperature:g}"
    table = Table(
        title=f"{first.num_prompts} prompts of {report.dataset} at {report.server}, {temperature}",
        caption="± 95 % bootstrap over groups of prompts; rounds from the server's own counters",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )
    table.add_column("method", style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*cells(row))
    return table


def cells(row: ServerRow) -> list[str]:
    return [
        row.method,
        str(row.num_clients),
        str(row.num_speculative_tokens),
        with_interval(row.acceptance_length),
        " ".join(f"{rate:.2f}" for rate in row.conditional_acceptance),
        f"{row.tokens_per_s:.1f}",
        UNKNOWN if row.plain_tokens_per_s is None else f"{row.plain_tokens_per_s:.1f}",
        UNKNOWN if row.speedup is None else with_interval(row.speedup) + "x",
        UNKNOWN if row.speedup_per_token is None else f"{row.speedup_per_token:.2f}",
        UNKNOWN if row.num_identical is None else f"{row.num_identical}/{row.num_prompts}",
    ]


def save_server_report(report: ServerReport, path: str | Path) -> Path:
    """One JSON document; what was measured so far when the server went away."""
    path = Path(path)
    with atomic_write(path, "w") as file:
        json.dump(report.to_dict(), file, indent=2)
        file.write("\n")
    return path
