"""Checks in seconds, before anyone serves a checkpoint, that it is the one that was trained, and served as such.

    config.json -> what the engine makes of the options -> tensors -> vocabulary map -> verifier -> record of training

vLLM's loaders do not report missing tensors, and its readers fill missing options with their own defaults: it serves a
wrong checkpoint without a message, and the drafter drafts badly. So every rule is checked here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from speculators.checkpoint.findings import Finding, error, warning
from speculators.checkpoint.formats import SPECULATORS, ForeignCheckpoint, build_without_data
from speculators.checkpoint.io import OpenedCheckpoint, local_directory, read_foreign, recognise
from speculators.checkpoint.record import LAYERS, RECORD_FILE, hidden_size_of, read_training_record, verifier_facts
from speculators.config import SpeculatorModelConfig
from speculators.deploy import config_check, deep_check, tensor_check, verifier_check
from speculators.deploy.engine import choose_engine, drafter_findings, notes_on_serving, position_findings, unserved
from speculators.deploy.report import RECORD, CheckReport
from speculators.model import SpeculatorModel
from speculators.utils.files import absolute_if_directory
from speculators.utils.names import NamedModel, model_name, refuse_option
from speculators.utils.util import reading

MAP = "vocabulary map"
FIT = "fits the verifier"
COPIES = "copies of the verifier's weights"
FORWARDS = "forwards of verifier and drafter"
LEARNED_FROM = "the verifier it learned from"


def check_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    verifier: str | os.PathLike[str] | NamedModel | None = None,
    algorithm: str | None = None,
    deep: bool = False,
    engine: str | None = None,
    python: str | None = None,
) -> CheckReport:
    """Checks everything that can be wrong with a checkpoint; `report.raise_for_errors()` raises what it found.

    `checkpoint`: directory, hub id, or the result of training, export or conversion. `verifier`: the one to check
    against in place of the recorded one. `algorithm`: needed only for a directory of another project that several
    algorithms recognise. `deep`: load both models and run them on a few tokens too. `engine`: the release that is to
    serve it ("vllm-0.33"); None: the one that the Python `python` has, by `choose_engine`. Raises `FileNotFoundError`
    when there is no such checkpoint, and `ValueError` when no algorithm, or more than one, recognises it; errors inside
    it are findings of the report.
    """
    path = local_directory(checkpoint)
    report = CheckReport(path, choose_engine(engine, python))
    check_directory(report, None if verifier is None else absolute_if_directory(model_name(verifier)), algorithm)
    if deep:
        check_deeply(report)
    return report


def check_deeply(report: CheckReport) -> None:
    """Runs the models that the report is about; notes in the report why they cannot be run."""
    if report.verifier is None:
        report.skip(FORWARDS, "no verifier is known; give it with --verifier")
        return
    try:
        report.add(FORWARDS, deep_check.deep_findings(report.path, report.verifier))
    except ValueError as problem:
        rule, fix = "verifier and drafter must load and run together", "correct the errors above, or name the verifier"
        report.add(FORWARDS, [error("cannot-run", str(report.path), str(problem), rule, fix)])


def check_directory(report: CheckReport, verifier: str | None, algorithm: str | None) -> None:
    try:
        with reading("the checkpoint"):
            check_contents(report, verifier, algorithm)
    except (OSError, ValueError) as problem:
        fix = "correct the value, or fetch the checkpoint again; if it is right, please report this"
        rule = "every part of a checkpoint must be readable"
        report.findings.append(error("not-checked", str(report.path), str(problem), rule, fix))


def check_contents(report: CheckReport, verifier: str | None, algorithm: str | None) -> None:
    path = report.path
    try:
        values = ForeignCheckpoint(path).values
    except ValueError as problem:
        fix = "correct the file, or fetch it again"
        report.add("config.json", [error("config-unreadable", "config.json", str(problem), "it must be JSON", fix)])
        return
    opened = (
        open_ours(values, report)
        if "speculators_model_type" in values
        else open_foreign(path, report, verifier, algorithm)
    )
    if opened is not None:
        check_opened(opened, report, verifier)


def open_ours(values: dict[str, Any], report: CheckReport) -> OpenedCheckpoint | None:
    """Checks config.json and reads the tensors; None when either cannot be read."""
    report.format = SPECULATORS
    report.speculators_model_type = values["speculators_model_type"]
    report.add("config.json", config_check.structure_findings(values))
    if any(found.code == "type-unknown" for found in report.findings):
        return None
    config, invalid = config_check.read_config(report.path)
    report.note(invalid)
    if config is None:
        return None
    model_class = SpeculatorModel.registered_model_class_from_config(config)
    if report.profile.format_of(config.speculators_model_type, model_class.contract) == SPECULATORS:
        report.add("draft layers", config_check.layer_findings(values))
    if isinstance(values.get(LAYERS), Mapping):
        report.note(config_check.rope_findings(values[LAYERS], LAYERS + "."))
    tensors = read_weights(report)
    if tensors is None:
        return None
    report.note(tensor_check.dtype_findings(values, tensors))
    return OpenedCheckpoint(report.path, SPECULATORS, values, model_class, config, tensors)


def open_foreign(
    path: Path, report: CheckReport, verifier: str | None, algorithm: str | None
) -> OpenedCheckpoint | None:
    """Reads a directory of another project; None when its format's reader refuses it."""
    source = ForeignCheckpoint(path)
    try:
        model_class, known = recognise(source, algorithm)
    except (OSError, ValueError) as problem:
        fix = "name the directory of a drafter, convert it, or say its --algorithm"
        report.findings.append(error("format-unknown", str(path), str(problem), "one format must recognise it", fix))
        return None
    report.format = known.name
    report.add("config.json", known.findings(source))
    report.note(config_check.rope_findings(source.values, ""))
    try:
        with reading("the checkpoint"):
            converted = read_foreign(source, known, verifier)
    except (OSError, ValueError) as problem:
        rule = f"the format {known.name!r} must be readable"
        report.findings.append(error("unreadable", str(path), str(problem), rule, "take it from where it was made"))
        return None
    report.notes = tuple(converted.notes)
    report.speculators_model_type = converted.config.speculators_model_type
    config = json.loads(converted.config.to_json_string())
    return OpenedCheckpoint(path, known.name, config, model_class, converted.config, converted.tensors)


