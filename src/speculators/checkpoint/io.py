"""Opens checkpoints of any format in our terms (ours by config.json, another project's by what an algorithm
recognises), writes ours, and says from config.json alone what a directory or hub id is."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from speculators.checkpoint.formats import (
    CONFIG_FILE,
    SPECULATORS,
    CheckpointFormat,
    Converted,
    DirectoryContents,
    ForeignCheckpoint,
    OurCheckpoint,
    dtype_name,
)
from speculators.checkpoint.record import LAYERS, RECORD_FILE, read_training_record
from speculators.config import SpeculatorModelConfig
from speculators.model import SpeculatorModel
from speculators.nn.rope import with_older_rope
from speculators.utils.files import absolute_if_directory, read_json_object
from speculators.utils.names import (
    did_you_mean,
    did_you_mean_path,
    is_in_hub_cache,
    looks_like_a_path,
    refuse_missing_checkpoint,
    why_hub_is_unreachable,
)
from speculators.utils.progress import no_progress_bars
from speculators.utils.util import reading

WEIGHTS_AND_CONFIG = ("*.json", "*.safetensors", "*.bin", "*.index.json", "*_lm_head.pt")
BEST = "checkpoint_best"
"""In the directory of a training run: the link to its best checkpoint."""


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint under our names, whatever format it was in."""

    path: Path
    format: str
    values: dict[str, Any]
    """The values of config.json, unchanged."""
    model_class: type[SpeculatorModel]
    config: SpeculatorModelConfig
    tensors: dict[str, Tensor]
    """Under our names."""
    notes: tuple[str, ...] = ()
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    """`Converted.copies`."""
    planned: frozenset[str] | None = None
    """Names of the tensors of a file that is not written yet."""

    @property
    def names_on_disk(self) -> Collection[str]:
        return self.source.tensor_names if self.planned is None else self.planned

    @property
    def source(self) -> ForeignCheckpoint:
        return ForeignCheckpoint(self.path)


def open_checkpoint(
    checkpoint: str | os.PathLike[str], *, verifier: str | None = None, algorithm: str | None = None, **options: Any
) -> OpenedCheckpoint:
    """Opens a directory or hub id of any known format.

    `verifier`: the one to record for a checkpoint that names none. `algorithm`: needed only where several algorithms
    recognise the directory. `options` go to the format's reader. Raises `FileNotFoundError` when there is no such
    checkpoint, `ValueError` when no algorithm, or more than one, recognises it.
    """
    path = local_directory(checkpoint)
    source = ForeignCheckpoint(path)
    if "speculators_model_type" in source.values:
        config = SpeculatorModelConfig.from_pretrained(path)
        model_class = SpeculatorModel.registered_model_class_from_config(config)
        return OpenedCheckpoint(path, SPECULATORS, source.values, model_class, config, source.tensors())
    model_class, known = recognise(source, algorithm)
    converted = read_foreign(source, known, verifier, **options)
    return OpenedCheckpoint(
        path,
        known.name,
        source.values,
        model_class,
        converted.config,
        converted.tensors,
        tuple(converted.notes),
        converted.copies,
    )


def read_foreign(source: ForeignCheckpoint, known: CheckpointFormat, verifier: str | None, **options: Any) -> Converted:
    """Reads another project's format, which names neither the verifier nor the number of draft tokens; takes both from
    the record of a directory that was trained or converted here. Raises `ValueError` for an option that the format
    does not take."""
    refuse_unknown_options(options, known.options, f"the format {known.name!r}")
    record = read_training_record(source.path) or {}
    with reading(f"{source.path / CONFIG_FILE} or the tensors"):
        converted = known.read(source, verifier or (record.get("verifier") or {}).get("name_or_path"), **options)
    settings, num_tokens = converted.config.speculators_config, record.get("num_speculative_tokens")
    if settings is not None and num_tokens is not None:
        settings.proposal_methods[0].speculative_tokens = num_tokens  # type: ignore[attr-defined]
    return converted


def refuse_unknown_options(options: Collection[str], known: Collection[str], whose: str) -> None:
    """Raises `ValueError` for a misspelt option, and names the nearest."""
    for option in options:
        if option not in known:
            takes = f"it takes {sorted(known)}" if known else "it takes none"
            raise ValueError(f"{whose} has no option {option!r}; {takes}.{did_you_mean(option, known)}")


@no_progress_bars()
def local_directory(checkpoint: str | os.PathLike[str], cache_dir: str | Path | None = None) -> Path:
    """Returns a directory as it is, else downloads it from the hub. Raises `FileNotFoundError` when neither works."""
    checkpoint = os.fspath(checkpoint)
    if Path(checkpoint).is_dir():
        refuse_run(Path(checkpoint))
        return Path(checkpoint).resolve()
    try:
        refuse_missing_checkpoint(checkpoint)
    except ValueError as problem:
        raise FileNotFoundError(f"Checkpoint not found: {problem}") from problem
    reason = None if is_in_hub_cache(checkpoint) else why_hub_is_unreachable()
    if reason is not None:  # each download would be tried for half a minute
        raise FileNotFoundError(
            f"Checkpoint not found: '{checkpoint}' is not a directory here, nor in the hub's cache, and the hub cannot "
            f"be reached from here ({reason}); name a directory with config.json and the weights"
        )
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=list(WEIGHTS_AND_CONFIG), cache_dir=cache_dir))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as problem:
        raise FileNotFoundError(
            f"Checkpoint not found: '{checkpoint}' is not a directory here, nor a repository of the hub that can be "
            "reached; name a directory with config.json and the weights"
        ) from problem


