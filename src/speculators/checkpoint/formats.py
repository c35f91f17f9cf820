"""Declares an algorithm's checkpoints: `CheckpointContract`, and `CheckpointFormat` for each directory format of
another project that it reads or writes.

A format is an object in `CheckpointContract.formats`. `read` gives a config and tensors under our names, `contents`
takes them and says what to write. Our own format ("speculators") needs no object: every algorithm has it.

An algorithm's folder subclasses the contract where the defaults are not enough, and its model class names the object
(`SpeculatorModel.contract`). `speculators.deploy` and `speculators.convert` ask it; they know no algorithm.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from speculators.checkpoint.engine_profile import OUR_FORMAT, Serving, drafts_per_round
from speculators.checkpoint.findings import Finding
from speculators.checkpoint.tensors import stored_tensors, write_tensors
from speculators.utils.files import atomic_write, read_json_object
from speculators.utils.loading import list_checkpoint_keys
from speculators.utils.util import bounded_build, reading

if TYPE_CHECKING:
    from speculators.config import SpeculatorModelConfig
    from speculators.model import SpeculatorModel

SPECULATORS = OUR_FORMAT
"""The name of our own format."""
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A directory of another project (or ours), read as it is."""

    path: Path

    @cached_property
    def values(self) -> dict[str, Any]:
        """The values of config.json; empty without the file. Raises `ValueError` when it is not a JSON object."""
        file = self.path / CONFIG_FILE
        return read_json_object(file) if file.is_file() else {}

    @property
    def architectures(self) -> list[str]:
        """Names of classes in config.json; empty when the key holds anything else."""
        names = self.values.get("architectures")
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(list_checkpoint_keys(self.path))

    def tensors(self) -> dict[str, Tensor]:
        """Returns them by name; the values are read from the file when they are needed (`checkpoint.tensors`)."""
        return stored_tensors(self.path)


def count_in(values: Mapping[str, Any], key: str, least: int = 1) -> int:
    """Reads a whole number of a foreign config.json. Raises `ValueError`, naming the key, for anything else."""
    count = values.get(key)
    if type(count) is not int or count < least:
        raise ValueError(f"config.json says {key}={count!r}: it must be a whole number of at least {least}; correct it")
    return count


def ids_in(values: Mapping[str, Any], key: str) -> list[int] | None:
    """Reads a list of layer ids of a foreign config.json, None without one. Raises `ValueError` for anything else."""
    ids = values.get(key)
    if ids is None or (isinstance(ids, list) and all(type(layer) is int for layer in ids)):
        return ids or None
    raise ValueError(f"config.json says {key}={ids!r}: it must be a list of layer numbers; correct it")


@dataclass(frozen=True)
class OurCheckpoint:
    """A speculator under our names, and the directory it comes from."""

    config: SpeculatorModelConfig
    tensors: Mapping[str, Tensor]
    path: Path
    """The directory it was read from."""

    @property
    def verifier(self) -> str | None:
        return self.config.recorded_verifier


@dataclass(frozen=True)
class Converted:
    """A checkpoint of another project under our names."""

    config: SpeculatorModelConfig
    tensors: dict[str, Tensor]
    notes: Sequence[str] = field(default=())
    """What a reader of the result should know."""
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the drafter takes from the verifier instead, by their names there: conversion proves them equal."""


@dataclass(frozen=True)
class DirectoryContents:
    """What a directory is to hold, in any format. Nothing is read or written before `write`."""

    tensors: Mapping[str, Tensor]
    """By their names on disk."""
    values: Mapping[str, Any]
    """Of config.json."""

    def write(self, directory: Path) -> None:
        """Writes the files into an empty directory."""
        write_tensors(directory, self.tensors)
        write_config(directory, self.values)


class CheckpointFormat:
    """One directory format of one algorithm. Subclasses define what they support; the rest raises `ValueError`."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    """Names of projects that read the same directory."""
    method: ClassVar[str | None] = None
    """vLLM's name for such a drafter, where it serves the directory beside the verifier's."""
    needs_verifier: ClassVar[bool] = False
    """Whether writing copies the verifier's own files (so that it must be on this machine)."""
    options: ClassVar[tuple[str, ...]] = ()
    """What `read` can be told that a directory may leave out."""

    def recognises(self, source: ForeignCheckpoint) -> bool:
        """Says whether the directory is in this format, by config.json and the names of its tensors."""
        return False

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        """Reports what an engine would drop or misread in such a directory."""
        return []

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        """Reads the directory for `verifier`; `options` are those of `CheckpointFormat.options`."""
        raise ValueError(f"format '{self.name}' is only written, not read")

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        """Says what the checkpoint's directory holds. Raises `ValueError` for one that the format cannot describe."""
        raise ValueError(f"format '{self.name}' is only read, not written")

    def refusal(self, config: Any) -> str | None:
        """Says why the engine that serves such directories would not draft with this drafter as it was trained, and the
        way out; None: it does."""
        return None

    def serving(self, config: SpeculatorModelConfig, directory: str, verifier: str) -> Serving | None:
        """Says how an engine serves such a directory; None: it does not."""
        if self.method is None or self.refusal(config) is not None:
            return None
        return Serving(
            verifier,
            {"method": self.method, "model": directory, "num_speculative_tokens": num_speculative_tokens(config)},
        )


