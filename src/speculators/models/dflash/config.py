"""Config of a DFlash speculator (`speculators_model_type` "dflash")."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from transformers import PretrainedConfig, Qwen3Config

from speculators.config import SpeculatorModelConfig
from speculators.models.dflash.block_attention import LayerMask
from speculators.nn.attention import layer_window


@SpeculatorModelConfig.register("dflash")
class DFlashSpeculatorConfig(SpeculatorModelConfig):
    speculators_model_type: Literal["dflash"] = "dflash"
    architectures: list[str] = Field(default_factory=lambda: ["DFlashSpeculator"], description="Model classes")
    transformer_layer_config: PretrainedConfig = Field(
        default_factory=Qwen3Config,
        description="Decoder config of the draft layers; num_hidden_layers counts them, vocab_size is the verifier's",
    )
    draft_vocab_size: int = Field(default=32000, description="Rows of the draft head")
    block_size: int = Field(default=8, ge=1, description="Slots of a block, the anchor's included")
    max_anchors: int | None = Field(
        default=None, ge=1, description="Blocks trained in a packed row; an argument of training today, kept when given"
    )
    target_hidden_size: int | None = Field(default=None, description="Verifier's hidden size when it differs")
    aux_hidden_state_layer_ids: list[int] | None = Field(
        default=None, description="Verifier layers whose states are read; i = after i layers"
    )
    mask_token_id: int | None = Field(default=None, description="Token of the masked slots")
    sliding_window_non_causal: bool = Field(
        default=False, description="Slots of sliding layers see later slots of their block"
    )
    sample_from_anchor: bool = Field(default=False, description="Slot k drafts the token after its own position")

    @property
    def target_vocab_size(self) -> int:
        """Tokens of the verifier."""
        return self.transformer_layer_config.vocab_size

    @property
    def first_slot(self) -> int:
        """The first slot that drafts."""
        return 0 if self.sample_from_anchor else 1

    @property
    def num_drafts(self) -> int:
        """Tokens a full block drafts."""
        return self.block_size - self.first_slot

    @property
    def layer_masks(self) -> list[LayerMask]:
        """What slots of each layer see. `is_causal` inside `transformer_layer_config` decides for all layers, as in
        vLLM; without it full layers see their whole block, sliding layers only when `sliding_window_non_causal`."""
        nested = self.transformer_layer_config
        is_causal = getattr(nested, "is_causal", None)
        layer_masks = []
        for i in range(nested.num_hidden_layers):
            by_kind = is_sliding(nested, i) and not self.sliding_window_non_causal
            layer_masks.append(LayerMask(layer_window(nested, i), by_kind if is_causal is None else bool(is_causal)))
        return layer_masks

    @property
    def trained_causal(self) -> list[bool]:
        return [layer_mask.causal for layer_mask in self.layer_masks]

    @property
    def served_causal(self) -> list[bool]:
        """Whether vLLM serves each layer causal (qwen3_dflash.py, speculators/algos.py): one answer for all layers."""
        nested = self.transformer_layer_config
        is_causal = getattr(nested, "is_causal", None)
        served = not self.sliding_window_non_causal if is_causal is None else bool(is_causal)
        return [served] * nested.num_hidden_layers

    def to_dict(self) -> dict[str, Any]:
        """`max_anchors` is a key of older writers: written only when it was given."""
        values = super().to_dict()
        if values.get("max_anchors") is None:
            values.pop("max_anchors", None)
        return values


def is_sliding(nested: PretrainedConfig, layer: int) -> bool:
    layer_types = getattr(nested, "layer_types", None)
    return layer_types is not None and layer_types[layer] == "sliding_attention"


def check_buildable(config: DFlashSpeculatorConfig) -> None:
    """What a config may leave open but a model cannot."""
    if not isinstance(config, DFlashSpeculatorConfig):
        return  # the base class says so
    ids = config.aux_hidden_state_layer_ids
    if not ids:
        raise ValueError(
            f"aux_hidden_state_layer_ids={ids}: its length sizes fc; list the verifier layers to read, e.g. "
            "[2, n // 2, n - 3] of n layers"
        )
    nested = config.transformer_layer_config
    if any(is_sliding(nested, i) for i in range(nested.num_hidden_layers)) and not nested.sliding_window:
        raise ValueError(
            f"layer_types has sliding layers but sliding_window={nested.sliding_window}: engines refuse that; set it, "
            "and use_sliding_window=True (without which transformers drops the window of a qwen3 config)"
        )
    if config.num_drafts < 1:
        raise ValueError(
            f"block_size={config.block_size} drafts nothing: slot 0 holds the anchor; use 2 or more, or "
            "sample_from_anchor"
        )
