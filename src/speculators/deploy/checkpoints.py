"""What a directory or hub id given to `serve` is, from its config.json alone: a speculator, or a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from speculators.checkpoint.formats import CONFIG_FILE
from speculators.checkpoint.io import refuse_run
from speculators.checkpoint.record import RECORD_FILE
from speculators.utils.files import absolute_if_directory, looks_like_a_path


@dataclass(frozen=True)
class SpeculatorFacts:
    """What a speculator's config.json says about serving it."""

    path: str
    """Absolute: the server may run elsewhere."""
    speculators_model_type: str
    verifier: str | None
    num_speculative_tokens: int | None


def read_config(name: str) -> dict[str, Any] | None:
    """config.json behind a name, {} where a model of the hub has none. None: the hub cannot be asked from here, but
    perhaps by the server."""
    return local_config(name) if looks_like_a_path(name) else hub_config(name)


def speculator_facts(name: str, values: dict[str, Any] | None) -> SpeculatorFacts | None:
    """`values`: what `read_config` gave. None: no speculator, as far as is known."""
    if values is None or "speculators_model_type" not in values:
        return None
    settings = values.get("speculators_config") or {}
    methods = settings.get("proposal_methods") or [{}]
    return SpeculatorFacts(
        path=absolute_if_directory(name),
        speculators_model_type=values["speculators_model_type"],
        verifier=(settings.get("verifier") or {}).get("name_or_path"),
        num_speculative_tokens=methods[0].get("speculative_tokens"),
    )


def is_export(model: str) -> bool:
    """Whether it is a directory that `export` wrote, which keeps the record of training in any layout."""
    return (Path(model) / RECORD_FILE).is_file()


@lru_cache  # without a network, each time costs half a minute of tries
def hub_config(name: str) -> dict[str, Any] | None:
    try:
        path = hf_hub_download(name, CONFIG_FILE)
    except LocalEntryNotFoundError:  # not in the cache either
        return None
    except EntryNotFoundError:
        return {}
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name} is no directory here, and the hub gives no model of that name ({reason}); name the directory or "
            "the hub id of a speculator or a model"
        ) from error
    return parsed(Path(path))


def local_config(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{name} {found}; give the directory of a checkpoint or model, or a model's hub id")
    if not (path / CONFIG_FILE).is_file():
        refuse_run(path)
        raise ValueError(f"{name} has no {CONFIG_FILE}: it is neither a speculator nor a model")
    return parsed(path / CONFIG_FILE)


def parsed(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): the checkpoint is damaged") from error
