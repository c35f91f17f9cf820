"""`speculators compare`, `plan` and `report`: what results of `evaluate` say, without measuring anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.cli.shared import Result, say

ResultFile = Annotated[Path, typer.Argument(help="What `evaluate --output` wrote.", show_default=False)]
ResultFiles = Annotated[list[Path], typer.Argument(help="What `evaluate --output` wrote.", show_default=False)]
TrainingSizes = Annotated[
    str | None,
    typer.Option(help="Rows that the drafters of each result were trained on, with commas, where it does not say."),
]


def compare(
    first: ResultFile,
    second: ResultFile,
    output: Annotated[Path | None, typer.Option(help="Write the comparison to this JSON file.")] = None,
) -> Result:
    """Compare two results prompt by prompt: differences of acceptance length and speedup, with their intervals."""
    from speculators.evaluation.compare import compare_results
    from speculators.evaluation.report import load_result

    report = compare_results(load_result(first), load_result(second), names=(str(first), str(second)))
    for note in report.notes:
        say(note, "yellow")
    if output is not None:
        say(f"comparison: {report.save(output)}")
    return Result({"verb": "compare", **report.to_dict()}, [report], report.sentence())


def plan(
    results: ResultFiles,
    training_sizes: TrainingSizes = None,
    output: Annotated[Path | None, typer.Option(help="Write the plan to this JSON file.")] = None,
) -> Result:
    """Choose method and number of draft tokens per batch size from results; say what more training data is worth."""
    from speculators.evaluation.plan import make_plan
    from speculators.evaluation.report import load_result

    reports = [load_result(path) for path in results]
    planned = make_plan(reports, parse_sizes(training_sizes))
    for warning in planned.warnings:
        say(warning, "yellow")
    if output is not None:
        say(f"plan: {planned.save(output)}")
    return Result(
        {"verb": "plan", **planned.to_dict()}, [planned], planned.sentence(), next_after(planned, reports[0].verifier)
    )


def report(
    results: ResultFiles,
    training_sizes: TrainingSizes = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="HTML file. Default: beside the first result.")
    ] = None,
) -> Result:
    """Write one HTML page of results: tables, charts, and who wrote each token. It needs no network."""
    from speculators.evaluation.page import write_page
    from speculators.evaluation.report import load_result

    reports = [load_result(path) for path in results]
    for warning in (warning for found in reports for warning in found.warnings()):
        say(warning, "yellow")
    path = write_page(reports, output or results[0].with_suffix(".html"), parse_sizes(training_sizes))
    record = {"verb": "report", "output": str(path), "num_bytes": path.stat().st_size}
    return Result(record, [], f"{path} shows it: one file, which any browser opens without a network")


def next_after(planned: Any, verifier: str) -> list[str]:
    """Serves the first choice that pays for sure."""
    for choice in planned.choices:
        if choice.is_sure:
            drafter = (choice.speculative_config or {}).get("model")
            named = [drafter] if drafter else [verifier, "--method", choice.method]
            return ["speculators", "serve", *named, "--num-speculative-tokens", str(choice.num_speculative_tokens)]
    return []


def parse_sizes(text: str | None) -> list[int | None]:
    """`100,300,1000`; a dash for a result without a drafter of its own."""
    if text is None:
        return []
    try:
        return [None if part.strip() == "-" else int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--training-sizes {text}: numbers of rows with commas, such as 100,300,1000"
        ) from error
