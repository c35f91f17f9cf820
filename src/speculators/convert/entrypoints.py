"""Converts checkpoints of other projects: `convert_checkpoint`, and the entry points of earlier releases.

convert_checkpoint                   any format that an algorithm reads -> a directory in our format
plan_conversion                      what it would write, tensor by tensor
convert_model                        the same by the signature of earlier releases
maybe_convert_external_checkpoint    converts only where the directory is not ours already
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PretrainedConfig

from speculators.checkpoint.findings import CONVERTED
from speculators.checkpoint.formats import SPECULATORS, ForeignCheckpoint, OurCheckpoint
from speculators.checkpoint.io import (
    OpenedCheckpoint,
    local_directory,
    open_checkpoint,
    our_contents,
    recognise,
    refuse_unknown_options,
)
from speculators.checkpoint.record import computed_config, write_training_record
from speculators.checkpoint.tensors import CheckpointPlan, plan_of
from speculators.config import SpeculatorModelConfig, VerifierConfig, installed_version
from speculators.deploy.check import check_checkpoint, check_opened
from speculators.deploy.config_check import rope_findings, structure_findings
from speculators.deploy.engine import choose_engine
from speculators.deploy.report import CheckError, CheckReport
from speculators.model import SpeculatorModel
from speculators.nn.rope import is_frequency_table
from speculators.utils.files import (
    absolute_if_directory,
    atomic_directory,
    read_json_object,
    record_files,
    refuse_to_replace,
)
from speculators.utils.names import NamedModel, model_name
from speculators.utils.quantized import source
from speculators.utils.report import PathReport, facts_table, work
from speculators.verifier.config import first_line
from speculators.verifier.loading import EMBEDDING, HEAD, NORM, is_copy, refuse_missing_device

AUTO = "auto"
VERIFIERS_OWN = {EMBEDDING: EMBEDDING, HEAD: HEAD, "verifier_lm_head.weight": HEAD, "verifier_norm.weight": NORM}
"""Tensors that some projects (and older releases of ours) store beside the drafter's, and their names there."""
OLDER_OPTIONS = ("validate", "trust_remote_code")
"""Arguments of earlier releases without effect: the result is always checked, and remote code is never run."""

NOT_SERVABLE = "not-servable"
"""The code of what is right, and the engine does not serve: such drafters are decoded here, or served by others."""


@dataclass(frozen=True)
class ConvertedCheckpoint(PathReport):
    """The directory that a conversion wrote, and notes on it; accepted wherever a checkpoint path is."""

    path: Path
    speculators_model_type: str
    source_format: str
    notes: tuple[str, ...] = ()

    def tables(self) -> list[Table]:
        facts = {
            "written to": self.path,
            "from format": self.source_format,
            "speculator": self.speculators_model_type,
            "check it with": shlex.join(
                ["speculators", "check", *(["--"] if str(self.path).startswith("-") else []), str(self.path)]
            ),
        }
        return [facts_table("converted", facts | ({"note": "\n".join(self.notes)} if self.notes else {}))]


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    verifier: str,
    algorithm: str | None = None,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    validate_device: str | None = None,
    **options: Any,
) -> ConvertedCheckpoint:
    """Reads `source` (a directory or hub id in another project's format, or of an older release of ours), checks it as
    `speculators check` does, loads it on `validate_device` where that is given, and writes it to `output` in ours.

    `algorithm` is needed only where several recognise the source ("auto": None). `options` give what the source does
    not say, such as the verifier layers that an EAGLE-3 head reads; each format takes its own. Every tensor of the
    source is used, or proven to be the verifier's own. Raises `ValueError` for a source that cannot be converted or has
    errors, as one of another verifier has (nothing is written then), `FileNotFoundError` for one that does not exist,
    `RuntimeError` for an unreadable verifier.
    """
    output = Path(output)
    refuse_to_replace(output, source, overwrite=overwrite)
    require_verifier(verifier)
    verifier = absolute_if_directory(verifier)
    options = {key: value for key, value in options.items() if value is not None}
    path = local_directory(source, cache_dir)
    with work():  # what is wrong from here on is in the source, or known by what it is
        opened = open_checkpoint(path, verifier=verifier, algorithm=None if algorithm == AUTO else algorithm, **options)
        return write_converted(opened, output, verifier, options, validate_device)


