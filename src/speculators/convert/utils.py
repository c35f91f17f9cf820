"""Reading checkpoints of other projects piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from speculators.checkpoint.io import local_directory
from speculators.utils.loading import BIN_INDEX, SAFETENSORS_INDEX, load_checkpoint


def ensure_checkpoint_is_local(checkpoint_path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """A path that exists as it is, else the hub's copy. FileNotFoundError: there is neither."""
    return Path(checkpoint_path) if Path(checkpoint_path).exists() else local_directory(checkpoint_path, cache_dir)


def download_checkpoint_from_hub(model_id: str, cache_dir: str | Path | None = None) -> Path:
    return local_directory(model_id, cache_dir)


def load_checkpoint_config(checkpoint_dir: str | Path) -> dict[str, Any]:
    file = Path(checkpoint_dir) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"No config.json found at {checkpoint_dir}")
    return json.loads(file.read_text())


def load_checkpoint_weights(checkpoint_dir: str | Path) -> dict[str, Tensor]:
    """Of a single file. `utils.loading.load_checkpoint` also reads sharded ones; so does conversion itself."""
    for index in (SAFETENSORS_INDEX, BIN_INDEX):
        if (Path(checkpoint_dir) / index).is_file():
            raise NotImplementedError(
                f"Sharded checkpoint detected: {index}; read it with utils.loading.load_checkpoint"
            )
    return load_checkpoint(checkpoint_dir)
