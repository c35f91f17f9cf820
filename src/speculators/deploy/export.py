"""Writes from one checkpoint the directory that a given engine needs.

engine          the format that is written
vllm-0.33, ...  the one in which that release serves the algorithm (default: the release that is found, `choose_engine`)
native          the algorithm's format beside ours, if it has one
<format>        that format: "speculators", or one of the algorithm's own
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from speculators.checkpoint.engine_profile import EngineProfile, Serving, profile_names, profiles
from speculators.checkpoint.formats import SPECULATORS, OurCheckpoint
from speculators.checkpoint.io import OpenedCheckpoint, open_checkpoint, write_ours
from speculators.checkpoint.record import RECORD_FILE
from speculators.config import SpeculatorModelConfig, VerifierConfig
from speculators.deploy.card import CARD_FILE, find_report, model_card
from speculators.deploy.check import check_checkpoint
from speculators.deploy.engine import Engine, choose_engine
from speculators.deploy.report import CheckError, CheckReport
from speculators.model import SpeculatorModel
from speculators.utils.files import absolute_if_directory, atomic_directory, record_files, refuse_to_replace
from speculators.utils.names import NamedModel, did_you_mean, model_name, refuse_missing_verifier
from speculators.utils.report import PathReport, facts_table

NATIVE = "native"


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
    checkpoint = os.fspath(checkpoint)
    name = None if verifier is None else model_name(verifier)
    if None not in (engine, profile) and engine != profile:
        raise ValueError(f"engine={engine!r} and profile={profile!r}: they are two names of one setting; give one")
    wanted = engine if engine is not None else profile
    chosen = choose_engine(wanted if wanted in profile_names() else None, python)
    format_name = wanted if wanted not in profile_names() else None
    return write_export(checkpoint, Path(output), chosen, format_name, name, dtype, report, overwrite=overwrite)


def write_export(
    checkpoint: str,
    output: Path,
    engine: Engine,
    format_name: str | None,
    verifier: str | None,
    dtype: str | None,
    report: Path | None,
    *,
    overwrite: bool,
) -> Exported:
    path = Path(os.path.abspath(output))  # links stay, as in every name that is written down
    refuse_to_replace(output, checkpoint, overwrite=overwrite)
    if verifier is not None:
        refuse_missing_verifier(verifier)
        verifier = absolute_if_directory(verifier)
    opened = open_checkpoint(checkpoint, verifier=verifier)
    profile = engine.profile
    is_for_engine = format_name is None
    format_name = chosen_format(opened, profile, format_name)
    ours = prepared(opened, verifier, dtype)
    named = ours.verifier
    if named is None:
        raise ValueError(f"{checkpoint} names no verifier; give it with --verifier")
    contract = opened.model_class.contract
    serving = profile.serving(contract, ours.config, format_name, str(path), named)
    if serving is None and is_for_engine:
        why = "; ".join(found.found for found in contract.findings(opened.values, ours.config))
        raise ValueError(
            f"{profile.name} cannot serve {checkpoint}: {why}. --engine {NATIVE} writes it for its own project"
        )
    with atomic_directory(output) as folder:
        if format_name == SPECULATORS:
            write_ours(ours, opened.model_class, folder)
        else:
            known = contract.format_named(format_name)
            known.write(ours, folder, named)
        if (opened.path / RECORD_FILE).is_file():
            shutil.copy(opened.path / RECORD_FILE, folder / RECORD_FILE)
        card = model_card(
            ours.config,
            name=output.name,
            format_name=format_name,
            profile=profile,
            serving=serving,
            verifier=named,
            report=find_report(opened.path, ours.config.speculators_model_type, report),
        )
        (folder / CARD_FILE).write_text(card)
        algorithm = ours.config.speculators_model_type
        refuse_errors(check_checkpoint(folder, verifier=named, algorithm=algorithm, engine=profile.name), checkpoint)
        record_files(folder)
    return Exported(path, algorithm, format_name, engine, serving, opened.notes)


def serving_of_export(
    directory: str | Path, verifier: str | None = None, profile: EngineProfile | None = None
) -> Serving:
    """Says how an engine serves a directory that was exported in another project's format.

    `profile=None`: by `choose_engine`. Raises `ValueError` when it names no verifier, or the engine does not serve it.
    """
    profile = profile or choose_engine().profile
    opened = open_checkpoint(directory, verifier=verifier)
    recorded, contract = opened.config.speculators_config, opened.model_class.contract
    named = verifier or (None if recorded is None else recorded.verifier.name_or_path)
    if named is None:
        raise ValueError(f"{directory} names no verifier; give it with --verifier")
    where = absolute_if_directory(str(directory))
    serving = profile.serving(contract, opened.config, opened.format, where, named)
    if serving is None:
        model_type = opened.config.speculators_model_type
        raise ValueError(
            f"{directory}: {profile.title} does not serve a drafter of type {model_type!r} in the format "
            f"{opened.format!r}{way_out(model_type)}"
        )
    return serving


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


def way_out(model_type: str) -> str:
    """Says which releases serve such drafters, for a message about one that does not."""
    serving = [profile.name for profile in profiles() if model_type in profile.drafters]
    return f"; `speculators export --engine` writes what {' or '.join(serving)} serves" if serving else ""


def refuse_errors(report: CheckReport, checkpoint: str | Path) -> None:
    """An export corrects what it can; the errors that remain are in the checkpoint itself."""
    if not report.ok:
        raise CheckError(replace(report, path=Path(checkpoint)), "; nothing was written")


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
