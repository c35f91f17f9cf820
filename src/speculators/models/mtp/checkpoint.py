"""What an MTP checkpoint holds: the layer alone. Embedding, head and final norm are the verifier's and stay there."""

from __future__ import annotations

import copy
from typing import Any

from speculators.models.draft_layers import layer_keys
from speculators.models.mtp.attention import LatentAttention
from speculators.models.mtp.config import MTPSpeculatorConfig
from speculators.models.mtp.experts import GroupRoutedMLP, SparseMLP
from speculators.models.mtp.families import LAYER, OWN_NAMES
from speculators.models.mtp.layer import decoder_shape, decoder_view

NOT_THE_DECODERS = ("quantization_config",)
"""Keys of a verifier's config that describe its checkpoint, not its layers."""


EXPERTS = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
MLP_KEYS = {
    SparseMLP: {
        *EXPERTS,
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert.down_proj.weight",
        "mlp.shared_expert_gate.weight",
    },
    GroupRoutedMLP: {
        *EXPERTS,
        "mlp.gate.e_score_correction_bias",
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    },
}


def latent_attention_keys(config: Any) -> set[str]:
    names = ["kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    names += ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    biased = {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"} & set(names) if config.attention_bias else set()
    return {f"self_attn.{name}.weight" for name in names} | {f"self_attn.{name}.bias" for name in biased}


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
    decoder = layer_keys(decoder_view(nested, shape), output_bias=shape.output_biased)
    if shape.mlp is not None:
        decoder = {name for name in decoder if not name.startswith("mlp.")} | MLP_KEYS[shape.mlp]
    if shape.attention is LatentAttention:
        decoder = {name for name in decoder if not name.startswith("self_attn.")} | latent_attention_keys(nested)
    return {LAYER + name for name in {*OWN_NAMES, *decoder}}
