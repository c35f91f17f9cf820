"""`speculators export`: write the directory that an engine needs, from a trained or foreign checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from speculators.checkpoint.findings import VLLM_PROFILE
from speculators.cli.console import print_facts, say


def export(
    checkpoint: Annotated[str, typer.Argument(help="The speculator: directory or hub id.")],
    output: Annotated[Path, typer.Option(help="New directory to write.")],
    profile: Annotated[
        str, typer.Option(help="vllm-0.32, native, speculators, or another format of the drafter.")
    ] = VLLM_PROFILE,
    verifier: Annotated[
        str | None, typer.Option(help="Verifier to record: hub id or directory. Default: as recorded.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: as stored.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Evaluation to quote in the card. Default: report.json beside the run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it exists.")] = False,
) -> dict[str, Any]:
    """Write what an engine needs from the same checkpoint, with a card that says how to serve it."""
    from speculators.deploy.export import export_checkpoint

    exported = export_checkpoint(
        checkpoint, output, profile=profile, verifier=verifier, dtype=dtype, overwrite=overwrite, report=report
    )
    for note in exported.notes:
        say(f"note: {escape(note)}")
    command = exported.serving.command if exported.serving is not None else "not by vLLM"
    facts = {"written to": exported.path, "drafter": exported.speculators_model_type, "format": exported.format}
    print_facts("exported", {**facts, "serve with": command})
    serving = exported.serving
    return {
        "verb": "export",
        "path": str(exported.path),
        "speculators_model_type": exported.speculators_model_type,
        "format": exported.format,
        "model": serving.model if serving is not None else None,
        "speculative_config": serving.speculative_config if serving is not None else None,
    }
