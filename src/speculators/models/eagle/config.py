"""EAGLE's training keys and its config (`speculators_model_type` "eagle").

EAGLE-1, EAGLE-2   --ttt-steps 1 --top-k-weight 0            (EAGLE-2 differs in how it drafts: dynamic trees)
HASS               --ttt-steps 3 --detach-steps --top-k-weight 1
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from speculators.config import SpeculatorModelConfig
from speculators.nn.attention import FAMILIES
from speculators.proposals import GreedyTokenProposalConfig
from speculators.training_keys import Rule, TrainingArgs, default_of

TRAINING_DEFAULTS = {"draft_arch": "llama"}
"""Generic keys with another default here."""
AUTO = "auto"
NUM_TOKENS = GreedyTokenProposalConfig.model_fields["speculative_tokens"].default
"""Draft tokens per round, where nothing else is recorded: the layer itself can be run any number of times."""


class EagleTrainingArgs(TrainingArgs):
    rules = (
        Rule(("top_k",), lambda values: not values["top_k_weight"], "--top-k-weight is 0"),
        Rule(("loss_fn",), lambda values: not values["distillation_weight"], "--distillation-weight is 0"),
        Rule(("detach_steps",), lambda values: values["ttt_steps"] == 1, "--ttt-steps is 1"),
    )

    layernorms: bool = Field(False, description="Norms on the embedding, before the layer and before the head.")
    fusion_bias: bool = Field(False, description="Bias of the linear that joins token and feature. vLLM has none.")
    transformer_layer_architecture: str = Field(AUTO, description="Decoder layer class; auto: by --draft-arch.")
    ttt_steps: int = Field(3, ge=1, description="How often the drafter is fed its own features in training.")
    detach_steps: bool = Field(True, description="Steps learn apart: no gradient flows into the step before.")
    regression_weight: float = Field(1.0, ge=0.0, description="Weight of smooth L1 between features.")
    distillation_weight: float = Field(0.1, ge=0.0, description="Weight of loss_fn between next-token distributions.")
    top_k_weight: float = Field(1.0, ge=0.0, description="Weight of cross entropy on the verifier's likeliest tokens.")
    top_k: int = Field(10, ge=1, description="How many likeliest tokens that is.")
    feature_noise: float = Field(
        0.2,
        ge=0.0,
        description="Width of uniform noise on the features in training; times 512 / length in longer rows.",
    )


@SpeculatorModelConfig.register("eagle")
class EagleSpeculatorConfig(SpeculatorModelConfig):
    """EAGLE-1 and 2: neither layernorms nor fusion_bias. HASS: fusion_bias."""

    default_transformer_model_type: ClassVar[str] = "llama"

    speculators_model_type: Literal["eagle"] = "eagle"
    architectures: list[str] = Field(default_factory=lambda: ["EagleSpeculator"], description="Model and layer classes")
    transformer_layer_architecture: str = Field(
        default=default_of(EagleTrainingArgs, "transformer_layer_architecture"),
        description="Decoder layer class; auto: by the config",
    )
    transformer_layer_config: PretrainedConfig = Field(
        default_factory=LlamaConfig, description="Decoder config of the one draft layer; vocab_size is the verifier's"
    )
    layernorms: bool = Field(
        default=default_of(EagleTrainingArgs, "layernorms"),
        description="Norms on the embedding, before the layer and before the head",
    )
    fusion_bias: bool = Field(
        default=default_of(EagleTrainingArgs, "fusion_bias"),
        description="Bias of the linear that joins token and feature",
    )

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


def layer_architecture(config: EagleSpeculatorConfig) -> str:
    """The decoder layer's class name: the config's, or the one of its nested config's family."""
    nested = config.transformer_layer_config
    if type(nested) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise TypeError(f"transformer_layer_config is a {type(nested).__name__}, which is of no causal language model")
    known = {f"{family.capitalize()}DecoderLayer": family for family in FAMILIES}
    name = config.transformer_layer_architecture
    if name == AUTO:
        name = type(nested).__name__.removesuffix("Config") + "DecoderLayer"
    if known.get(name) != nested.model_type:
        raise ValueError(
            f"transformer_layer_architecture={name!r} with model_type={nested.model_type!r} has no draft layer here; "
            f"known are {sorted(known)}, each with a config of its own family"
        )
    return name
