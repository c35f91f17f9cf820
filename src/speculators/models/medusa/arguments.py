"""Training arguments Medusa adds to the command line and YAML. Imports nothing heavy: `--help` reads it.

The generic key `num_layers` counts the residual blocks of a head.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from speculators.models.own_shape import OwnShapeArgs

TRAINING_DEFAULTS: dict[str, Any] = {}
"""Generic keys with another default here."""


class MedusaTrainingArgs(OwnShapeArgs):
    why = "Medusa has heads and no decoder layers"

    num_heads: int = Field(4, ge=1, description="Heads: tokens drafted a round.")
    head_weight_decay: float = Field(0.8, gt=0.0, description="Head k weighs decay ** k; losses of heads are added.")
