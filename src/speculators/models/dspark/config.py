"""Config of a DSpark speculator (`speculators_model_type` "dspark")."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speculators.config import SpeculatorModelConfig
from speculators.models.dflash.config import DFlashSpeculatorConfig, is_sliding


@SpeculatorModelConfig.register("dspark")
class DSparkSpeculatorConfig(DFlashSpeculatorConfig):
    speculators_model_type: Literal["dspark"] = "dspark"  # type: ignore[assignment]
    architectures: list[str] = Field(default_factory=lambda: ["DSparkSpeculator"], description="Model classes")
    sample_from_anchor: bool = Field(default=True, description="Slot k drafts the token after its own position")
    markov_rank: int = Field(default=256, ge=0, description="Rank of the Markov head; 0 = none")
    markov_head_type: Literal["vanilla", "gated", "rnn"] = Field(
        default="vanilla", description="What the bias of a draft is made of"
    )
    enable_confidence_head: bool = Field(default=True, description="There is a confidence head")
    confidence_head_with_markov: bool = Field(
        default=True, description="The confidence head reads the Markov embedding of the token before, too"
    )

    @property
    def served_causal(self) -> list[bool]:
        """vLLM goes by the kind of each layer here: its DSpark path writes no flag of its own."""
        nested = self.transformer_layer_config
        is_causal = getattr(nested, "is_causal", None)
        by_kind = [is_sliding(nested, i) for i in range(nested.num_hidden_layers)]
        return by_kind if is_causal is None else [bool(is_causal)] * len(by_kind)