def read_weights(report: CheckReport) -> dict[str, Tensor] | None:
    try:
        return ForeignCheckpoint(report.path).tensors()
    except (OSError, ValueError) as problem:
        rule, fix = "the weights must be beside config.json", "copy the checkpoint again"
        report.add("weights", [error("weights-unreadable", "model.safetensors", str(problem), rule, fix)])
        return None


def check_opened(opened: OpenedCheckpoint, report: CheckReport, verifier: str | None) -> None:
    """Checks everything that needs the config and the tensors."""
    contract, config, tensors = opened.model_class.contract, opened.config, opened.tensors
    report.unserved = unserved(report.profile, contract, config, opened.format, report.path)
    is_served = report.profile.format_of(config.speculators_model_type, contract) == opened.format
    try:
        with reading("config.json"):
            report.add(report.options_step, contract.findings(opened.values, config, opened.format))
            report.note(config_check.count_findings(config, contract.most_drafts(config)))
            expected = contract.expected_tensors(opened.model_class, config)
            layer_ids = read_layers(opened)
    except ValueError as problem:
        report.findings.append(
            error("config-invalid", "config.json", str(problem), "it must describe a drafter", "correct the value")
        )
        return
    shared = contract.shared_tensors(config)
    report.add("tensors", tensor_check.tensor_findings(tensors, expected, shared, is_served=is_served))
    report.note(tensor_check.file_findings(report.path))
    stored = list(tensors) if opened.format == SPECULATORS else opened.names_on_disk
    report.note(drafter_findings(report.profile, contract, config, opened.format, stored))
    if {tensor_check.MAP, tensor_check.KEPT} <= tensors.keys() & expected.keys():
        report.add(MAP, tensor_check.map_findings(tensors, config.target_vocab_size))
    record = record_of(report)
    check_verifier(opened, report, verifier, layer_ids, record)
    if record is not None:
        hidden = hidden_size_of(opened.values)
        is_ours = opened.format == SPECULATORS
        report.add(
            RECORD,
            [
                *config_check.changed_config_findings(record, opened.values, contract.training_keys, is_ours=is_ours),
                *tensor_check.changed_tensor_findings(record, tensors, hidden),
            ],
        )
        if tensor_check.compared_by_sketch(record, tensors):
            why = f"{RECORD_FILE} is of an earlier release, without their hashes: a factor or a small edit is not seen"
            report.skip("exact values of weights stored in another type", why)
    report.findings = without_duplicates(report.findings)


