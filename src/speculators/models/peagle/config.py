"""Config of a P-EAGLE speculator (`speculators_model_type` "peagle")."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from speculators.config import SpeculatorModelConfig
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.models.peagle.arguments import PEagleTrainingArgs


def default_of(name: str) -> Any:
    return PEagleTrainingArgs.model_fields[name].default


@SpeculatorModelConfig.register("peagle")
class PEagleSpeculatorConfig(Eagle3SpeculatorConfig):
    speculators_model_type: Literal["peagle"] = "peagle"  # type: ignore[assignment]
    architectures: list[str] = Field(default_factory=lambda: ["PEagleSpeculator"], description="Model classes")
    embed_requires_grad: bool = Field(default=True, description="The embedding is trained")
    mask_token_id: int | None = Field(default=None, description="Token of the masked slots; engines need it")
    num_depths: int | None = Field(default=default_of("num_depths"), ge=1, le=16, description="Slots trained a chain")
    down_sample_ratio: float | None = Field(
        default=default_of("down_sample_ratio"), ge=0.0, le=1.0, description="Share of depth d in training: to the d"
    )
    down_sample_ratio_min: float | None = Field(
        default=default_of("down_sample_ratio_min"), gt=0.0, le=1.0, description="Smallest share of a depth"
    )

    # Arguments of training; older writers keep them in the config. We read them, and write what is not the default.
    training_fields: ClassVar[tuple[str, ...]] = ("num_depths", "down_sample_ratio", "down_sample_ratio_min")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in self.training_fields:
            if values.get(name) in (None, default_of(name)):
                values.pop(name, None)
        return values

    def training_value(self, name: str) -> Any:
        """The field, or the default where it is null."""
        value = getattr(self, name)
        return default_of(name) if value is None else value
