"""EAGLE-3's training keys and its config (`speculators_model_type` "eagle3")."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from transformers import PretrainedConfig, Qwen3Config

from speculators.config import SpeculatorModelConfig
from speculators.training_keys import TrainingArgs, default_of

TRAINING_DEFAULTS = {"draft_arch": "llama"}
"""Generic keys with another default here."""
DEFAULT_NUM_AUX = 3
"""Aux layers when the config lists none: engines fall back to three as well."""


class FusionArgs(TrainingArgs):
    """How the verifier's states enter the first layer. The command line trains EAGLE-3.1; a config that says nothing is
    the original EAGLE-3."""

    norm_before_residual: bool = Field(True, description="First layer's residual starts from the normed state.")
    fc_norm: bool = Field(False, description="One RMSNorm for each verifier state instead.")
    norm_before_fc: bool | None = Field(
        None,
        validate_default=True,
        description="One RMSNorm over the concatenated verifier states. None: on, unless fc_norm.",
    )
    norm_output: bool = Field(True, description="Feed the normed state to the next step.")
    embed_requires_grad: bool = Field(False, description="Train the drafter's copy of the verifier's embedding.")

    @field_validator("norm_before_fc")
    @classmethod
    def choose_norm(cls, value: bool | None, others: ValidationInfo) -> bool:
        return not others.data.get("fc_norm") if value is None else value


class Eagle3TrainingArgs(FusionArgs):
    ttt_steps: int = Field(3, ge=1, description="How often the drafter is fed its own output (test-time training).")
    ttt_step_loss_decay: float = Field(1.0, gt=0.0, description="Step s counts decay ** s; losses of steps are added.")


@SpeculatorModelConfig.register("eagle3")
class Eagle3SpeculatorConfig(SpeculatorModelConfig):
    speculators_model_type: Literal["eagle3"] = "eagle3"
    architectures: list[str] = Field(default_factory=lambda: ["Eagle3Speculator"], description="Model classes")
    transformer_layer_config: PretrainedConfig = Field(
        default_factory=Qwen3Config,
        description="Decoder config of the draft layers; num_hidden_layers counts them, vocab_size is the verifier's",
    )
    draft_vocab_size: int = Field(default=32000, description="Rows of the draft head")
    norm_before_residual: bool = Field(default=False, description="First layer's residual starts after hidden_norm")
    target_hidden_size: int | None = Field(default=None, description="Verifier's hidden size when it differs")
    eagle_aux_hidden_state_layer_ids: list[int] | None = Field(
        default=None, description="Verifier layers whose states are read; i = after i layers. None means three"
    )
    norm_before_fc: bool = Field(default=False, description="One RMSNorm over the concatenated aux states")
    fc_norm: bool = Field(default=default_of(FusionArgs, "fc_norm"), description="One RMSNorm for each aux state")
    norm_output: bool = Field(default=False, description="Feed the normed state to the next step")
    embed_requires_grad: bool = Field(
        default=default_of(FusionArgs, "embed_requires_grad"), description="The embedding is trained"
    )

    @model_validator(mode="after")
    def check_norms(self):
        if self.norm_before_fc and self.fc_norm:
            raise ValueError(
                "norm_before_fc and fc_norm are mutually exclusive: both norm the states before fc; keep one"
            )
        return self

    @property
    def target_vocab_size(self) -> int:
        """Tokens of the verifier."""
        return self.transformer_layer_config.vocab_size

    @property
    def num_aux(self) -> int:
        return len(self.eagle_aux_hidden_state_layer_ids or ()) or DEFAULT_NUM_AUX
