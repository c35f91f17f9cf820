"""Training arguments MTP adds to the command line and YAML. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

TRAINING_DEFAULTS = {"loss_fn": "ce"}
"""Generic keys with another default here. `ce` teaches the tokens of the data, as MTP layers are trained; every other
loss teaches the verifier's distributions."""

SHAPING_KEYS = ("num_layers", "draft_arch", "draft_hidden_act", "sliding_window", "full_attention_indices")
NOT_HERE = Field(None, description="Not for mtp: its layer has the verifier's own shape.")


class MTPTrainingArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    num_speculative_steps: int = Field(3, ge=1, description="Tokens drafted a round: how often the layer is run.")
    step_weight_beta: float = Field(0.6, gt=0.0, description="Step k weighs beta ** k, weights adding up to 1.")
    num_layers: int | None = NOT_HERE
    draft_arch: str | None = NOT_HERE
    draft_hidden_act: str | None = NOT_HERE
    sliding_window: int | None = NOT_HERE
    full_attention_indices: list[int] | None = NOT_HERE
    draft_config: str | None = NOT_HERE

    @field_validator(*SHAPING_KEYS, "draft_config", mode="before")
    @classmethod
    def refuse_shapes(cls, value: Any) -> None:
        if value not in (None, ""):
            raise ValueError("an MTP layer has the verifier's own shape; leave this key out")
