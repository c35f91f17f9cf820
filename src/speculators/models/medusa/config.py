"""Medusa's training keys and its config (`speculators_model_type` "medusa").

The generic key `num_layers` counts the residual blocks of a head.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from speculators.config import SpeculatorModelConfig
from speculators.training_keys import FixedShapeArgs, HeadLossArgs, default_of

TRAINING_DEFAULTS: dict[str, Any] = {}
"""Generic keys with another default here."""


class MedusaTrainingArgs(HeadLossArgs, FixedShapeArgs):
    why = "Medusa has heads and no decoder layers"
    rules = (HeadLossArgs.with_one("num_heads", "head"),)

    num_heads: int = Field(4, ge=1, description="Heads: tokens drafted per round.")
    head_weight_decay: float = Field(0.8, gt=0.0, description="Head k weighs decay ** k; losses of heads are added.")


@SpeculatorModelConfig.register("medusa")
class MedusaSpeculatorConfig(SpeculatorModelConfig):
    speculators_model_type: Literal["medusa"] = "medusa"
    architectures: list[str] = Field(default_factory=lambda: ["MedusaDraftModel"], description="Model classes")
    hidden_size: int = Field(default=4096, ge=1, description="The verifier's hidden size")
    vocab_size: int = Field(default=32000, ge=1, description="The verifier's vocabulary")
    num_heads: int = Field(
        default=default_of(MedusaTrainingArgs, "num_heads"), ge=1, description="Heads: tokens drafted per round"
    )
    num_hidden_layers: int = Field(default=1, ge=1, description="Residual blocks of each head")
    rms_norm_eps: float = Field(default=1e-6, gt=0.0, description="Of the verifier's final norm")

    @property
    def draft_vocab_size(self) -> int:
        """Every head is over the verifier's whole vocabulary."""
        return self.vocab_size

    @property
    def target_vocab_size(self) -> int:
        return self.vocab_size
