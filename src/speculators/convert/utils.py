"""Public path of earlier releases: the base of the converter classes, and reading of checkpoints piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from speculators.checkpoint.io import local_directory
from speculators.convert.entrypoints import ConvertedCheckpoint, convert_checkpoint
from speculators.utils.files import read_json_object
from speculators.utils.loading import BIN_INDEX, SAFETENSORS_INDEX, load_checkpoint


def ensure_checkpoint_is_local(checkpoint_path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Returns an existing path, else downloads it from the hub. Raises `FileNotFoundError` if neither works."""
    return Path(checkpoint_path) if Path(checkpoint_path).exists() else local_directory(checkpoint_path, cache_dir)


def download_checkpoint_from_hub(model_id: str, cache_dir: str | Path | None = None) -> Path:
    """Downloads config and weights of a hub id. Raises `FileNotFoundError` when the hub does not have it."""
    return local_directory(model_id, cache_dir)


def load_checkpoint_config(checkpoint_dir: str | Path) -> dict[str, Any]:
    """Reads config.json. Raises `FileNotFoundError` when the directory has none."""
    file = Path(checkpoint_dir) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"No config.json found at {checkpoint_dir}")
    return read_json_object(file)


def load_checkpoint_weights(checkpoint_dir: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of an unsharded checkpoint. Raises `NotImplementedError` for a sharded one, which
    `utils.loading.load_checkpoint` and conversion itself read."""
    for index in (SAFETENSORS_INDEX, BIN_INDEX):
        if (Path(checkpoint_dir) / index).is_file():
            raise NotImplementedError(
                f"Sharded checkpoint detected: {index}; read it with utils.loading.load_checkpoint"
            )
    return load_checkpoint(checkpoint_dir)


class Converter:
    """Base of the converter classes of earlier releases: one algorithm and its options."""

    algorithm: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    """Further arguments of `convert` and their defaults (None: as the source says)."""

    def convert(
        self,
        input_path: str | Path,
        output_path: str | Path,
        base_model: str,
        validate: bool = True,
        *,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> ConvertedCheckpoint:
        """Converts `input_path` for the verifier `base_model` and replaces `output_path`; the result is always checked.

        Raises as `convert_checkpoint` does, and `TypeError` for an argument that the converter does not have.
        """
        unknown = sorted(kwargs.keys() - self.options.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.convert has no argument {unknown[0]!r}; it has {list(self.options)}"
            )
        return convert_checkpoint(
            input_path,
            output_path,
            verifier=base_model,
            algorithm=self.algorithm,
            overwrite=True,
            cache_dir=cache_dir,
            **{**self.options, **kwargs},
        )
