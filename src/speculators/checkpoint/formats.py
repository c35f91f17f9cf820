"""Directory formats of other projects: how an algorithm's folder says which it can read and write.

A format is an object in `CheckpointContract.formats`. Reading gives a config and tensors under our names; writing
takes them. What is ours ("speculators") needs no object: every algorithm has it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from speculators.checkpoint.findings import Finding
from speculators.utils.files import atomic_write
from speculators.utils.loading import SAFETENSORS, list_checkpoint_keys, load_checkpoint

if TYPE_CHECKING:
    from speculators.config import SpeculatorModelConfig

SPECULATORS = "speculators"
"""The name of our own format."""
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What lies in a directory, as it lies there."""

    path: Path

    @cached_property
    def values(self) -> dict[str, Any]:
        """config.json; empty when there is none."""
        file = self.path / CONFIG_FILE
        if not file.is_file():
            return {}
        try:
            return json.loads(file.read_text())
        except ValueError as problem:
            raise ValueError(f"{file} is no JSON ({problem}): fetch it again, or mend it") from problem

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(list_checkpoint_keys(self.path))

    def tensors(self) -> dict[str, Tensor]:
        return load_checkpoint(self.path)


@dataclass(frozen=True)
class OurCheckpoint:
    """A speculator in our terms, and where it comes from."""

    config: SpeculatorModelConfig
    tensors: Mapping[str, Tensor]
    path: Path
    """The directory it was read from."""

    @property
    def verifier(self) -> str | None:
        return self.config.recorded_verifier


@dataclass(frozen=True)
class Serving:
    """What to give vLLM."""

    model: str
    speculative_config: Mapping[str, Any] | None = None
    """None: the directory says everything itself."""

    @property
    def command(self) -> str:
        options = [] if self.speculative_config is None else [json.dumps(dict(self.speculative_config))]
        flags = ["--speculative-config", *options] if options else []
        return shlex.join(["vllm", "serve", self.model, *flags])


@dataclass(frozen=True)
class Converted:
    """A foreign checkpoint in our terms."""

    config: SpeculatorModelConfig
    tensors: dict[str, Tensor]
    notes: Sequence[str] = field(default=())
    """What a reader of the result should know."""


class CheckpointFormat:
    """One format of one algorithm. Subclasses define what they can do; the rest says that it cannot."""

    name: ClassVar[str]
    method: ClassVar[str | None] = None
    """vLLM's name for such a drafter, where it serves the directory beside the verifier's."""
    needs_verifier: ClassVar[bool] = False
    """Whether writing copies the verifier's own files (so that it must be on this machine)."""

    def recognises(self, source: ForeignCheckpoint) -> bool:
        """Whether the directory is of this format, by config.json and the names of its tensors."""
        return False

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        """What an engine would drop or misread in such a directory."""
        return []

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        raise ValueError(f"format '{self.name}' is only written, not read")

    def write(self, checkpoint: OurCheckpoint, directory: Path, verifier: str | None) -> None:
        """Fill an empty directory."""
        raise ValueError(f"format '{self.name}' is only read, not written")

    def serving(self, config: SpeculatorModelConfig, directory: str, verifier: str) -> Serving | None:
        """How vLLM serves such a directory; None: it does not."""
        if self.method is None:
            return None
        return Serving(
            verifier,
            {"method": self.method, "model": directory, "num_speculative_tokens": num_speculative_tokens(config)},
        )


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(kept, directory / SAFETENSORS, metadata={"format": "pt"})


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def write_config(directory: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(directory / CONFIG_FILE) as file:
        file.write(json.dumps(dict(values), indent=2, sort_keys=True) + "\n")


def num_speculative_tokens(config: SpeculatorModelConfig) -> int:
    """Draft tokens a round, as recorded in config.json."""
    recorded = config.speculators_config
    tokens = getattr(recorded.proposal_methods[0], "speculative_tokens", None) if recorded is not None else None
    if tokens is None:
        raise ValueError(
            "config.json does not say how many tokens to draft a round: write "
            "speculators_config.proposal_methods[0].speculative_tokens"
        )
    return int(tokens)