def write_converted(
    opened: OpenedCheckpoint, output: Path, verifier: str, options: Mapping[str, Any], validate_device: str | None
) -> ConvertedCheckpoint:
    ours, notes, left_out = converted(opened, verifier, options)
    if left_out:
        notes = (*notes, f"left out, because they are the verifier's own or follow from config.json: {list(left_out)}")
    with atomic_directory(output) as folder:
        our_contents(ours, opened.model_class).write(folder)
        write_training_record(folder, opened.model_class.contract.training_keys, origin="conversion")
        notes = (*notes, *refuse_wrong(check_checkpoint(folder, verifier=verifier), opened))
        if validate_device is not None:
            load_once(folder, validate_device)
        record_files(folder)
    return ConvertedCheckpoint(output, ours.config.speculators_model_type, opened.format, notes)


def plan_conversion(
    source: str | Path,
    *,
    verifier: str,
    algorithm: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> CheckpointPlan:
    """Says of each tensor what `convert_checkpoint` would make of it, and writes nothing. Raises as it does."""
    require_verifier(verifier)
    verifier = absolute_if_directory(verifier)
    path = local_directory(source, cache_dir)
    options = {key: value for key, value in options.items() if value is not None}
    with work():
        opened = open_checkpoint(path, verifier=verifier, algorithm=None if algorithm == AUTO else algorithm, **options)
        ours, notes, left_out = converted(opened, verifier, options)
        contents = our_contents(ours, opened.model_class)
        values, kept = dict(contents.values), dict(contents.tensors)
        with tempfile.TemporaryDirectory() as empty:
            report = CheckReport(Path(empty), choose_engine(), format=SPECULATORS)
            report.add("config.json", structure_findings(values))
            written = replace(opened, path=Path(empty), format=SPECULATORS, values=values, config=ours.config)
            check_opened(replace(written, tensors=kept), report, verifier)
        notes = (*notes, *refuse_wrong(report, opened))
    read = {**opened.tensors, **opened.copies}
    tensors = plan_of(kept, opened.source.tensors(), opened.path, {read[name]: why for name, why in left_out.items()})
    kind = ours.config.speculators_model_type
    return CheckpointPlan(opened.path, kind, opened.format, SPECULATORS, tensors, tuple(notes))


def converted(
    opened: OpenedCheckpoint, verifier: str, options: Mapping[str, Any]
) -> tuple[OurCheckpoint, Sequence[str], dict[str, str]]:
    """Completes the config; returns the checkpoint as it will be written, notes, and why tensors are left out."""
    if opened.format == SPECULATORS:
        config, notes = upgraded(opened, verifier, options)
    else:
        config, notes = opened.model_class.contract.completed(opened.config), opened.notes
    expected = opened.model_class.contract.expected_tensors(opened.model_class, config)
    left_out = proven_copies(opened, expected.keys(), verifier)
    return OurCheckpoint(config, opened.tensors, opened.path), notes, left_out


def refuse_wrong(report: CheckReport, opened: OpenedCheckpoint) -> list[str]:
    """Raises `CheckError` for a checkpoint with errors; returns as notes what is right and not served."""
    found = [*report.findings, *rope_findings(opened.values, "")]  # of the source: what is written says rope once
    wrong = [finding for finding in found if finding.code != NOT_SERVABLE]
    if any(finding.severity == "error" for finding in wrong):
        raise CheckError(replace(report, path=opened.path, findings=wrong), "; nothing was written")
    return [f"{finding.where}: {finding.found}; {finding.rule}" for finding in found if finding.code == NOT_SERVABLE]


def upgraded(
    opened: OpenedCheckpoint, verifier: str, options: Mapping[str, Any]
) -> tuple[SpeculatorModelConfig, tuple[str, ...]]:
    """Completes the config of an older release of ours, and says what it wrote.

    Raises `ValueError` when nothing is missing and no tensor is left over: then `export` does what is left to do."""
    contract = opened.model_class.contract
    refuse_unknown_options(options, contract.upgrade_options, "an older speculator")
    config = contract.upgraded(opened.config, verifier, **options)
    new, old = computed_config(json.loads(config.to_json_string())), computed_config(opened.values)
    written = {key: value for key, value in new.items() if value is not None and old.get(key) != value}
    expected = contract.expected_tensors(opened.model_class, config)
    if not written and opened.tensors.keys() <= expected.keys():
        raise ValueError(f"{opened.path} is a speculator already; `speculators export` writes it for an engine")
    config.speculators_version = installed_version()
    if config.speculators_config is not None:
        config.speculators_config.verifier = VerifierConfig.from_pretrained(verifier)
    said = ", ".join(f"{key}: {value}" for key, value in written.items()) or "config.json as it was"
    return config, (f"a speculator of release {opened.values.get('speculators_version', 'unknown')}; written: {said}",)


def proven_copies(opened: OpenedCheckpoint, expected: Collection[str], verifier: str) -> dict[str, str]:
    """Returns why tensors are left out: they are the verifier's own, or follow from config.json. Raises `ValueError`
    for others that the drafter has no place for: without them it would draft something else."""
    unused = {**{name: tensor for name, tensor in opened.tensors.items() if name not in expected}, **opened.copies}
    kept_V, nested = opened.tensors.get("t2d"), getattr(opened.config, "transformer_layer_config", None)
    proven, other = dict[str, str](), list[str]()
    for name, tensor in sorted(unused.items()):
        theirs = VERIFIERS_OWN.get(name)
        if theirs is not None and is_copy(tensor, theirs, verifier, kept_V):
            proven[name] = "a copy of the verifier's, compared value by value"
        elif name.endswith("rotary_emb.inv_freq") and is_frequency_table(tensor, nested):
            proven[name] = "it follows from config.json"
        else:
            other.append(name)
    if other:
        raise ValueError(
            f"{opened.path} has {other}, which a drafter of type {opened.config.speculators_model_type!r} by its "
            "config.json has no place for, and which are no copies of the verifier's: left out, it would draft "
            "something else. Correct config.json if it counts them wrongly; else nothing here computes such a drafter"
        )
    return proven


def require_verifier(verifier: str) -> None:
    """Raises `RuntimeError` unless the verifier's config can be read: its vocabulary, layers and class go into ours."""
    try:
        PretrainedConfig.get_config_dict(**source(verifier))
    except (OSError, ValueError) as problem:
        raise RuntimeError(
            f"the config of verifier '{verifier}' cannot be read ({first_line(problem)}); name its path or hub id"
        ) from problem


def convert_model(
    model: str | os.PathLike[str],
    verifier: str | os.PathLike[str] | NamedModel,
    algorithm: str | None = None,
    output_path: str | os.PathLike[str] = CONVERTED,
    validate_device: str | None = None,
    **kwargs: Any,
) -> ConvertedCheckpoint:
    """Converts the checkpoint `model` for `verifier`; with `validate_device`, loads it there first.

    `algorithm`: None: recognised by what is there. `kwargs`: `overwrite`, `cache_dir`, and what the source leaves out,
    as its format takes it. Raises as `convert_checkpoint` does, and `ValueError` for an algorithm without formats of
    other projects.
    """
    readers = [name for name in SpeculatorModel.available_names() if SpeculatorModel.get_class(name).contract.formats]
    if algorithm not in (None, AUTO, *readers):
        raise ValueError(f"Unsupported algorithm: {algorithm!r}; formats of other projects are known of {readers}")
    options = {key: value for key, value in kwargs.items() if key not in OLDER_OPTIONS}
    options["validate_device"] = validate_device
    return convert_checkpoint(
        os.fspath(model), Path(output_path), verifier=model_name(verifier), algorithm=algorithm, **options
    )


def load_once(path: Path, device: str) -> None:
    """Raises `ValueError` unless the drafter of a directory loads without missing or unexpected tensors."""
    refuse_missing_device(device)
    _, info = SpeculatorModel.from_pretrained(
        str(path), device_map=device, dtype=torch.float32, output_loading_info=True
    )
    odd = info["missing_keys"] + info["unexpected_keys"]
    if odd:
        raise ValueError(f"{path} does not load completely: {odd} are missing or unexpected")


def maybe_convert_external_checkpoint(
    model: str,
    verifier: str | None = None,
    cache_dir: str | Path | None = None,
    output_path: str | Path | None = None,
    config_dict: dict[str, Any] | None = None,
) -> str:
    """Returns a speculator's path as it is; converts a checkpoint of another project, by default to a temporary
    directory, and returns that path.

    Raises `NotImplementedError` when no algorithm recognises it, `ValueError` when it needs a verifier.
    """
    path = local_directory(model, cache_dir)
    values = config_dict if config_dict is not None else read_json_object(path / "config.json")
    if "speculators_model_type" in values:
        return model
    try:
        recognise(ForeignCheckpoint(path))
    except ValueError as problem:
        raise NotImplementedError(f"Cannot auto-convert '{model}': {problem}") from problem
    if verifier is None:
        raise ValueError(f"'{model}' is in the format of another project and is converted for a verifier: name it")
    target = output_path or Path(tempfile.mkdtemp(prefix="speculators-")) / path.name
    return str(convert_checkpoint(path, target, verifier=verifier).path)
