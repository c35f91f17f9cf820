"""The nested decoder config of a speculator as engines read it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from transformers import AutoConfig

from speculators.nn.attention import attention_shape
from speculators.nn.rope import head_dim, rope_parameters

# vLLM builds a generic config from the dict: no class defaults stand behind a missing key.
COMPLETED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "use_sliding_window": False,
}


def layer_config_of(values: Mapping[str, Any], left_out: Collection[str], **assumed: Any) -> Any:
    """Reads the decoder config from a foreign config.json that mixes it with the drafter's keys (`left_out`).
    `assumed`: values for absent keys."""
    return AutoConfig.for_model(**{**assumed, **{key: value for key, value in values.items() if key not in left_out}})


def attention_of(config: Any) -> str | None:
    """Returns the attention implementation chosen for training the draft layers; None: by device."""
    return getattr(config.transformer_layer_config, "_attn_implementation", None)


def layer_values(config: Any) -> dict[str, Any]:
    """Returns the values of a decoder config as such a config.json holds them."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def complete_layer_config(config: Any) -> Any:
    """Returns a copy with every key that an engine reads."""
    config = copy.deepcopy(config)
    attention_shape(config)  # refuses families without layers here
    config.tie_word_embeddings = False
    config.head_dim = head_dim(config)
    config.rope_parameters = rope_parameters(config)
    for key, value in COMPLETED.items():
        if not hasattr(config, key):
            setattr(config, key, value)
    if config.model_type == "llama":
        config.mlp_bias = bool(getattr(config, "mlp_bias", False))
    layer_types = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    if len(layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(layer_types)} entries for num_hidden_layers={config.num_hidden_layers}; "
            "give one for each draft layer"
        )
    config.layer_types = layer_types
    return config
