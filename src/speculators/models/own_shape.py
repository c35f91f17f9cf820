"""Training arguments of drafters that the generic keys cannot shape. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

NOT_HERE = Field(None, description="Not for this drafter: it has no decoder layers of its own to shape.")


class OwnShapeArgs(BaseModel):
    """Keys that shape a drafter's decoder layers, refused: they would be read by nothing."""

    model_config = ConfigDict(extra="forbid")
    why: ClassVar[str]

    draft_arch: str | None = NOT_HERE
    draft_hidden_act: str | None = NOT_HERE
    sliding_window: int | None = NOT_HERE
    full_attention_indices: list[int] | None = NOT_HERE
    draft_config: str | None = NOT_HERE

    @field_validator(
        "draft_arch", "draft_hidden_act", "sliding_window", "full_attention_indices", "draft_config", mode="before"
    )
    @classmethod
    def refuse_shapes(cls, value: Any) -> None:
        if value not in (None, ""):
            raise ValueError(f"{cls.why}; leave this key out")


class NoLayersArgs(OwnShapeArgs):
    """The same for drafters that have no layers to count either."""

    num_layers: int | None = NOT_HERE

    @field_validator("num_layers", mode="before")
    @classmethod
    def refuse_layers(cls, value: Any) -> None:
        cls.refuse_shapes(value)
