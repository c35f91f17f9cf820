"""`speculators convert`: a checkpoint of another project as a speculator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.cli.console import print_facts, say
from speculators.cli.options import Verifier, parse_json_object


def convert(
    model: Annotated[str, typer.Argument(help="The checkpoint: directory or hub id.")],
    verifier: Verifier,
    output: Annotated[Path, typer.Option("--output", "--output-path", help="New directory to write.")] = Path(
        "converted"
    ),
    algorithm: Annotated[
        str | None, typer.Option(help="Speculator type. Default: recognised by config and tensors.")
    ] = None,
    algorithm_kwargs: Annotated[
        str | None, typer.Option(help='What the source does not say, as JSON: {"norm_before_residual": true}.')
    ] = None,
    validate_device: Annotated[str | None, typer.Option(help="Load the result once on this device.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it exists.")] = False,
) -> dict[str, Any]:
    """Convert a checkpoint of another project (EAGLE, EAGLE-3, Medusa, MTP, DFlash, DSpark) to a speculator."""
    from speculators.convert import convert_model

    options = parse_json_object("--algorithm-kwargs", algorithm_kwargs) or {}
    written = convert_model(model, verifier, algorithm, output, validate_device, overwrite=overwrite, **options)
    for note in written.notes:
        say(f"note: {note}")
    facts = {
        "written to": written.path,
        "from format": written.source_format,
        "speculator": written.speculators_model_type,
        "check it with": f"speculators check {written.path}",
    }
    print_facts("converted", facts)
    return {
        "verb": "convert",
        "path": str(written.path),
        "source_format": written.source_format,
        "speculators_model_type": written.speculators_model_type,
        "notes": list(written.notes),
    }
