"""The library's entry points to conversion, under the names of earlier releases."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from speculators.checkpoint.formats import ForeignCheckpoint
from speculators.checkpoint.io import local_directory, recognise
from speculators.convert.conversion import ConvertedCheckpoint, convert_checkpoint
from speculators.model import SpeculatorModel

OLDER_OPTIONS = ("validate", "trust_remote_code")
"""Arguments of earlier releases that decide nothing here: what is written is always checked, code is never run."""


def convert_model(
    model: str,
    verifier: str,
    algorithm: str | None = None,
    output_path: str | Path = "converted",
    validate_device: str | None = None,
    **kwargs: Any,
) -> ConvertedCheckpoint:
    """Convert the checkpoint `model` for `verifier`. With `validate_device` the result is loaded there once."""
    readers = [name for name in SpeculatorModel.available_names() if SpeculatorModel.get_class(name).contract.formats]
    if algorithm is not None and algorithm not in readers:
        raise ValueError(f"Unsupported algorithm: {algorithm!r}; formats of other projects are known of {readers}")
    options = {key: value for key, value in kwargs.items() if key not in OLDER_OPTIONS}
    written = convert_checkpoint(model, output_path, verifier=verifier, algorithm=algorithm, **options)
    if validate_device is not None:
        load_once(written.path, validate_device)
    return written


def load_once(path: Path, device: str) -> None:
    """The drafter of a directory must load whole."""
    _, info = SpeculatorModel.from_pretrained(
        str(path), device_map=device, dtype=torch.float32, output_loading_info=True
    )
    odd = info["missing_keys"] + info["unexpected_keys"]
    if odd:
        raise ValueError(f"{path} does not load whole: {odd} are missing or have no place")


def maybe_convert_external_checkpoint(
    model: str,
    verifier: str | None = None,
    cache_dir: str | Path | None = None,
    output_path: str | Path | None = None,
    config_dict: dict[str, Any] | None = None,
) -> str:
    """A speculator's path as it is; a checkpoint of another project converted, by default to a temporary directory."""
    path = local_directory(model, cache_dir)
    values = config_dict if config_dict is not None else json.loads((path / "config.json").read_text())
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