def refuse_run(directory: Path) -> None:
    """Raises `ValueError` for the directory of a training run, which holds checkpoints but is not one."""
    best = directory / BEST
    if best.is_dir() and not (directory / CONFIG_FILE).exists():
        raise ValueError(f"{directory} is a training run, not a checkpoint; name a checkpoint of it, such as {best}")


def recognise(
    source: ForeignCheckpoint, algorithm: str | None = None
) -> tuple[type[SpeculatorModel], CheckpointFormat]:
    """Finds the algorithm and the format of a directory. Raises `ValueError` unless exactly one format fits."""
    names = [algorithm] if algorithm is not None else SpeculatorModel.available_names()
    found = []
    for name in names:
        model_class = SpeculatorModel.get_class(name)
        found += [(model_class, known) for known in model_class.contract.formats if known.recognises(source)]
    if len(found) == 1:
        return found[0]
    if not found:
        whose = f"'{algorithm}' reads" if algorithm else "is known here"
        raise ValueError(
            f"{source.path} is in no checkpoint format that {whose}: config.json has no speculators_model_type, and "
            f"its tensors start like {sorted(source.tensor_names)[:4]}"
        )
    several = [f"{known.name} ({model_class.__name__})" for model_class, known in found]
    raise ValueError(f"{source.path} could be {' or '.join(several)}; say which with --algorithm")


def our_contents(ours: OurCheckpoint, model_class: type[SpeculatorModel]) -> DirectoryContents:
    """Returns the directory that `from_pretrained` reads, and vLLM for the types it serves.

    Raises `ValueError` when a tensor is missing or has another shape than its config says.
    """
    kept = fitting_tensors(ours, model_class)
    floating = next(tensor.dtype for tensor in kept.values() if tensor.is_floating_point())
    ours.config.architectures = [model_class.__name__]
    values = json.loads(ours.config.to_json_string())
    if isinstance(values.get(LAYERS), dict):
        values[LAYERS] = with_older_rope(values[LAYERS])
    return DirectoryContents(kept, {**values, "dtype": dtype_name(floating), "tie_word_embeddings": False})


def fitting_tensors(ours: OurCheckpoint, model_class: type[SpeculatorModel]) -> dict[str, Tensor]:
    """Returns the tensors that the config calls for. Raises `ValueError` when one is missing or has another shape."""
    config, contract = ours.config, model_class.contract
    expected = contract.expected_tensors(model_class, config)
    missing = sorted(expected.keys() - ours.tensors.keys() - contract.shared_tensors(config))
    if missing:
        raise ValueError(f"{ours.path} lacks {missing}: engines would serve them from uninitialised memory")
    kept = {name: tensor for name, tensor in sorted(ours.tensors.items()) if name in expected}
    wrong = [
        f"{name} is {list(tensor.shape)}, by config.json {list(expected[name].shape)}"
        for name, tensor in kept.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"Architecture mismatch: the tensors of {ours.path} do not fit its config: {'; '.join(wrong)}")
    return kept


# -- from config.json alone --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeculatorFacts:
    """The part of a speculator's config.json that serving needs."""

    path: str
    """Absolute: the server may run elsewhere."""
    speculators_model_type: str
    verifier: str | None
    num_speculative_tokens: int | None


def read_model_config(name: str) -> dict[str, Any] | None:
    """Reads the config.json of a directory or hub id; {} for a model of the hub without one.

    Returns None when the hub cannot be reached from here (the server may reach it). Raises `ValueError` for a path
    without a model, or a name that the hub refuses.
    """
    return local_config(name) if looks_like_a_path(name) else hub_config(name)


def speculator_facts(name: str, values: dict[str, Any] | None) -> SpeculatorFacts | None:
    """Reads what serving needs from `values`, the result of `read_model_config`; None when it is not a speculator."""
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
    """Says whether `export` wrote the directory: it keeps the record of training in every format."""
    return (Path(model) / RECORD_FILE).is_file()


@lru_cache  # without a network, each time costs half a minute of tries
def hub_config(name: str) -> dict[str, Any] | None:
    if not is_in_hub_cache(name) and why_hub_is_unreachable() is not None:
        return None
    try:
        path = hf_hub_download(name, CONFIG_FILE)
    except LocalEntryNotFoundError:  # not in the cache either
        return None
    except EntryNotFoundError:
        return {}
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name} is not a directory here, and the hub gives no model of that name ({reason}); name the directory "
            "or the hub id of a speculator or a model"
        ) from error
    return read_json_object(Path(path))


def local_config(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_dir():
        found = "is a file." if path.exists() else f"does not exist.{did_you_mean_path(name)}"
        raise ValueError(f"{name} {found} Give the directory of a checkpoint or model, or a model's hub id")
    if not (path / CONFIG_FILE).is_file():
        refuse_run(path)
        raise ValueError(f"{name} has no {CONFIG_FILE}: it is neither a speculator nor a model")
    return read_json_object(path / CONFIG_FILE)
