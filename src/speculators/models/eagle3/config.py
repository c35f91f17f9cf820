"""EAGLE-3's config (`speculators_model_type` "eagle3")."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from transformers import PretrainedConfig, Qwen3Config

from speculators.config import SpeculatorModelConfig
from speculators.models.eagle3.keys import FusionArgs
from speculators.training_keys import default_of

DEFAULT_NUM_AUX = 3
"""Aux layers when the config lists none: engines fall back to three as well."""


@SpeculatorModelConfig.register("eagle3")
class Eagle3SpeculatorConfig(SpeculatorModelConfig):
    speculators_model_type: Literal["eagle3"] = "eagle3"
    architectures: list[str] = Field(default_factory=lambda: ["Eagle3Speculator"], description="Model classes")
    transformer_layer_config: PretrainedConfig = Field(
        default_factory=Qwen3Config,
        description="Decoder config of the draft layers; num_hidden_layers counts them, vocab_size is the verifier's",
    )
    draft_vocab_size: int = Field(default=32000, ge=1, description="Rows of the draft head")
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
