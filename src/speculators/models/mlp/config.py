"""The MLP speculator's training keys and its config (`speculators_model_type` "mlp")."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from speculators.config import SpeculatorModelConfig
from speculators.training_keys import HeadLossArgs, NoLayersArgs, default_of

TRAINING_DEFAULTS: dict[str, Any] = {"optimizer": "adamw"}
"""Generic keys with another default here. Most of its matrices are tables looked up by token: nothing for Muon."""
OLD_NAMES = {"emb_dim": "hidden_size", "inner_dim": "intermediate_size", "n_predict": "num_layers"}
"""Spelling of the released checkpoints -> ours."""


class MLPTrainingArgs(HeadLossArgs, NoLayersArgs):
    why = "an MLP speculator has no decoder layers (its width is inner_dim)"
    rules = (HeadLossArgs.with_one("n_predict", "step"),)

    n_predict: int = Field(3, ge=1, description="Tokens drafted per round.")
    inner_dim: int = Field(0, ge=0, description="Width of the state. 0: the verifier's hidden size.")
    tie_weights: bool = Field(True, description="All steps share embedding, norm, head and (from step 1) projection.")
    scale_input: bool = Field(False, description="Norm the verifier's state without weights, over sqrt(2).")
    head_weight_decay: float = Field(1.0, gt=0.0, description="Step k weighs decay ** k; losses of steps are added.")


@SpeculatorModelConfig.register("mlp")
class MLPSpeculatorConfig(SpeculatorModelConfig):
    speculators_model_type: Literal["mlp"] = "mlp"
    architectures: list[str] = Field(default_factory=lambda: ["MLPSpeculator"], description="Model classes")
    hidden_size: int = Field(default=4096, ge=1, description="The verifier's hidden size")
    intermediate_size: int = Field(default=4096, ge=1, description="Width of the state that goes from step to step")
    vocab_size: int = Field(default=128256, ge=1, description="The verifier's vocabulary")
    num_layers: int = Field(default=5, ge=1, description="Steps: tokens drafted per round")
    tie_weights: bool = Field(
        default=default_of(MLPTrainingArgs, "tie_weights"),
        description="All steps share embedding, norm and head; all but the first their projection",
    )
    scale_input: bool = Field(
        default=default_of(MLPTrainingArgs, "scale_input"),
        description="Norm the verifier's state without weights, over sqrt(2)",
    )
    rms_norm_eps: float = Field(default=1e-6, gt=0.0, description="Of the verifier's final norm")

    @model_validator(mode="before")
    @classmethod
    def read_old_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {OLD_NAMES.get(key, key): value for key, value in values.items()}
        if values.get("intermediate_size") == 0 and "hidden_size" in values:
            values["intermediate_size"] = values["hidden_size"]
        return values

    @property
    def draft_vocab_size(self) -> int:
        """Every step is over the verifier's whole vocabulary."""
        return self.vocab_size

    @property
    def target_vocab_size(self) -> int:
        return self.vocab_size
