"""Medusa on disk: our key set, which is vLLM's too, and the native directory that vLLM serves.

ours and vLLM                    FasterDecoding/Medusa (read only; also behind `medusa_heads.`)
blocks.{i}.layers.{j}.weight     {i}.{j}.linear.weight
blocks.{i}.layers.{j}.bias       {i}.{j}.linear.bias
lm_heads.{i}.weight              {i}.{num_layers}.weight
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculators.checkpoint.formats import dtype_name, write_config, write_tensors
from speculators.models.medusa.config import MedusaSpeculatorConfig
from speculators.utils.loading import load_checkpoint

OLD_LAYER = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
OLD_HEAD = re.compile(r"(\d+)\.(\d+)\.weight")
OLD_PREFIX = "medusa_heads."


def expected_keys(config: MedusaSpeculatorConfig) -> set[str]:
    """Names of the tensors on disk."""
    heads, layers = range(config.num_heads), range(config.num_hidden_layers)
    blocks = {f"blocks.{i}.layers.{j}.{kind}" for i in heads for j in layers for kind in ("weight", "bias")}
    return blocks | {f"lm_heads.{i}.weight" for i in heads}


def native_config(config: MedusaSpeculatorConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "medusa_fc_bias": True,  # without it vLLM leaves the biases out, silently
        "dtype": dtype_name(dtype),
    }


def save_native(config: MedusaSpeculatorConfig, tensors: dict[str, Tensor], path: str | Path) -> Path:
    """The directory to serve with `{"method": "medusa", "model": path}` and num_speculative_tokens <= num_heads."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    native = {name: tensors[name] for name in expected_keys(config)}
    write_tensors(path, native)
    write_config(path, native_config(config, native["lm_heads.0.weight"].dtype))
    return path


def to_our_name(name: str) -> str:
    name = name.removeprefix(OLD_PREFIX)
    if layer := OLD_LAYER.fullmatch(name):
        return f"blocks.{layer[1]}.layers.{layer[2]}.{layer[3]}"
    if head := OLD_HEAD.fullmatch(name):
        return f"lm_heads.{head[1]}.weight"
    return name


def read_native(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config fields, tensors) of a native directory; sizes are those of the tensors."""
    tensors = {to_our_name(name): tensor for name, tensor in load_checkpoint(Path(path)).items()}
    num_heads = len([name for name in tensors if name.startswith("lm_heads.")])
    num_layers = len([name for name in tensors if name.startswith("blocks.0.") and name.endswith(".weight")])
    if num_heads == 0 or num_layers == 0:
        raise ValueError(f"{path} has no tensors blocks.* and lm_heads.*, of every head its own: it is no Medusa")
    vocab_size, hidden_size = tensors["lm_heads.0.weight"].shape
    fields: dict[str, Any] = {
        "num_heads": num_heads,
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
    }
    for i in range(num_heads):
        for j in range(num_layers):  # a head without biases is one whose biases are zero
            weight = tensors[f"blocks.{i}.layers.{j}.weight"]
            tensors.setdefault(f"blocks.{i}.layers.{j}.bias", weight.new_zeros(hidden_size))
    odd = tensors.keys() ^ expected_keys(MedusaSpeculatorConfig(**fields))
    if odd:
        raise ValueError(f"{path} is not a Medusa with whole-vocabulary heads: {sorted(odd)} do not belong or lack")
    return fields, tensors
