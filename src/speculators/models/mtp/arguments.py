"""Training arguments MTP adds to the command line and YAML. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from pydantic import Field

from speculators.models.own_shape import NoLayersArgs

TRAINING_DEFAULTS = {"loss_fn": "ce"}
"""Generic keys with another default here. `ce` teaches the tokens of the data, as MTP layers are trained; every other
loss teaches the verifier's distributions."""


class MTPTrainingArgs(NoLayersArgs):
    why = "an MTP layer has the verifier's own shape"

    num_speculative_steps: int = Field(3, ge=1, description="Tokens drafted a round: how often the layer is run.")
    step_weight_beta: float = Field(0.6, gt=0.0, description="Step k weighs beta ** k, weights adding up to 1.")
