"""Writes from one checkpoint the directory that a given engine needs.

profile         the format that is written
vllm-0.32       the format in which vLLM 0.32 serves the algorithm (the default)
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

from speculators.checkpoint.findings import VLLM_PROFILE
from speculators.checkpoint.formats import SPECULATORS, OurCheckpoint, Serving
from speculators.checkpoint.io import OpenedCheckpoint, open_checkpoint, write_ours
from speculators.checkpoint.record import RECORD_FILE
from speculators.config import VerifierConfig
from speculators.deploy.card import CARD_FILE, find_report, model_card
from speculators.deploy.check import check_checkpoint
from speculators.deploy.report import CheckError, CheckReport
from speculators.utils.files import absolute_if_directory, atomic_directory, record_files, refuse_to_replace
from speculators.utils.names import NamedModel, model_name, refuse_missing_verifier
from speculators.utils.report import PathReport, facts_table

NATIVE = "native"


@dataclass(frozen=True)
class Exported(PathReport):
    """Says where and in which format an export was written; accepted wherever a checkpoint path is."""

    path: Path
    speculators_model_type: str
    format: str
    serving: Serving | None
    """How to serve the directory; None: vLLM does not serve such drafters."""
    notes: tuple[str, ...] = ()

    def tables(self) -> list[Table]:
        facts = {
            "written to": self.path,
            "drafter": self.speculators_model_type,
            "format": self.format,
            "serve with": "not by vLLM" if self.serving is None else self.serving.command,
        }
        return [facts_table("exported", facts | ({"note": "\n".join(self.notes)} if self.notes else {}))]


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    profile: str = VLLM_PROFILE,
    verifier: str | os.PathLike[str] | NamedModel | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    report: Path | None = None,
) -> Exported:
    """Writes the directory `output` for the engine `profile` and checks it.

    `checkpoint`: directory, hub id, or the result of training. `verifier`: the name to record in place of the recorded
    one, such as the hub id that the serving machine knows. `dtype`: the type of float tensors ("bfloat16", ...); None
    keeps them. `report`: an evaluation to quote in the card. Raises `ValueError` for a setting that cannot be met, and
    `CheckError` (a `ValueError`) when the checkpoint itself is wrong; nothing is written then.
    """
    checkpoint = os.fspath(checkpoint)
    name = None if verifier is None else model_name(verifier)
    return write_export(checkpoint, Path(output), profile, name, dtype, report, overwrite=overwrite)


def write_export(
    checkpoint: str,
    output: Path,
    profile: str,
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
    format_name = chosen_format(opened, profile)
    ours = prepared(opened, verifier, dtype)
    named = ours.verifier
    if named is None:
        raise ValueError(f"{checkpoint} names no verifier; give it with --verifier")
    contract = opened.model_class.contract
    serving = contract.serving(ours.config, format_name, str(path), named)
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
            serving=serving,
            verifier=named,
            report=find_report(opened.path, ours.config.speculators_model_type, report),
        )
        (folder / CARD_FILE).write_text(card)
        refuse_errors(
            check_checkpoint(folder, verifier=named, algorithm=ours.config.speculators_model_type), checkpoint
        )
        record_files(folder)
    return Exported(path, ours.config.speculators_model_type, format_name, serving, opened.notes)


def serving_of_export(directory: str | Path, verifier: str | None = None) -> Serving:
    """Says how vLLM serves a directory that was exported in another project's format.

    Raises `ValueError` when it names no verifier, or vLLM does not serve it.
    """
    opened = open_checkpoint(directory, verifier=verifier)
    recorded, contract = opened.config.speculators_config, opened.model_class.contract
    named = verifier or (None if recorded is None else recorded.verifier.name_or_path)
    if named is None:
        raise ValueError(f"{directory} names no verifier; give it with --verifier")
    serving = contract.serving(opened.config, opened.format, absolute_if_directory(str(directory)), named)
    if serving is None:
        raise ValueError(
            f"{directory}: vLLM 0.32 does not serve a drafter of type {opened.config.speculators_model_type!r} in the "
            f"format {opened.format!r}; `speculators export` without --profile writes what it serves"
        )
    return serving


def refuse_errors(report: CheckReport, checkpoint: str | Path) -> None:
    """An export corrects what it can; the errors that remain are in the checkpoint itself."""
    if not report.ok:
        raise CheckError(replace(report, path=Path(checkpoint)), "; nothing was written")


def chosen_format(opened: OpenedCheckpoint, profile: str) -> str:
    contract, algorithm = opened.model_class.contract, opened.config.speculators_model_type
    own = [known.name for known in contract.formats]
    if profile == VLLM_PROFILE:
        if contract.served_format is None:
            raise ValueError(
                f"{VLLM_PROFILE} serves no '{algorithm}' drafter; --profile {SPECULATORS} writes our own format"
            )
        return contract.served_format
    if profile == NATIVE:
        if not own:
            raise ValueError(f"'{algorithm}' has no format but ours: use --profile {SPECULATORS}")
        return own[0]
    if profile not in (SPECULATORS, *own):
        raise ValueError(f"profile {profile!r}: '{algorithm}' can be written as {[VLLM_PROFILE, SPECULATORS, *own]}")
    return profile


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
