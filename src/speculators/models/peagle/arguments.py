"""Training arguments P-EAGLE adds to the command line and YAML. Imports nothing heavy: `--help` reads it.

The mask token and the number of anchors are generic keys (`mask_token_id`, `max_anchors`).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

TRAINING_DEFAULTS: dict[str, Any] = {}
"""Generic keys with another default here."""


class PEagleTrainingArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    num_depths: int = Field(8, ge=1, le=16, description="Tokens drafted in one forward.")
    down_sample_ratio: float = Field(
        0.7, ge=0.0, le=1.0, description="Depth d is trained at this share, to the power d, of the supervised tokens."
    )
    down_sample_ratio_min: float = Field(
        0.2, gt=0.0, le=1.0, description="Depth d is trained at no smaller share than this."
    )
    norm_before_residual: bool = Field(False, description="First layer's residual starts from the normed state.")
    norm_before_fc: bool | None = Field(
        False, description="One RMSNorm over the concatenated verifier states. None: on, unless fc_norm."
    )
    fc_norm: bool = Field(False, description="One RMSNorm for each verifier state instead.")
    norm_output: bool = Field(False, description="Of no effect: no state is fed back.")
    embed_requires_grad: bool = Field(True, description="Train the drafter's copy of the verifier's embedding.")
