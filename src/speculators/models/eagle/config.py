"""Config of an EAGLE-1/2 or HASS speculator (`speculators_model_type` "eagle")."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from transformers import LlamaConfig, PretrainedConfig

from speculators.config import SpeculatorModelConfig

AUTO = "auto"


@SpeculatorModelConfig.register("eagle")
class EagleSpeculatorConfig(SpeculatorModelConfig):
    """EAGLE-1 and 2: neither layernorms nor fusion_bias. HASS: fusion_bias."""

    default_transformer_model_type: ClassVar[str] = "llama"

    speculators_model_type: Literal["eagle"] = "eagle"  # type: ignore[assignment]
    architectures: list[str] = Field(default_factory=lambda: ["EagleSpeculator"], description="Model and layer classes")
    transformer_layer_architecture: str = Field(default=AUTO, description="Decoder layer class; auto: by the config")
    transformer_layer_config: PretrainedConfig = Field(
        default_factory=LlamaConfig, description="Decoder config of the one draft layer; vocab_size is the verifier's"
    )
    layernorms: bool = Field(default=False, description="Norms on the embedding, before the layer and before the head")
    fusion_bias: bool = Field(default=False, description="Bias of the linear that joins token and feature")

    @model_validator(mode="after")
    def check_add_architectures(self):
        self.add_layer_architecture()
        return self

    def add_layer_architecture(self) -> None:
        """The layer's class is listed beside the model's."""
        name = self.transformer_layer_architecture
        if name != AUTO and name not in self.architectures:
            self.architectures = [*self.architectures, name]

    @classmethod
    def validate_transformer_layer_config(cls, value: Any) -> PretrainedConfig:
        """The contract's name in this algorithm for `validate_transformer_config`."""
        return cls.validate_transformer_config(value)

    def serialize_transformer_layer_config(self, value: PretrainedConfig) -> dict[str, Any]:
        """The contract's name in this algorithm for `serialize_transformer_config`."""
        return self.serialize_transformer_config(value)

    def to_dict(self) -> dict[str, Any]:
        """transformers writes the model class alone on saving; the layer's is written with it."""
        values, name = super().to_dict(), self.transformer_layer_architecture
        if name != AUTO and name not in (values.get("architectures") or []):
            values["architectures"] = [*(values.get("architectures") or []), name]
        return values

    @property
    def target_vocab_size(self) -> int:
        """Tokens of the verifier."""
        return self.transformer_layer_config.vocab_size
