"""What an EAGLE-3 checkpoint must hold. Engines do not report missing tensors or keys, so we check before writing."""

from __future__ import annotations

import copy
from typing import Any

from speculators.models.eagle3.config import DEFAULT_NUM_AUX, Eagle3SpeculatorConfig
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


def complete_transformer_layer_config(config: Any, num_aux: int = DEFAULT_NUM_AUX) -> Any:
    """A copy with every key an engine reads written down."""
    config = copy.deepcopy(config)
    attention_shape(config)  # refuses what cannot be served
    config.tie_word_embeddings = False
    config.head_dim = head_dim(config)
    config.rope_parameters = rope_parameters(config)
    for key, value in COMPLETED.items():
        if not hasattr(config, key):
            setattr(config, key, value)
    if config.model_type == "llama":
        config.mlp_bias = bool(getattr(config, "mlp_bias", False))
        if num_aux != DEFAULT_NUM_AUX:
            # vLLM's llama variant sizes fc by this key and does not look at eagle_aux_hidden_state_layer_ids.
            config.num_aux_hidden_states = num_aux
    layer_types = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    if len(layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(layer_types)} entries for num_hidden_layers={config.num_hidden_layers}; "
            "give one for each draft layer"
        )
    config.layer_types = layer_types
    return config


def expected_keys(config: Eagle3SpeculatorConfig) -> set[str]:
    """Names of the tensors on disk."""
    nested = config.transformer_layer_config
    keys = {"embed_tokens.weight", "fc.weight", "norm.weight", "lm_head.weight"}
    if config.draft_vocab_size != nested.vocab_size:
        keys |= {"d2t", "t2d"}
    if config.norm_before_fc:
        keys.add("input_norm.weight")
    if config.fc_norm:
        keys |= {f"fc_norm.{j}.weight" for j in range(config.num_aux)}
    keys.add("layers.0.hidden_norm.weight")
    for i in range(nested.num_hidden_layers):
        keys |= {f"layers.{i}.{name}" for name in layer_keys(nested)}
    return keys


def layer_keys(nested: Any) -> set[str]:
    shape = attention_shape(nested)
    biased = bool(getattr(nested, "attention_bias", False))
    keys = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    for name in ("q", "k", "v", "o"):
        keys.add(f"self_attn.{name}_proj.weight")
        if biased and (name != "o" or shape.output_bias):
            keys.add(f"self_attn.{name}_proj.bias")
    if shape.qk_norm:
        keys |= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    for name in ("gate", "up", "down"):
        keys.add(f"mlp.{name}_proj.weight")
        if getattr(nested, "mlp_bias", False):
            keys.add(f"mlp.{name}_proj.bias")
    return keys