def read_layers(opened: OpenedCheckpoint) -> tuple[int, ...]:
    """Returns the verifier's layers that the drafter reads; empty when config.json does not say, which is a finding."""
    model = build_without_data(opened.model_class, SpeculatorModelConfig.from_dict(opened.config.to_dict()))
    try:
        return model.capture.aux_layer_ids
    except ValueError:
        return ()


def record_of(report: CheckReport) -> Mapping[str, Any] | None:
    """Reads the record of training; notes in the report when it is missing or of another version."""
    try:
        record = read_training_record(report.path)
    except ValueError as problem:
        report.skip(RECORD, str(problem))
        return None
    if record is None:
        why = "edits of config.json or weights after training cannot be detected"
        report.skip(RECORD, f"without {RECORD_FILE}, {why}")
        if report.format == SPECULATORS:
            fix = "take it from where the checkpoint was trained; other writers write none"
            report.findings.append(warning("record-missing", RECORD_FILE, "not in the directory", why, fix))
    return record


def check_verifier(
    opened: OpenedCheckpoint,
    report: CheckReport,
    verifier: str | None,
    layer_ids: tuple[int, ...],
    record: Mapping[str, Any] | None,
) -> None:
    settings, contract = opened.config.speculators_config, opened.model_class.contract
    name = verifier or (settings.verifier.name_or_path if settings is not None else None)
    name = name or ((record or {}).get("verifier") or {}).get("name_or_path")
    report.verifier = name
    if name is None:
        report.skip(FIT, f"{report.path} names no verifier; give it with --verifier")
        return
    try:
        refuse_option(name)
    except ValueError as problem:
        fix = "write a hub id or an absolute path"
        report.findings.append(error("verifier-name", verifier_check.WHERE, repr(name), str(problem), fix))
        report.skip(FIT, "the verifier has no usable name")
        return
    report.serving = report.profile.serving(contract, opened.config, opened.format, str(report.path), name)
    if report.serving is not None:
        report.unserved = None
    report.notes = (*report.notes, *notes_on_serving(report.profile, report.serving, report.path))
    verifier_config, found = verifier_check.verifier_config(name)
    report.add("verifier is there", found)
    if verifier_config is None:
        report.skip(FIT, "the verifier cannot be reached")
        return
    same_tokenizer = verifier_check.has_same_tokenizer(record, name)
    report.add(
        FIT, verifier_check.fit_findings(verifier_config, opened.config, layer_ids, same_tokenizer=same_tokenizer)
    )
    report.note(position_findings(report.profile, opened.config, report.serving, verifier_config))
    if not verifier_check.weights_are_here(name):
        why = "they are not on this machine; download them into the cache, or name a directory with --verifier"
        report.skip("the verifier's weights", why)
    else:
        report.note(verifier_check.rows_not_finite(name))
        copies = {k: v for k, v in contract.verifier_copies(opened.config).items() if k in opened.tensors}
        origin = None if record is None else record.get("origin", "training")
        if copies:
            report.add(COPIES, verifier_check.copy_findings(opened.tensors, copies, name, origin))
    if record is not None:
        report.add(LEARNED_FROM, verifier_check.changed_verifier_findings(record, name))
        if verifier_facts(name)["tokenizer"] is None:
            report.skip("the verifier's tokenizer", "it cannot be read here")


def without_duplicates(findings: list[Finding]) -> list[Finding]:
    """Reports a missing key once: joins the rule that engines need it with its value in training."""
    missing = {found.where for found in findings if found.code == "key-missing"}
    changed = {found.where: found for found in findings if found.code == "config-changed" and found.where in missing}
    kept = []
    for found in findings:
        if found.code == "config-changed" and found.where in missing:
            continue
        if found.code == "key-missing" and found.where in changed:
            found = replace(found, rule=f"{found.rule}; {changed[found.where].rule}")
        kept.append(found)
    return kept
