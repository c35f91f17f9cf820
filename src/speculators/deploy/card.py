"""Writes the model card (README.md) of an exported directory: how to serve it, what made it, how well it drafts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.checkpoint.engine_profile import EngineProfile, Serving
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
    profile: EngineProfile,
    serving: Serving | None,
    verifier: str | None,
    report: Mapping[str, Any] | None,
) -> str:
    """Returns the card as Markdown, headed by the metadata that the hub reads. It names no path of this machine.

    `serving=None`: the engine does not serve the format. `report=None`: the card says that nothing was measured.
    """
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items() if version)
    named = shown_name(verifier) if verifier is not None else "VERIFIER"
    serve = profile.command(without_paths(serving, name)) if serving is not None else None
    how = f"    {serve}\n" if serve is not None else f"{profile.title} does not serve this directory.\n"
    return f"""---
library_name: speculators
tags: [speculative-decoding, {config.speculators_model_type}]
base_model: {named}{"" if is_hub_id(named) else "  # a directory here: write the hub id of the verifier"}
{licence_lines(verifier, named)}---

# {name}

A drafter of type `{config.speculators_model_type}` for `{named}`, in the format \
`{format_name}`. {speed_sentence(report)} \
It never changes what the verifier answers.

## Serve

Written for {profile.title}:

{how}
## Use

    pip install speculators
    speculators generate --verifier {named} --method ./{name} --prompt "..."

or in Python:

    from speculators import Engine
    print(Engine.from_pretrained("{named}", "./{name}").chat("...").text)

{acceptance_section(report)}
## Licence

It holds weights of its verifier, `{named}`, or was trained on its answers: the verifier's licence holds for it too.

## Made with

{versions}
"""


SNAPSHOT = re.compile(r"models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/", re.ASCII)
"""The directory of a model in the hub's cache."""


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None


def shown_name(model: str) -> str:
    """Returns a model's hub id, also one of a directory in the hub's cache; of another directory its name alone."""
    cached = SNAPSHOT.search(model)
    if cached is not None:
        return f"{cached['org']}/{cached['name']}"
    is_path = Path(model).is_absolute() or not is_hub_id(model)
    return Path(model).name if is_path else model


def without_paths(serving: Serving, name: str) -> Serving:
    """The same for whoever has downloaded the directory `name`."""
    config = serving.speculative_config
    if "model" not in config:  # the drafter is a part of the verifier that is served
        return Serving(f"./{name}", config)
    return Serving(shown_name(serving.model), {**config, "model": f"./{name}"})


def licence_lines(verifier: str | None, named: str) -> str:
    """Takes the licence from the verifier's own card where it is here; else points at the verifier."""
    card = Path(verifier or "") / CARD_FILE
    head = card.read_text(encoding="utf-8", errors="replace").split("---")[1:2] if card.is_file() else []
    found = re.search(r"^license:\s*([\w.-]+)\s*$", "".join(head), re.MULTILINE)
    if found is not None:
        return f"license: {found[1]}\n"
    return f"license: other\nlicense_name: that-of-the-base-model\nlicense_link: https://huggingface.co/{named}\n"


def speed_sentence(report: Mapping[str, Any] | None) -> str:
    """Says "faster" of a speedup whose whole interval is above 1, and of nothing else."""
    if report is None:
        return "Its speed was not measured."
    speedups = [row["speedup"] for row in report["rows"]]
    best = max(speedups, key=lambda speedup: speedup["value"])
    value, low = best["value"], best.get("low", best["value"])
    measured = f"{value:.2f}x the speed of plain decoding"
    if low > 1:
        return f"Measured below, the verifier answers faster: {measured}."
    if value > 1:
        return f"Measured below: {measured}, which its interval does not tell from no gain (from {low:.2f}x)."
    return f"Measured below, it does not pay: {measured}."


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
    verifier, prompts = (shown_name(str(report[key])) for key in ("verifier", "dataset"))
    where = f"Local engine, verifier `{verifier}`, prompts of `{prompts}`."
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
