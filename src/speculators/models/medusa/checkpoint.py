"""Medusa on disk: our directory, and the native one of the heads, which vLLM serves with method "medusa".

ours and vLLM                    FasterDecoding/Medusa (read only; also behind `medusa_heads.`)
blocks.{i}.layers.{j}.weight     {i}.{j}.linear.weight
blocks.{i}.layers.{j}.bias       {i}.{j}.linear.bias
lm_heads.{i}.weight              {i}.{num_layers}.weight
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculators.checkpoint.findings import VLLM_HERE, Finding, error
from speculators.checkpoint.formats import (
    CheckpointContract,
    CheckpointFormat,
    Converted,
    DirectoryContents,
    ForeignCheckpoint,
    OurCheckpoint,
    Serving,
    dtype_name,
)
from speculators.checkpoint.tensors import stored_tensors
from speculators.model import SpeculatorModel
from speculators.models.medusa.config import MedusaSpeculatorConfig
from speculators.verifier.config import get_verifier_config, make_speculators_config, norm_kind

NATIVE = "medusa"
OLD_LAYER = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
OLD_HEAD = re.compile(r"(\d+)\.(\d+)\.weight")
OLD_PREFIX = "medusa_heads."


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
    """Writes the directory to serve with `{"method": "medusa", "model": path}` and at most `num_heads` draft tokens."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    native_contents(config, tensors).write(path)
    return path


def native_contents(config: MedusaSpeculatorConfig, tensors: Mapping[str, Tensor]) -> DirectoryContents:
    native = {name: tensors[name] for name in SpeculatorModel.expected_tensors(config)}
    return DirectoryContents(native, native_config(config, native["lm_heads.0.weight"].dtype))


def to_our_name(name: str) -> str:
    name = name.removeprefix(OLD_PREFIX)
    if layer := OLD_LAYER.fullmatch(name):
        return f"blocks.{layer[1]}.layers.{layer[2]}.{layer[3]}"
    if head := OLD_HEAD.fullmatch(name):
        return f"lm_heads.{head[1]}.weight"
    return name


def read_native(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns config fields and tensors of a native directory; the sizes come from the tensors."""
    tensors = {to_our_name(name): tensor for name, tensor in stored_tensors(path).items()}
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
    expected = SpeculatorModel.expected_tensors(MedusaSpeculatorConfig(**fields)).keys()
    for bias in (name for name in expected - tensors.keys() if name.endswith(".bias")):  # absent biases are zero
        tensors[bias] = torch.zeros(hidden_size, dtype=tensors["lm_heads.0.weight"].dtype)
    odd = tensors.keys() ^ expected
    if odd:
        raise ValueError(f"{path} is not a Medusa with whole-vocabulary heads: {sorted(odd)} do not belong or lack")
    return fields, tensors


class MedusaFormat(CheckpointFormat):
    name = NATIVE

    def recognises(self, source: ForeignCheckpoint) -> bool:
        return {"blocks.0.layers.0.weight", "lm_heads.0.weight"} <= {to_our_name(name) for name in source.tensor_names}

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        found = []
        biased = sorted(name for name in source.tensor_names if name.endswith(".bias"))
        if biased and not source.values.get("medusa_fc_bias"):
            found.append(
                error(
                    "option-dropped",
                    "medusa_fc_bias",
                    f"not true, but the checkpoint has {biased[0]}",
                    f"{VLLM_HERE} then leaves every bias out, silently",
                    'write "medusa_fc_bias": true',
                )
            )
        if source.values.get("model_type") != "medusa":
            found.append(
                error(
                    "key-missing",
                    "model_type",
                    repr(source.values.get("model_type")),
                    f"{VLLM_HERE} finds its config class by it",
                    'write "model_type": "medusa"',
                )
            )
        return found

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        fields, tensors = read_native(source.path)
        if verifier is not None:
            fields["rms_norm_eps"] = norm_kind(get_verifier_config(verifier)).eps
            fields["speculators_config"] = make_speculators_config("medusa", fields["num_heads"], verifier)
        return Converted(MedusaSpeculatorConfig(**fields), tensors)

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        return native_contents(checkpoint.config, checkpoint.tensors)  # type: ignore[arg-type]

    def serving(self, config: Any, directory: str, verifier: str) -> Serving:
        # vLLM takes as many heads as this says: more than there are fails, fewer drops the last ones
        method = {"method": "medusa", "model": directory, "num_speculative_tokens": config.num_heads}
        return Serving(verifier, method)


class MedusaContract(CheckpointContract):
    formats = (MedusaFormat(),)
    served_format = NATIVE

    def most_drafts(self, config: Any) -> int:
        return config.num_heads
