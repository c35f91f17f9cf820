"""Training arguments the MLP speculator adds to the command line and YAML. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from speculators.models.own_shape import NoLayersArgs

TRAINING_DEFAULTS: dict[str, Any] = {"optimizer": "adamw"}
"""Generic keys with another default here. Most of its matrices are tables looked up by token: nothing for Muon."""


class MLPTrainingArgs(NoLayersArgs):
    why = "an MLP speculator has no decoder layers (its width is inner_dim)"

    n_predict: int = Field(3, ge=1, description="Tokens drafted a round.")
    inner_dim: int = Field(0, ge=0, description="Width of the state. 0: the verifier's hidden size.")
    tie_weights: bool = Field(True, description="All steps share embedding, norm, head and (from step 1) projection.")
    scale_input: bool = Field(False, description="Norm the verifier's state without weights, over sqrt(2).")
    head_weight_decay: float = Field(1.0, gt=0.0, description="Step k weighs decay ** k; losses of steps are added.")


def default_of(name: str) -> Any:
    return MLPTrainingArgs.model_fields[name].default
