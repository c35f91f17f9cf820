"""Training arguments EAGLE adds to the command line and YAML. Imports nothing heavy: `--help` reads it.

EAGLE-1, EAGLE-2   --ttt-steps 1 --top-k-weight 0            (EAGLE-2 differs in how it drafts: dynamic trees)
HASS               --ttt-steps 3 --detach-steps --top-k-weight 1
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

TRAINING_DEFAULTS = {"draft_arch": "llama"}
"""Generic keys with another default here."""


class EagleTrainingArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    layernorms: bool = Field(False, description="Norms on the embedding, before the layer and before the head.")
    fusion_bias: bool = Field(False, description="Bias of the linear that joins token and feature. vLLM has none.")
    transformer_layer_architecture: str = Field("auto", description="Decoder layer class; auto: by --draft-arch.")
    ttt_steps: int = Field(3, ge=1, description="How often the drafter is fed its own features in training.")
    detach_steps: bool = Field(True, description="Steps learn apart: no gradient flows into the step before.")
    regression_weight: float = Field(1.0, ge=0.0, description="Weight of smooth L1 between features.")
    distillation_weight: float = Field(0.1, ge=0.0, description="Weight of loss_fn between next-token distributions.")
    top_k_weight: float = Field(1.0, ge=0.0, description="Weight of cross entropy on the verifier's likeliest tokens.")
    top_k: int = Field(10, ge=1, description="How many likeliest tokens that is.")
    feature_noise: float = Field(
        0.2,
        ge=0.0,
        description="Width of uniform noise on the features in training; times 512 / length in longer rows.",
    )


def default_of(name: str) -> Any:
    return EagleTrainingArgs.model_fields[name].default
