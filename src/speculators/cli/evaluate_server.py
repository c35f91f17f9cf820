"""`speculators evaluate --server`: flags to one configuration, the table, and a code that says whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from speculators.cli.console import WorkProgress, out, say

if TYPE_CHECKING:
    from speculators.evaluation.server import ServerReport

LOCAL_FLAGS = (
    "num_speculative_tokens",
    "speculative_token_tree",
    "dynamic_tree",
    "batch_size",
    "num_repeats",
    "dtype",
    "device",
)
"""Decided where the server was started, or of no meaning for one."""
SERVER_FLAGS = ("baseline_server", "concurrency", "request_timeout", "max_retries")


def refuse_flags(context: typer.Context, names: tuple[str, ...], reason: str) -> None:
    """A flag that would be ignored is an error."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,4,8`"""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--concurrency {text}: numbers of clients with commas, such as 1,4,8") from error


def label_of(methods: Sequence[str] | None) -> dict[str, str]:
    """What the row is called: a server does not say what drafts in it."""
    if methods and len(methods) > 1:
        raise typer.BadParameter("--method names the row of --server, which has one: give it once")
    return {"label": methods[0]} if methods else {}


def evaluate_running_server(*, output: Path | None, lossless: bool, **settings: Any) -> dict[str, Any]:
    """`settings`: the fields of `ServerEvaluation`."""
    from speculators.evaluation.report import save_report
    from speculators.evaluation.server import NO_BASELINE, ServerEvaluation, evaluate_server
    from speculators.evaluation.server_report import server_table

    config = ServerEvaluation(**settings)
    if lossless and (config.baseline is None or config.temperature > 0):
        raise typer.BadParameter("--lossless of a server needs --baseline-server and greedy answers")
    with WorkProgress() as progress:
        report = evaluate_server(config, on_progress=progress)
    if report.rows:
        out().print(server_table(report))
    if config.baseline is None:
        say(NO_BASELINE)
    for row in report.rows:
        for warning in row.warnings:
            say(f"[yellow]{row.num_clients} clients: {warning}[/]")
    if output is not None:
        say(f"report: {save_report(report, output)}")
    result = {"verb": "evaluate", **report.to_dict()}
    refuse_half_a_measurement(report, result)
    if lossless and any(row.num_identical != row.num_prompts for row in report.rows):
        found = "; ".join(f"{row.num_clients} clients: {row.num_identical}/{row.num_prompts}" for row in report.rows)
        raise ValueError(f"not lossless: identical greedy answers {found} (bfloat16 has ties that rounding decides)")
    return result


def refuse_half_a_measurement(report: ServerReport, result: dict[str, Any]) -> None:
    """What was measured is shown and printed as JSON all the same; the exit code says that it is not the whole."""
    if report.interrupted is not None:
        print(json.dumps(result, default=str), flush=True)
        raise ConnectionError(f"the measurement ended early: {report.interrupted}")
