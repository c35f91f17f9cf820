"""Training arguments DSpark adds to the command line and YAML. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speculators.models.dflash.arguments import DFlashTrainingArgs

TRAINING_DEFAULTS = {"num_layers": 5, "draft_arch": "qwen3", "loss_fn": "kl_div", "block_size": 8}
"""Generic keys with another default here."""


class DSparkTrainingArgs(DFlashTrainingArgs):
    sample_from_anchor: bool = Field(True, description="The anchor's own slot drafts too: block_size drafts a block.")
    per_position_loss_weight: Literal["fixed-exp-decay", "dpace"] = Field(
        "fixed-exp-decay", description="How much a slot's loss counts. dpace: by what its success is worth now (ce)."
    )
    markov_rank: int = Field(256, ge=0, description="Rank of the Markov head; 0: none.")
    markov_head_type: Literal["vanilla", "gated", "rnn"] = Field(
        "vanilla",
        description="What the bias of a draft is made of: the token before, that and the state, or all before.",
    )
    enable_confidence_head: bool = Field(True, description="Learn how likely each draft is accepted.")
    confidence_head_with_markov: bool = Field(True, description="The confidence head reads the token before, too.")
    confidence_head_alpha: float = Field(1.0, ge=0.0, description="Weight of the confidence head's loss.")
    confidence_target: Literal["acceptance", "greedy"] = Field(
        "acceptance",
        description="What confidence estimates: acceptance of a sampled draft (sum min(p, q)), or greedy agreement.",
    )
