"""`speculators stitch-mtp`: write a trained MTP layer into a copy of its verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.cli.console import print_facts


def stitch_mtp(
    finetuned: Annotated[str, typer.Argument(help="Directory of the trained MTP speculator.")],
    verifier: Annotated[str, typer.Argument(help="The verifier it was trained for: directory or hub id.")],
    output_path: Annotated[
        Path | None, typer.Option(help="New directory to write. Default: ./<verifier's name>-stitched.")
    ] = None,
) -> dict[str, Any]:
    """Write a trained MTP layer into a copy of its verifier; nothing else of the copy differs."""
    from speculators.model import SpeculatorModel

    speculator: Any = SpeculatorModel.get_class("mtp")
    stitched = speculator.stitch(finetuned, verifier, output_path)
    facts = {"written to": stitched.path, "tensors replaced": len(stitched.keys), "in files": ", ".join(stitched.files)}
    print_facts("stitched", facts)
    return {
        "verb": "stitch-mtp",
        "path": str(stitched.path),
        "tensors": list(stitched.keys),
        "files": list(stitched.files),
    }