class CheckpointContract:
    """Describes an algorithm's checkpoints. The defaults fit one that is only trained and decoded here."""

    formats: ClassVar[tuple[CheckpointFormat, ...]] = ()
    """Formats of other projects."""
    served_format: ClassVar[str | None] = None
    """The format of the directory that vLLM serves, in the releases that serve the type; None: no release does. The
    releases are described in `engine_profiles/`."""

    training_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of config.json that only training reads."""

    borrows_from_verifier: ClassVar[bool] = False
    """Whether `embed_tokens` and `lm_head` are copies of the verifier's, as in `DraftVocabMixin`."""

    def expected_tensors(self, model_class: type[SpeculatorModel], config: SpeculatorModelConfig) -> dict[str, Tensor]:
        """Returns every tensor that a checkpoint holds, by name, on the meta device (shape and type, no data)."""
        return saved_tensors(build_without_data(model_class, config))

    def shared_tensors(self, config: SpeculatorModelConfig) -> frozenset[str]:
        """Names the tensors that a checkpoint may leave out because engines then use the verifier's: the embedding
        unless it is trained, the head unless it has rows of its own."""
        if not self.borrows_from_verifier:
            return frozenset()
        is_trained = getattr(config, "embed_requires_grad", False)
        is_whole = getattr(config, "draft_vocab_size", None) == getattr(config, "target_vocab_size", None)
        embedding = [] if is_trained else ["embed_tokens.weight"]
        return frozenset([*embedding, *(["lm_head.weight"] if is_whole else [])])

    def verifier_copies(self, config: SpeculatorModelConfig) -> Mapping[str, str]:
        """Maps the name of each unchanged copy of a verifier tensor to its name in the verifier. A head with fewer rows
        holds the verifier's rows that `d2t` selects."""
        if not self.borrows_from_verifier:
            return {}
        is_trained = getattr(config, "embed_requires_grad", False)
        names = ["lm_head.weight"] if is_trained else ["embed_tokens.weight", "lm_head.weight"]
        return {name: name for name in names}

    def check_before_saving(self, model: SpeculatorModel, saved: Collection[str]) -> None:
        """Warns of what engines will serve otherwise than it was trained; raises `ValueError` if they serve such
        checkpoints and a tensor is not in `saved` (names on disk)."""
        if self.served_format is not None:
            refuse_missing(saved_tensors(model).keys() - set(saved))
        self.warn_before_saving(model.config)

    def warn_before_saving(self, config: Any) -> None:
        """Logs what engines will serve otherwise than it was trained."""

    def findings(self, values: Mapping[str, Any], config: Any, format_name: str) -> list[Finding]:
        """Reports what engines would drop, misread or refuse of a directory of that format; a rule of vLLM alone has
        `VLLM_HERE`. `values` is config.json as it is, `config` our reading. What an engine serves in no directory:
        `CheckpointFormat.refusal`."""
        return []

    def most_drafts(self, config: Any) -> int | None:
        """Returns how many tokens one round can draft; None: as many as are asked for."""
        return None

    def completed(self, config: SpeculatorModelConfig) -> SpeculatorModelConfig:
        """Returns a copy of the config with every key that engines read."""
        return copy.deepcopy(config)

    upgrade_options: ClassVar[tuple[str, ...]] = ()
    """Keys of config.json that `upgraded` can be told when an older release left them out."""

    def upgraded(self, config: SpeculatorModelConfig, verifier: str, **options: Any) -> SpeculatorModelConfig:
        """Completes the config of an older release of ours; `options` are those of `upgrade_options`."""
        config = copy.deepcopy(config)
        for key, value in options.items():
            setattr(config, key, value)
        return self.completed(config)

    def format_named(self, name: str) -> CheckpointFormat:
        """Returns the format of that name. Raises `ValueError` when the algorithm has no such format."""
        for known in self.formats:
            if name in (known.name, *known.aliases):
                return known
        raise ValueError(
            f"this drafter has no format {name!r}; it has {[SPECULATORS, *(known.name for known in self.formats)]}"
        )

    def serving(self, config: SpeculatorModelConfig, format_name: str, directory: str, verifier: str) -> Serving | None:
        """Says what an engine is told of a directory of that format; None: what the engine's profile says of it
        (`EngineProfile.serving`) is all there is, as of ours."""
        if format_name == SPECULATORS:
            return None
        return self.format_named(format_name).serving(config, directory, verifier)


def build_without_data(model_class: type[SpeculatorModel], config: SpeculatorModelConfig) -> SpeculatorModel:
    """Builds the model of a config on the meta device. Raises `ValueError` when the config does not describe one."""
    with torch.device("meta"), bounded_build("config.json"), reading("config.json"):
        return model_class.to_be_loaded(copy.deepcopy(config))


def saved_tensors(model: SpeculatorModel) -> dict[str, Tensor]:
    """Tensors of a model that its checkpoint holds: not those that are left to the verifier."""
    left_out = set(model._keys_to_ignore_on_save or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def refuse_missing(names: Collection[str]) -> None:
    if names:
        raise ValueError(
            f"the checkpoint would lack {sorted(names)}: engines would serve them from uninitialised memory; save the "
            "whole state dict"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a type's name as config.json spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def write_config(directory: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(directory / CONFIG_FILE) as file:
        file.write(json.dumps(dict(values), indent=2, sort_keys=True) + "\n")


def num_speculative_tokens(config: SpeculatorModelConfig) -> int:
    """Returns the recorded draft tokens per round. Raises `ValueError` when config.json does not say."""
    tokens = drafts_per_round(config)
    if tokens is None:
        raise ValueError(
            "config.json does not say how many tokens to draft per round: write "
            "speculators_config.proposal_methods[0].speculative_tokens"
        )
    return int(tokens)
