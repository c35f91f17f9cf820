"""MLP speculators on disk: our directory and that of IBM's fms-fsdp, read and written. No current vLLM serves them.

ours                        theirs (names of tensors behind `speculator.`, or bare)
hidden_size                 emb_dim
intermediate_size           inner_dim         0 there: emb_dim
num_layers                  n_predict
tie_weights, scale_input    the same          false where the key is missing
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speculators.checkpoint.formats import (
    CheckpointContract,
    CheckpointFormat,
    Converted,
    DirectoryContents,
    ForeignCheckpoint,
    OurCheckpoint,
    count_in,
    dtype_name,
)
from speculators.models.mlp.config import OLD_NAMES, MLPSpeculatorConfig
from speculators.verifier.config import get_verifier_config, make_speculators_config, norm_kind

PREFIX = "speculator."
THEIR_DEFAULTS = {"tie_weights": False, "scale_input": False}
FIELDS = ("vocab_size", "tie_weights", "scale_input", *OLD_NAMES)
WIDEST, NUM_CANDIDATES = 5, 5
"""Their drafting: this many tokens of the first head, one fewer of each further one; this many best candidates."""


class FmsFormat(CheckpointFormat):
    name = "mlp_speculator"

    def recognises(self, source: ForeignCheckpoint) -> bool:
        return source.values.get("model_type") == self.name

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        values: Mapping[str, Any] = {**THEIR_DEFAULTS, **source.values}
        num_tokens = count_in(values, "n_predict")
        fields = {key: values[key] for key in FIELDS if key in values}
        if verifier is not None:
            fields["speculators_config"] = make_speculators_config("mlp", num_tokens, verifier)
            fields["rms_norm_eps"] = norm_kind(get_verifier_config(verifier)).eps
        config = MLPSpeculatorConfig(**fields)
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in source.tensors().items()}
        return Converted(config, without_tied_copies(tensors) if config.tie_weights else tensors)

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        config: Any = checkpoint.config
        dtype = checkpoint.tensors["head.0.weight"].dtype
        return DirectoryContents(
            {PREFIX + name: tensor for name, tensor in checkpoint.tensors.items()},
            {**native_config(config), "torch_dtype": dtype_name(dtype)},
        )


def native_config(config: MLPSpeculatorConfig) -> dict[str, Any]:
    return {
        "model_type": FmsFormat.name,
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        **{theirs: getattr(config, ours) for theirs, ours in OLD_NAMES.items()},
        "vocab_size": config.vocab_size,
        "tie_weights": config.tie_weights,
        "scale_input": config.scale_input,
        "top_k_tokens_per_head": [max(1, WIDEST - step) for step in range(config.num_layers)],
        "n_candidates": NUM_CANDIDATES,
    }


def without_tied_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keeps tied weights under one name each: some files repeat them per step. Raises `ValueError` if they differ."""
    kept = {}
    for name, tensor in tensors.items():
        kind, step, part = name.split(".")
        first = f"{kind}.{min(int(step), 1 if kind == 'proj' else 0)}.{part}"
        if name == first:
            kept[name] = tensor
        elif first not in tensors or not torch.equal(tensor, tensors[first]):
            raise ValueError(
                f'config.json says tie_weights, and {name} is not {first}: write "tie_weights": false, or correct it'
            )
    return kept


class MLPContract(CheckpointContract):
    formats = (FmsFormat(),)

    def most_drafts(self, config: Any) -> int:
        return config.num_layers
