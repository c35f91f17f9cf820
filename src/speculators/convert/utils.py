"""Public path of earlier releases: reads checkpoints of other projects piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from speculators.checkpoint.io import local_directory
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
