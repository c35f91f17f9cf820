"""The results table in Markdown, and where it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from speculators.decoding.method import PLAIN
from speculators.evaluation import EvaluationReport, MethodRow
from speculators.utils.files import atomic_write

BEGIN = "<!-- results: begin, written by benchmarks/results.py -->"
END = "<!-- results: end -->"
HEADER = (
    "drafter",
    "K",
    "τ",
    "tokens/s",
    "speedup",
    "speedup/τ",
    "drafting a round",
    "a draft token",
    "parameters",
    "trained in",
    "identical",
)


@dataclass(frozen=True)
class Trained:
    """A drafter that was trained for the table."""

    checkpoint: str
    num_parameters: int
    """Trained ones."""
    time_s: float
    is_resumed: bool
    """The time is that of the last part alone."""
    own_flags: str
    """Flags beside the recipe that all share."""


def results_table(report: EvaluationReport, trained: Mapping[str, Trained]) -> str:
    """One row per method, by acceptance length; plain decoding first."""
    rows = sorted(report.rows, key=lambda row: (row.method != PLAIN, -row.acceptance_length.value))
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *(cells(row, trained.get(row.method)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: MethodRow, drafter: Trained | None) -> tuple[str, ...]:
    if row.method == PLAIN:
        return ("plain decoding", "", "1", f"{row.tokens_per_s:.0f}", "1", *[""] * 6)
    length, speedup = row.acceptance_length, row.speedup
    num_drafts = row.num_speculative_tokens
    return (
        row.method,
        str(num_drafts),
        f"{length.value:.2f} ({length.low:.2f} to {length.high:.2f})",
        f"{row.tokens_per_s:.0f}",
        f"{speedup.value:.2f} ({speedup.low:.2f} to {speedup.high:.2f})",
        f"{row.speedup_per_token:.2f}",
        steps(row.draft_cost),
        steps(None if row.draft_cost is None else row.draft_cost / max(num_drafts, 1)),
        "" if drafter is None else f"{drafter.num_parameters / 1e6:.2f} M",
        "" if drafter is None else f"{'more than ' * drafter.is_resumed}{drafter.time_s:.0f} s",
        "" if row.num_identical is None else f"{row.num_identical} of {row.num_prompts}",
    )


def steps(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.2f}"


def machine_line(report: EvaluationReport) -> str:
    """What the figures were measured with and on."""
    facts, settings = report.environment, report.settings
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch", "transformers"))
    changed = " with uncommitted changes" if facts["uncommitted_changes"] else ""
    return (
        f"{settings['num_prompts']} held-out prompts, greedy, at most {settings['max_tokens']} tokens, batch "
        f"{settings['batch_size']}, {settings['dtype']}, fastest of {settings['num_repeats']} timings; "
        f"{facts['device']}, {facts['num_cpus']} CPUs, {facts['num_threads']} thread(s); {versions}; commit "
        f"{(facts['commit'] or 'unknown')[:12]}{changed}."
    )


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the two markers."""
    document = path.read_text()
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"{path} must hold the lines {BEGIN!r} and {END!r} once each, in this order")
    before, rest = document.split(BEGIN)
    with atomic_write(path) as file:
        file.write(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
