"""Shared by drafters made of decoder layers: the nested decoder config as engines read it, and the base of those that
have an embedding, a head and perhaps a vocabulary of their own.

Shapes: V verifier vocabulary, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel
from typing_extensions import Self

from speculators.draft_vocab import DraftVocabMixin, was_never_loaded
from speculators.model import SpeculatorModel
from speculators.nn.attention import attention_shape
from speculators.nn.draft_tokens import select_rows
from speculators.nn.rope import head_dim, rope_parameters
from speculators.verifier.capture import fitting_embedding

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


class DraftModel(DraftVocabMixin, SpeculatorModel):  # type: ignore[misc]
    """Subclasses define `fc`, which reads the verifier's states."""

    takes_routes = True
    columns_on_host = ("document_ids", "loss_mask")
    fc: nn.Linear

    def beside(self, verifier_model: PreTrainedModel) -> Self:
        """This drafter in the verifier's dtype, on its device, complete with its embedding and head."""
        source = fitting_embedding(verifier_model, self.verifier_vocab_size, self.hidden_size)
        model = self
        if self.fc.weight.dtype != source.dtype or self.fc.weight.device != source.device:
            model = copy.deepcopy(self)  # training keeps its own
            model.to(device=source.device, dtype=source.dtype)  # type: ignore[call-arg]
        if was_never_loaded(model.embed_tokens.weight):
            model.embed_tokens.weight.data.copy_(source)
        if was_never_loaded(model.lm_head.weight):
            model.lm_head.weight.data.copy_(select_rows(verifier_model.get_output_embeddings().weight, model.t2d))
        return model


def mask_token_of(config: Any) -> int:
    """Returns the token of masked slots. Raises `ValueError` where there is none, or it is no row of the embedding."""
    token, vocab_size = config.mask_token_id, config.target_vocab_size
    if token is None:
        raise ValueError("mask_token_id is not set, so masked slots have no token; set it in config.json")
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"mask_token_id={token} is no row of the verifier's embedding (0..{vocab_size - 1}); write the id that the "
            "drafter was trained with into config.json"
        )
    return token
