"""Writes the model card (README.md) of an exported directory: how to serve it, what made it, how well it drafts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.checkpoint.findings import VLLM_PROFILE
from speculators.checkpoint.formats import Serving
from speculators.config import SpeculatorModelConfig
from speculators.provenance import package_versions
from speculators.utils.files import is_same_model, read_json_object

REPORT_NAMES = ("report.json", "evaluation.json")
CARD_FILE = "README.md"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def model_card(
    config: SpeculatorModelConfig,
    *,
    name: str,
    format_name: str,
    serving: Serving | None,
    verifier: str | None,
    report: Mapping[str, Any] | None,
) -> str:
    """Returns the card as Markdown, headed by the metadata that the hub reads.

    `serving=None`: vLLM does not serve the format. `report=None`: the card says that nothing was measured.
    """
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items() if version)
    how = f"    {serving.command}\n" if serving is not None else "vLLM does not serve this kind of drafter.\n"
    return f"""---
library_name: speculators
tags: [speculative-decoding, {config.speculators_model_type}]
{base_model_line(verifier)}---

# {name}

A drafter of type `{config.speculators_model_type}` for `{verifier or "an unnamed verifier"}`, in the format \
`{format_name}`. It makes the verifier answer faster and never changes what it answers.

## Serve

Written for {VLLM_PROFILE.replace("-", " ")}:

{how}
{acceptance_section(report)}
## Made with

{versions}
"""


def base_model_line(verifier: str | None) -> str:
    """Names a verifier of the hub; leaves out a local path, which would mean nothing there."""
    is_hub_id = verifier is not None and HUB_ID.fullmatch(verifier)
    return f"base_model: {verifier}\n" if is_hub_id else ""


def acceptance_section(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "## Acceptance\n\nNot measured: run `speculators evaluate` and export again with its report.\n"
    cells = [
        (
            row["num_speculative_tokens"],
            f"{row['acceptance_length']['value']:.2f}",
            f"{row['speedup']['value']:.2f}",
            row["num_prompts"],
        )
        for row in report["rows"]
    ]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in cells]
    table = ["| K | acceptance length | speedup | prompts |", "|---|---|---|---|", *lines]
    where = f"Local engine, verifier `{report['verifier']}`, prompts of `{report['dataset']}`."
    return "\n".join(["## Acceptance", "", *table, "", where, ""])


def find_report(checkpoint: Path, algorithm: str, given: Path | None) -> dict[str, Any] | None:
    """Reads the report `given`, or one beside the checkpoint or its run, and keeps its rows about this drafter.

    Returns None when nothing was given and none is found. Raises `ValueError` when the given report has no row about
    this checkpoint or another drafter of its algorithm.
    """
    if given is not None:
        report = read_report(given)
        rows = rows_about(report, checkpoint) or [row for row in report["rows"] if row.get("method") == algorithm]
        if not rows:
            measured = [row.get("method") for row in report["rows"]]
            raise ValueError(f"--report {given} measured {measured}, neither {checkpoint} nor another {algorithm!r}")
        return {**report, "rows": rows}
    for folder in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        for file in (folder / name for name in REPORT_NAMES if (folder / name).is_file()):
            try:
                report = read_report(file)
            except ValueError:  # a file of that name about something else
                continue
            if rows := rows_about(report, checkpoint):
                return {**report, "rows": rows}
    return None


def rows_about(report: Mapping[str, Any], checkpoint: Path) -> list[Any]:
    """Selects the rows whose method uses this very directory: a report found nearby may be about another drafter."""
    configs = (report.get("settings") or {}).get("speculative_configs") or {}
    models = {name: (config or {}).get("model") for name, config in configs.items()}
    rows = [(row, models.get(row.get("method"))) for row in report["rows"]]
    return [row for row, model in rows if model is not None and is_same_model(str(model), str(checkpoint))]


def read_report(file: Path) -> dict[str, Any]:
    found = read_json_object(file, "name what `evaluate --output` wrote by --report")
    if not is_evaluation(found):
        raise ValueError(
            f"{file} is not an evaluation: it has no rows; name what `evaluate --output` wrote by --report"
        )
    return found


def is_evaluation(values: Mapping[str, Any]) -> bool:
    rows = values.get("rows")
    return isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows)
