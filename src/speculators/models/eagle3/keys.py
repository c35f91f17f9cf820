"""EAGLE-3's training keys. Imports nothing heavy: `train --help` reads them."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from speculators.training_keys import Rule, TrainingArgs

TRAINING_DEFAULTS = {"draft_arch": "llama"}
"""Generic keys with another default here."""


class FusionArgs(TrainingArgs):
    """How the verifier's states enter the first layer. The command line trains EAGLE-3.1; a config that says nothing is
    the original EAGLE-3."""

    norm_before_residual: bool = Field(True, description="First layer's residual starts from the normed state.")
    fc_norm: bool = Field(False, description="One RMSNorm for each verifier state instead.")
    norm_before_fc: bool | None = Field(
        None,
        validate_default=True,
        description="One RMSNorm over the concatenated verifier states. None: on, unless fc_norm.",
    )
    norm_output: bool = Field(True, description="Feed the normed state to the next step.")
    embed_requires_grad: bool = Field(False, description="Train the drafter's copy of the verifier's embedding.")

    @field_validator("norm_before_fc")
    @classmethod
    def choose_norm(cls, value: bool | None, others: ValidationInfo) -> bool:
        return not others.data.get("fc_norm") if value is None else value


class Eagle3TrainingArgs(FusionArgs):
    rules = (Rule(("ttt_step_loss_decay",), lambda values: values["ttt_steps"] == 1, "--ttt-steps is 1"),)

    ttt_steps: int = Field(3, ge=1, description="How often the drafter is fed its own output (test-time training).")
    ttt_step_loss_decay: float = Field(1.0, gt=0.0, description="Step s counts decay ** s; losses of steps are added.")


TRAINING_ARGS = Eagle3TrainingArgs
