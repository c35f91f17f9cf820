"""What an MTP checkpoint holds: the layer alone. Embedding, head and final norm are the verifier's and stay there."""

from __future__ import annotations

import copy
from typing import Any

from speculators.models.draft_layers import layer_keys
from speculators.models.mtp.config import MTPSpeculatorConfig
from speculators.models.mtp.families import LAYER, OWN_NAMES
from speculators.models.mtp.layer import DecoderShape, decoder_shape, decoder_view

NOT_THE_DECODERS = ("quantization_config",)
"""Keys of a verifier's config that describe its checkpoint, not its layers."""


SPARSE_MLP = {
    "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight", "mlp.shared_expert.down_proj.weight", "mlp.shared_expert_gate.weight",
}  # fmt: skip


def output_bias(shape: DecoderShape) -> bool | None:
    """Whether a biased attention has one on o_proj too; None = as the family it resembles does."""
    return False if shape.always_biased else None


def layer_config_of(verifier_config: Any) -> Any:
    """The verifier's text config as it is written into ours."""
    config = copy.deepcopy(verifier_config)
    decoder_shape(config)  # refuses what there are no layers for
    for key in NOT_THE_DECODERS:
        if hasattr(config, key):
            delattr(config, key)
    return config


def expected_keys(config: MTPSpeculatorConfig) -> set[str]:
    """Names of the tensors on disk."""
    nested = config.transformer_layer_config
    shape = decoder_shape(nested)
    decoder = layer_keys(decoder_view(nested, shape), output_bias=output_bias(shape))
    if shape.has_experts:
        decoder = {name for name in decoder if not name.startswith("mlp.")} | SPARSE_MLP
    return {LAYER + name for name in {*OWN_NAMES, *decoder}}
