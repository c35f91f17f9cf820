"""MTP's training keys and its config (`speculators_model_type` "mtp")."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator
from transformers import PretrainedConfig, Qwen2Config

from speculators.config import SpeculatorModelConfig
from speculators.training_keys import NoLayersArgs, Rule

TRAINING_DEFAULTS = {"loss_fn": "ce"}
"""Generic keys with another default here. `ce` teaches the tokens of the data, as MTP layers are trained; every other
loss teaches the verifier's distributions."""


class MTPTrainingArgs(NoLayersArgs):
    why = "an MTP layer has the verifier's own shape"
    rules = (Rule(("step_weight_beta",), lambda values: values["num_speculative_steps"] == 1, "there is one step"),)

    num_speculative_steps: int = Field(3, ge=1, description="Tokens drafted per round: how often the layer is run.")
    step_weight_beta: float = Field(0.6, gt=0.0, description="Step k weighs beta ** k, weights adding up to 1.")


@SpeculatorModelConfig.register("mtp")
class MTPSpeculatorConfig(SpeculatorModelConfig):
    default_transformer_model_type: ClassVar[str] = "qwen2"

    speculators_model_type: Literal["mtp"] = "mtp"
    architectures: list[str] = Field(default_factory=lambda: ["MTPDraftModel"], description="Model classes")
    transformer_layer_config: PretrainedConfig = Field(
        default_factory=Qwen2Config,
        description="The verifier's whole text config: num_hidden_layers counts the verifier's layers",
    )
    num_nextn_predict_layers: int = Field(default=1, description="MTP layers; one is shared by all steps")

    @field_validator("num_nextn_predict_layers")
    @classmethod
    def check_one_layer(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"MTP currently supports 1 layer, got {value}; it is run once for each drafted token")
        return value

    @property
    def hidden_size(self) -> int:
        return self.transformer_layer_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.transformer_layer_config.vocab_size

    @property
    def draft_vocab_size(self) -> int:
        """The verifier's vocabulary: an MTP layer drafts through the verifier's own head."""
        return self.vocab_size

    @property
    def target_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def num_speculative_steps(self) -> int:
        """Steps the layer is trained for."""
        methods = self.speculators_config.proposal_methods if self.speculators_config is not None else []
        if not methods:
            raise ValueError(
                "Cannot determine num_speculative_steps: the config has no speculators_config with a proposal method; "
                "its proposal_methods[0].speculative_tokens is the number of steps"
            )
        return methods[0].speculative_tokens  # type: ignore[attr-defined]
