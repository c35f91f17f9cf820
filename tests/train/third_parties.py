"""Algorithms of third parties, each written its own way. Named by `--plugins`, and by nothing in the package."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, field_serializer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, Qwen3Config

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.interfaces import LossOutput, PackedBatch
from speculators.losses.metrics import ratio
from speculators.model import DraftVocabMixin
from speculators.model_training import DrafterArgs, LossArgs
from speculators.training_keys import TrainingArgs


class NextToken(DraftVocabMixin, SpeculatorModel):
    """Predicts the next token but one from a state and the next token."""

    def __init__(self, config: Any):
        super().__init__(config)
        size = self.hidden_size
        self.layers = nn.ModuleList([nn.Linear(size, size)])
        self.head = nn.Linear(size, self.verifier_vocab_size)
        self.target_layer_ids = [1]
        self.post_init()

    def losses(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """One per column but the last two."""
        logits = self.head(torch.tanh(self.layers[0](states[:-2])))
        return cross_entropy(logits, tokens[2:], reduction="none")


# -- the doors overridden, as the guide of earlier releases says -------------------------------------------------------


@SpeculatorModelConfig.register("own_serializer")
class OwnSerializerConfig(SpeculatorModelConfig):
    speculators_model_type: str = "own_serializer"
    transformer_layer_config: PretrainedConfig = Field(default_factory=Qwen3Config)
    draft_vocab_size: int = 64

    @field_serializer("transformer_layer_config")
    def write_layers(self, value: PretrainedConfig) -> dict[str, Any]:
        return {**value.to_diff_dict(), "model_type": value.model_type, "written_by": "a third party"}


@SpeculatorModel.register("own_serializer")
class OwnSerializerModel(NextToken):
    config_class = OwnSerializerConfig

    @classmethod
    def from_training_args(cls, verifier_config: Any, **kwargs: Any) -> OwnSerializerModel:
        return cls(cls.config_class(transformer_layer_config=verifier_config))

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"scale": 2.0}, {"scale": 1.0}

    def forward(self, hidden_states, input_ids, loss_mask, scale, **kwargs):
        weight = loss_mask[0, 2:]
        loss = scale * (self.losses(hidden_states[0], input_ids[0]) * weight).sum() / weight.sum().clamp(min=1)
        return None, loss, {"loss": loss.detach()}


# -- a forward that names three columns --------------------------------------------------------------------------------


@SpeculatorModelConfig.register("three_columns")
class ThreeColumnsConfig(SpeculatorModelConfig):
    speculators_model_type: str = "three_columns"
    transformer_layer_config: PretrainedConfig = Field(default_factory=Qwen3Config)
    draft_vocab_size: int = 64


@SpeculatorModel.register("three_columns")
class ThreeColumnsModel(OwnSerializerModel):
    config_class = ThreeColumnsConfig

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {}

    def forward(self, hidden_states, input_ids, loss_mask, **kwargs):
        return super().forward(hidden_states, input_ids, loss_mask, scale=1.0)


# -- the typed hooks ---------------------------------------------------------------------------------------------------


class HookedArgs(TrainingArgs):
    depth_weight: float = Field(0.5, gt=0.0, description="Weight of the only loss.")


@SpeculatorModelConfig.register("hooked")
class HookedConfig(SpeculatorModelConfig):
    speculators_model_type: str = "hooked"
    transformer_layer_config: PretrainedConfig = Field(default_factory=Qwen3Config)
    draft_vocab_size: int = 64
    trained_with: float = 0.0


@SpeculatorModel.register("hooked")
class HookedModel(NextToken):
    config_class = HookedConfig
    training_args = HookedArgs

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[HookedArgs]) -> dict[str, Any]:
        return {"transformer_layer_config": layer_config, "trained_with": args.own.depth_weight}

    def train_on(self, batch: PackedBatch, args: LossArgs[HookedArgs]) -> LossOutput:
        weight = batch.supervised_T[2:] & (batch.document_ids_T[2:] == batch.document_ids_T[:-2])
        loss = (self.losses(batch.aux_TD, batch.token_ids_T) * weight).sum() / weight.sum().clamp(min=1)
        return LossOutput(args.own.depth_weight * loss, {"weight": ratio(args.own.depth_weight, 1)})
