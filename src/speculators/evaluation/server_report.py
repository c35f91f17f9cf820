"""The table of a server's report."""

from __future__ import annotations

from rich.table import Table

from speculators.evaluation.report import house_table, with_interval
from speculators.evaluation.server import ServerReport, ServerRow

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
    measured = f"{first.num_prompts} prompts of {report.dataset} at {report.server}"
    caption = "± 95 % bootstrap over groups of prompts; rounds from the server's own counters"
    table = house_table(measured, first.temperature, caption, COLUMNS)
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
