"""DSpark's training keys and its config (`speculators_model_type` "dspark")."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speculators.config import SpeculatorModelConfig
from speculators.models.dflash.config import (
    ALL_FULL,
    DPACE,
    NO_DPACE,
    DFlashSpeculatorConfig,
    DFlashTrainingArgs,
    is_dpace,
    is_sliding,
)
from speculators.models.dflash.config import TRAINING_DEFAULTS as DFLASH_DEFAULTS
from speculators.training_keys import Rule, default_of

TRAINING_DEFAULTS = {"num_layers": DFLASH_DEFAULTS["num_layers"]}
"""Generic keys with another default here."""
CALLED_BY_HAND = {"max_anchors": 3072}
"""The contract's default of `get_trainer_kwargs` called in Python; the command line's is enough and cheaper."""


class DSparkTrainingArgs(DFlashTrainingArgs):
    rules = (
        NO_DPACE,
        ALL_FULL,
        Rule(
            ("dflash_decay_gamma",),
            lambda values: is_dpace(values) and not values["enable_confidence_head"],
            f"--per-position-loss-weight is {DPACE}, and there is no confidence head",
        ),
        Rule(
            ("markov_head_type", "confidence_head_with_markov"),
            lambda values: not values["markov_rank"],
            "--markov-rank 0 leaves no Markov head",
        ),
        Rule(
            ("confidence_head_with_markov", "confidence_head_alpha", "confidence_target"),
            lambda values: not values["enable_confidence_head"],
            "--no-enable-confidence-head leaves no confidence head",
        ),
    )

    sample_from_anchor: bool = Field(True, description="The anchor's own slot drafts too: block_size drafts per block.")
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


@SpeculatorModelConfig.register("dspark")
class DSparkSpeculatorConfig(DFlashSpeculatorConfig):
    speculators_model_type: Literal["dspark"] = "dspark"  # type: ignore[assignment]
    architectures: list[str] = Field(default_factory=lambda: ["DSparkSpeculator"], description="Model classes")
    sample_from_anchor: bool = Field(
        default=default_of(DSparkTrainingArgs, "sample_from_anchor"),
        description="Slot k drafts the token after its own position",
    )
    markov_rank: int = Field(
        default=default_of(DSparkTrainingArgs, "markov_rank"), ge=0, description="Rank of the Markov head; 0 = none"
    )
    markov_head_type: Literal["vanilla", "gated", "rnn"] = Field(
        default=default_of(DSparkTrainingArgs, "markov_head_type"), description="What the bias of a draft is made of"
    )
    enable_confidence_head: bool = Field(
        default=default_of(DSparkTrainingArgs, "enable_confidence_head"), description="There is a confidence head"
    )
    confidence_head_with_markov: bool = Field(
        default=default_of(DSparkTrainingArgs, "confidence_head_with_markov"),
        description="The confidence head reads the Markov embedding of the token before, too",
    )

    @property
    def served_causal(self) -> list[bool]:
        """vLLM goes by the kind of each layer here: its DSpark path writes no flag of its own."""
        nested = self.transformer_layer_config
        is_causal = getattr(nested, "is_causal", None)
        by_kind = [is_sliding(nested, i) for i in range(nested.num_hidden_layers)]
        return by_kind if is_causal is None else [bool(is_causal)] * len(by_kind)
