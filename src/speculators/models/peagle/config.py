"""P-EAGLE's training keys and its config (`speculators_model_type` "peagle").

The mask token and the number of anchors are generic keys (`mask_token_id`, `max_anchors`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from speculators.config import SpeculatorModelConfig
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.models.eagle3.keys import FusionArgs
from speculators.training_keys import IDLE, Rule, default_of

TRAINING_DEFAULTS: dict[str, Any] = {}
"""Generic keys with another default here."""


class PEagleTrainingArgs(FusionArgs):
    rules = (
        Rule(
            ("down_sample_ratio", "down_sample_ratio_min", "max_anchors"),
            lambda values: values["num_depths"] == 1,
            "--num-depths is 1: there is no depth to sample",
        ),
        Rule(("norm_output",), lambda values: True, "no state is fed back", IDLE),
    )

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
    norm_output: bool = Field(False, description="Of no effect: no state is fed back.")
    embed_requires_grad: bool = Field(True, description="Train the drafter's copy of the verifier's embedding.")


@SpeculatorModelConfig.register("peagle")
class PEagleSpeculatorConfig(Eagle3SpeculatorConfig):
    speculators_model_type: Literal["peagle"] = "peagle"  # type: ignore[assignment]
    architectures: list[str] = Field(default_factory=lambda: ["PEagleSpeculator"], description="Model classes")
    embed_requires_grad: bool = Field(
        default=default_of(PEagleTrainingArgs, "embed_requires_grad"), description="The embedding is trained"
    )
    mask_token_id: int | None = Field(default=None, description="Token of the masked slots; engines need it")
    num_depths: int | None = Field(
        default=default_of(PEagleTrainingArgs, "num_depths"), ge=1, le=16, description="Slots trained a chain"
    )
    down_sample_ratio: float | None = Field(
        default=default_of(PEagleTrainingArgs, "down_sample_ratio"),
        ge=0.0,
        le=1.0,
        description="Share of depth d in training: to the d",
    )
    down_sample_ratio_min: float | None = Field(
        default=default_of(PEagleTrainingArgs, "down_sample_ratio_min"),
        gt=0.0,
        le=1.0,
        description="Smallest share of a depth",
    )

    # Arguments of training; older writers keep them in the config. We read them, and write what is not the default.
    training_fields: ClassVar[tuple[str, ...]] = ("num_depths", "down_sample_ratio", "down_sample_ratio_min")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in self.training_fields:
            if values.get(name) in (None, default_of(PEagleTrainingArgs, name)):
                values.pop(name, None)
        return values

    def training_value(self, name: str) -> Any:
        """The field, or the default where it is null."""
        value = getattr(self, name)
        return default_of(PEagleTrainingArgs, name) if value is None else value
