"""Training arguments DFlash adds to the command line and YAML. Imports nothing heavy: `--help` reads it.

The size of a block, the number of anchors and the mask token are generic keys (`block_size`, `max_anchors`,
`mask_token_id`): other drafters have them too.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

TRAINING_DEFAULTS = {"num_layers": 5, "draft_arch": "qwen3", "loss_fn": "ce", "block_size": 16}
"""Generic keys with another default here."""


class DFlashTrainingArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sample_from_anchor: bool = Field(False, description="The anchor's own slot drafts too: block_size drafts a block.")
    sliding_window_non_causal: bool = Field(
        False, description="Slots of sliding layers see later slots of their block as well."
    )
    dflash_decay_gamma: float = Field(4.0, gt=0.0, description="fixed-exp-decay: slot k weighs exp(-(k - 1) / gamma).")
    per_position_loss_weight: Literal["fixed-exp-decay", "dpace"] = Field(
        "dpace", description="How much a slot's loss counts. dpace: by what its success is worth now (needs ce)."
    )
    dpace_alpha: float = Field(
        0.5, gt=0.0, le=1.0, description="Smoothing of dpace; 1: all slots weigh by place alone."
    )
