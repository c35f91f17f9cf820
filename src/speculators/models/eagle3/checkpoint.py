"""What an EAGLE-3 checkpoint must hold. Engines do not report missing tensors or keys, so we check before writing."""

from __future__ import annotations

from typing import Any

from speculators.models.draft_layers import complete_layer_config, layer_keys
from speculators.models.eagle3.config import DEFAULT_NUM_AUX, Eagle3SpeculatorConfig


def complete_transformer_layer_config(config: Any, num_aux: int = DEFAULT_NUM_AUX) -> Any:
    """A copy with every key an engine reads written down."""
    config = complete_layer_config(config)
    if config.model_type == "llama" and num_aux != DEFAULT_NUM_AUX:
        # vLLM's llama variant sizes fc by this key and does not look at eagle_aux_hidden_state_layer_ids.
        config.num_aux_hidden_states = num_aux
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
