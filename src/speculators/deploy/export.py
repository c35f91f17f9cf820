"""Writes from one checkpoint the directory that a given engine needs.

engine          the format that is written
vllm-0.33, ...  the one in which that release serves the algorithm (default: the release that is found, `choose_engine`)
native          the algorithm's format beside ours, if it has one
<format>        that format: "speculators", or one of the algorithm's own

export_checkpoint    writes it
plan_export          what it would write, tensor by tensor
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from speculators.checkpoint.engine_profile import EngineProfile, Serving, profile_names, way_out
from speculators.checkpoint.formats import CONFIG_FILE, SPECULATORS, DirectoryContents, OurCheckpoint
from speculators.checkpoint.io import OpenedCheckpoint, fitting_tensors, open_checkpoint, our_contents
from speculators.checkpoint.record import RECORD_FILE
from speculators.checkpoint.tensors import CheckpointPlan, plan_of
from speculators.config import SpeculatorModelConfig, VerifierConfig
from speculators.deploy.card import CARD_FILE, find_report, model_card
from speculators.deploy.check import check_checkpoint, check_opened
from speculators.deploy.config_check import structure_findings
from speculators.deploy.engine import Engine, choose_engine, unserved
from speculators.deploy.report import CheckReport
from speculators.model import SpeculatorModel
from speculators.utils.files import absolute_if_directory, atomic_directory, record_files, refuse_to_replace
from speculators.utils.names import NamedModel, did_you_mean, model_name, refuse_missing_verifier
from speculators.utils.report import PathReport, facts_table

NATIVE = "native"
NOTHING = "; nothing was written"


@dataclass(frozen=True)
class Exported(PathReport):
    """Says where and in which format an export was written; accepted wherever a checkpoint path is."""

    path: Path
    speculators_model_type: str
    format: str
    engine: Engine
    serving: Serving | None
    """How the engine serves the directory; None: it does not."""
    notes: tuple[str, ...] = ()

    @property
    def command(self) -> str | None:
        return None if self.serving is None else self.engine.profile.command(self.serving)

    def tables(self) -> list[Table]:
        facts = {
            "written to": self.path,
            "drafter": self.speculators_model_type,
            "format": self.format,
            "engine": self.engine,
            "serve with": self.command or f"not by {self.engine.profile.name}",
        }
        return [facts_table("exported", facts | ({"note": "\n".join(self.notes)} if self.notes else {}))]


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    engine: str | None = None,
    python: str | None = None,
    profile: str | None = None,
    verifier: str | os.PathLike[str] | NamedModel | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    report: Path | None = None,
) -> Exported:
    """Writes the directory `output` for `engine` and checks it.

    `engine`: a release ("vllm-0.33"), "native" or a format's name; None: the release that the Python `python` has, by
    `choose_engine`. `profile`: its name in earlier releases of ours.
    `checkpoint`: directory, hub id, or the result of training. `verifier`: the name to record in place of the recorded
    one, such as the hub id that the serving machine knows. `dtype`: the type of float tensors ("bfloat16", ...); None
    keeps them. `report`: an evaluation to quote in the card. Raises `ValueError` for a setting that cannot be met, and
    `CheckError` (a `ValueError`) when the checkpoint itself is wrong; nothing is written then.
    """
    refuse_to_replace(Path(output), os.fspath(checkpoint), overwrite=overwrite)
    chosen, format_name = engine_and_format(engine, profile, python)
    export = open_export(os.fspath(checkpoint), Path(output), chosen, format_name, verifier, dtype)
    with atomic_directory(Path(output)) as folder:
        export.contents().write(folder)
        export.write_notes(folder, report)
        algorithm = export.ours.config.speculators_model_type
        found = check_checkpoint(folder, verifier=export.verifier, algorithm=algorithm, engine=chosen.profile.name)
        replace(found, path=Path(checkpoint)).raise_for_errors(NOTHING)  # an export corrects what it can
        record_files(folder)
    return Exported(export.output, algorithm, export.format, chosen, export.serving, export.opened.notes)


def plan_export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    engine: str | None = None,
    python: str | None = None,
    profile: str | None = None,
    verifier: str | os.PathLike[str] | NamedModel | None = None,
    dtype: str | None = None,
    report: Path | None = None,
) -> CheckpointPlan:
    """Says of each tensor what `export_checkpoint` would make of it, and leaves nothing on disk. Raises as it does for
    what is wrong in the checkpoint."""
    chosen, format_name = engine_and_format(engine, profile, python)
    export = open_export(os.fspath(checkpoint), Path(output), chosen, format_name, verifier, dtype)
    contents = export.contents()
    with tempfile.TemporaryDirectory() as folder:
        export.write_notes(Path(folder), report)
        replace(export.check_planned(Path(folder), contents), path=Path(checkpoint)).raise_for_errors(NOTHING)
    opened, kind = export.opened, export.ours.config.speculators_model_type
    tensors = plan_of(contents.tensors, opened.source.tensors(), opened.path, {})
    return CheckpointPlan(opened.path, kind, opened.format, export.format, tensors, opened.notes)


def engine_and_format(engine: str | None, profile: str | None, python: str | None) -> tuple[Engine, str | None]:
    """Returns the release that is spoken of, and the format where one is named."""
    if None not in (engine, profile) and engine != profile:
        raise ValueError(f"engine={engine!r} and profile={profile!r}: they are two names of one setting; give one")
    wanted = engine if engine is not None else profile
    is_release = wanted in profile_names()
    return choose_engine(wanted if is_release else None, python), None if is_release else wanted


@dataclass(frozen=True)
class Export:
    """What is to be written, and where."""

    opened: OpenedCheckpoint
    ours: OurCheckpoint
    engine: Engine
    format: str
    output: Path
    """Absolute."""
    verifier: str
    serving: Serving | None

    def contents(self) -> DirectoryContents:
        if self.format == SPECULATORS:
            return our_contents(self.ours, self.opened.model_class)
        return self.opened.model_class.contract.format_named(self.format).contents(self.ours, self.verifier)

    def write_notes(self, folder: Path, report: Path | None) -> None:
        """Writes the record of training and the model card."""
        if (self.opened.path / RECORD_FILE).is_file():
            shutil.copy(self.opened.path / RECORD_FILE, folder / RECORD_FILE)
        card = model_card(
            self.ours.config,
            name=self.output.name,
            format_name=self.format,
            profile=self.engine.profile,
            serving=self.serving,
            verifier=self.verifier,
            report=find_report(self.opened.path, self.ours.config.speculators_model_type, report),
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")

    def check_planned(self, folder: Path, contents: DirectoryContents) -> CheckReport:
        """Checks the notes in `folder` and what would be written beside them."""
        report = CheckReport(folder, self.engine, format=self.format)
        if self.format == SPECULATORS:
            values, tensors = dict(contents.values), dict(contents.tensors)
            report.add(CONFIG_FILE, structure_findings(values))
        else:
            values = json.loads(self.ours.config.to_json_string())
            tensors = fitting_tensors(self.ours, self.opened.model_class)
        written = replace(self.opened, path=folder, format=self.format, values=values, config=self.ours.config)
        check_opened(replace(written, tensors=tensors, planned=frozenset(contents.tensors)), report, self.verifier)
        return report


def open_export(
    checkpoint: str,
    output: Path,
    engine: Engine,
    format_name: str | None,
    verifier: str | os.PathLike[str] | NamedModel | None,
    dtype: str | None,
) -> Export:
    path = Path(os.path.abspath(output))  # links stay, as in every name that is written down
    name = None if verifier is None else model_name(verifier)
    if name is not None:
        refuse_missing_verifier(name)
        name = absolute_if_directory(name)
    opened = open_checkpoint(checkpoint, verifier=name)
    is_for_engine = format_name is None
    format_name = chosen_format(opened, engine.profile, format_name)
    ours = prepared(opened, name, dtype)
    named = ours.verifier
    if named is None:
        raise ValueError(f"{checkpoint} names no verifier; give it with --verifier")
    contract = opened.model_class.contract
    serving = engine.profile.serving(contract, ours.config, format_name, str(path), named)
    if serving is None and is_for_engine:
        why = unserved(engine.profile, contract, ours.config, format_name, path).why
        raise ValueError(f"{checkpoint}: {why}. --engine {NATIVE} writes it for its own project")
    return Export(opened, ours, engine, format_name, path, named, serving)


def serving_of_checkpoint(
    checkpoint: str, verifier: str | None, profile: EngineProfile, output: Path
) -> Serving | None:
    """Says how an engine serves a checkpoint of ours: as it is, or as written into `output`. None: it does not.

    `verifier`: another than the recorded one, which needs that directory.
    """
    config = SpeculatorModelConfig.from_pretrained(checkpoint)
    contract = SpeculatorModel.registered_model_class_from_config(config).contract
    served = profile.format_of(config.speculators_model_type, contract)
    if served is None:
        return None
    if served == SPECULATORS and verifier is None and config.recorded_verifier is not None:
        return profile.serving(contract, config, SPECULATORS, checkpoint, config.recorded_verifier)
    return export_checkpoint(checkpoint, output, engine=profile.name, verifier=verifier).serving


def chosen_format(opened: OpenedCheckpoint, profile: EngineProfile, wanted: str | None) -> str:
    """Returns the format to write: the `wanted` one, else the one that the engine serves."""
    contract, algorithm = opened.model_class.contract, opened.config.speculators_model_type
    own = [name for known in contract.formats for name in (known.name, *known.aliases)]
    if wanted is None:
        served = profile.format_of(algorithm, contract)
        if served is None:
            raise ValueError(
                f"{profile.name} serves no '{algorithm}' drafter{way_out(algorithm)}; --engine {SPECULATORS} "
                "writes our own format"
            )
        return served
    if wanted == NATIVE:
        if not own:
            raise ValueError(f"'{algorithm}' has no format but ours: use --engine {SPECULATORS}")
        return own[0]
    if wanted not in (SPECULATORS, *own):
        known = [*profile_names(), NATIVE, SPECULATORS, *own]
        raise ValueError(f"engine {wanted!r}: '{algorithm}' can be written as {known}.{did_you_mean(wanted, known)}")
    return wanted if wanted == SPECULATORS else contract.format_named(wanted).name


def named_verifier(verifier: str) -> VerifierConfig:
    try:
        return VerifierConfig.from_pretrained(verifier)
    except OSError as problem:
        reason = str(problem).strip().split("\n")[0]
        raise ValueError(
            f"--verifier {verifier}: its config.json, whose class is recorded, cannot be read ({reason}); name its "
            "directory or hub id"
        ) from problem


def prepared(opened: OpenedCheckpoint, verifier: str | None, dtype: str | None) -> OurCheckpoint:
    """Completes the config, records `verifier`, and converts float tensors to `dtype`."""
    config = opened.model_class.contract.completed(opened.config)
    if verifier is not None and config.speculators_config is not None:
        config.speculators_config.verifier = named_verifier(verifier)
    tensors = dict(opened.tensors)
    if dtype is not None:
        wanted = getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
            raise ValueError(f"dtype={dtype!r} is not a floating type; use bfloat16, float16 or float32")
        tensors = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
    return OurCheckpoint(config, tensors, opened.path)
