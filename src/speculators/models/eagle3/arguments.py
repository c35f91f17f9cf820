"""Training arguments EAGLE-3 adds to the command line and YAML. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

TRAINING_DEFAULTS = {"draft_arch": "llama"}
"""Generic keys with another default here."""


class Eagle3TrainingArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ttt_steps: int = Field(3, ge=1, description="How often the drafter is fed its own output (test-time training).")
    ttt_step_loss_decay: float = Field(1.0, gt=0.0, description="Step s counts decay ** s; losses of steps are added.")
    norm_before_residual: bool = Field(True, description="First layer's residual starts from the normed state.")
    norm_before_fc: bool | None = Field(
        None, description="One RMSNorm over the concatenated verifier states. None: on, unless fc_norm."
    )
    fc_norm: bool = Field(False, description="One RMSNorm for each verifier state instead.")
    norm_output: bool = Field(True, description="Feed the normed state to the next step.")
    embed_requires_grad: bool = Field(False, description="Train the drafter's copy of the verifier's embedding.")
