"""What a directory or hub id given to `serve` is, from its config.json alone: a speculator, or a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.checkpoint.io import refuse_run
from speculators.checkpoint.record import RECORD_FILE
from speculators.utils.files import absolute_if_directory


@dataclass(frozen=True)
class SpeculatorFacts:
    """What a speculator's config.json says about serving it."""

    path: str
    """Absolute: the server may run elsewhere."""
    speculators_model_type: str
    verifier: str | None
    num_speculative_tokens: int | None


def speculator_facts(model: str) -> SpeculatorFacts | None:
    """None: no speculator. So is a hub id that cannot be read here: the server may be able to."""
    values = local_config(model) if Path(model).is_dir() or looks_local(model) else hub_config(model)
    if values is None or "speculators_model_type" not in values:
        return None
    settings = values.get("speculators_config") or {}
    methods = settings.get("proposal_methods") or [{}]
    return SpeculatorFacts(
        path=absolute_if_directory(model),
        speculators_model_type=values["speculators_model_type"],
        verifier=(settings.get("verifier") or {}).get("name_or_path"),
        num_speculative_tokens=methods[0].get("speculative_tokens"),
    )


def is_export(model: str) -> bool:
    """Whether it is a directory that `export` wrote, which keeps the record of training in any layout."""
    return (Path(model) / RECORD_FILE).is_file()


def looks_local(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def hub_config(model: str) -> dict[str, Any] | None:
    """config.json of a hub id, from the hub or its cache."""
    from transformers import PretrainedConfig

    try:
        return dict(PretrainedConfig.get_config_dict(model)[0])
    except OSError:
        return None


def local_config(model: str) -> dict[str, Any] | None:
    """config.json of a local directory; None for what is no directory (a hub id)."""
    path = Path(model)
    if not path.is_dir():
        if looks_local(model):
            raise ValueError(f"{model} is no directory; give a checkpoint's directory or a model's hub id")
        return None
    try:
        return dict(json.loads((path / "config.json").read_text()))
    except FileNotFoundError as error:
        refuse_run(path)
        raise ValueError(f"{model} has no config.json: it is neither a speculator nor a model") from error
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not JSON ({error}): the checkpoint is damaged") from error
