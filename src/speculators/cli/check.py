"""`speculators check`: is a checkpoint what was trained, and will vLLM serve it as that?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from speculators.cli.console import out, print_facts

if TYPE_CHECKING:
    from speculators.deploy.report import CheckReport


def check(
    checkpoint: Annotated[str, typer.Argument(help="The speculator: directory or hub id, of any known format.")],
    verifier: Annotated[
        str | None, typer.Option(help="Check against this verifier: hub id or directory. Default: as recorded.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="Whose format a directory of another project is, if that is unclear.")
    ] = None,
    only_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON alone.")] = False,
) -> Any:
    """Check a checkpoint before serving it: config, tensors, vocabulary, verifier, and the record of its training."""
    from speculators.deploy.check import check_checkpoint

    report = check_checkpoint(checkpoint, verifier=verifier, algorithm=algorithm)
    if not only_json:
        show(report)
    print(json.dumps({"verb": "check", **report.as_dict()}, default=str), flush=True)
    return 0 if report.ok else 1


def show_findings(report: CheckReport) -> None:
    if not report.findings:
        return
    table = Table(title="findings", title_justify="left", show_lines=True)
    for column in ("", "what", "where", "found, and the rule", "fix"):
        table.add_column(column, overflow="fold")
    for found in report.findings:
        colour = "red" if found.severity == "error" else "yellow"
        words = (found.code, found.where, f"{found.found}; {found.rule}", found.fix)
        table.add_row(f"[{colour}]{found.severity}[/]", *map(escape, words))
    out().print(table)


def show(report: CheckReport) -> None:
    show_findings(report)
    facts = {
        "checkpoint": report.path,
        "format": f"{report.format} ({report.speculators_model_type})",
        "verifier": report.verifier,
        "checked": ", ".join(report.done),
    }
    for what, why in report.not_done.items():
        facts[f"not checked: {what}"] = why
    if report.notes:
        facts["note"] = "\n".join(report.notes)
    print_facts(report.verdict, {**facts, "serve with": served_by(report)})


def served_by(report: CheckReport) -> str:
    if report.serving is not None:
        return report.serving.command
    if report.served_format == report.format:
        return "a verifier that is named: --verifier"
    if report.served_format is None:
        return "nothing: decode here with `speculators generate`"
    return f"what this writes: speculators export {report.path} --output DIRECTORY"
