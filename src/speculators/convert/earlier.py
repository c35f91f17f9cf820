"""Public names of earlier releases: the converter classes, and reading of checkpoints piece by piece.

`speculators.convert.eagle`, `.mtp`, `.dflash` and `.utils`, where they stood, serve them still (`speculators.compat`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from speculators.checkpoint.io import local_directory
from speculators.convert.entrypoints import ConvertedCheckpoint, convert_checkpoint
from speculators.utils.files import read_json_object
from speculators.utils.loading import BIN_INDEX, SAFETENSORS_INDEX, load_checkpoint

MTP_EXACT_REMAP = {
    "mtp.fc.weight": "mtp_layers.0.input_proj.weight",
    "mtp.norm.weight": "mtp_layers.0.final_layernorm.weight",
}
MTP_PREFIX_REMAP = {
    "mtp.pre_fc_norm_hidden.": "mtp_layers.0.hidden_layernorm.",
    "mtp.pre_fc_norm_embedding.": "mtp_layers.0.token_layernorm.",
    "mtp.layers.0.": "mtp_layers.0.",
}
EXTRA_NORMS = ("embed_layernorm.weight", "post_embedding_layernorm.weight", "lm_head_layernorm.weight")


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


class DFlashConverter(Converter):
    """Converts DFlash checkpoints of other projects."""

    algorithm = "dflash"
    options = {"aux_hidden_state_layer_ids": None}


class Eagle3Converter(Converter):
    """Converts heads of the EAGLE repository and of SpecForge."""

    algorithm = "eagle3"
    options = {
        "norm_before_residual": None,
        "norm_before_fc": None,
        "fc_norm": None,
        "norm_output": None,
        "eagle_aux_hidden_state_layer_ids": None,
    }


class MTPConverter(Converter):
    """Converts the MTP layer of a verifier's own checkpoint."""

    algorithm = "mtp"
    options = {"num_speculative_steps": 3}


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


def find_vocab_size(config: Mapping[str, Any]) -> int | None:
    """Finds the first `vocab_size` of a config, at any depth; None when it has none."""
    if isinstance(config.get("vocab_size"), int):
        return config["vocab_size"]
    inner = (find_vocab_size(value) for value in config.values() if isinstance(value, Mapping))
    return next((found for found in inner if found is not None), None)


def detect_fusion_bias_and_layernorms(weights: Iterable[str]) -> tuple[bool, bool]:
    """Tells from the tensor names of an EAGLE-1 or HASS checkpoint whether it has a fusion bias and extra norms."""
    names = set(weights)
    return "fc.bias" in names, bool(names & set(EXTRA_NORMS))
