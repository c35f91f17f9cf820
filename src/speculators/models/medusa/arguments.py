"""Training arguments Medusa adds to the command line and YAML. Imports nothing heavy: `--help` reads it.

The generic key `num_layers` counts the residual blocks of a head.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

TRAINING_DEFAULTS: dict[str, Any] = {}
"""Generic keys with another default here."""


class MedusaTrainingArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    num_heads: int = Field(4, ge=1, description="Heads: tokens drafted a round.")
    head_weight_decay: float = Field(0.8, gt=0.0, description="Head k weighs decay ** k; losses of heads are added.")
