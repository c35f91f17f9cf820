"""DFlash's training keys and its config (`speculators_model_type` "dflash").

The size of a block, the number of anchors and the mask token are generic keys (`block_size`, `max_anchors`,
`mask_token_id`): other drafters have them too.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from transformers import PretrainedConfig, Qwen3Config

from speculators.config import SpeculatorModelConfig
from speculators.models.dflash.block_attention import LayerMask
from speculators.nn.attention import layer_window
from speculators.training_keys import DraftKeys, Rule, TrainingArgs, Values, default_of

TRAINING_DEFAULTS = {"num_layers": 5, "loss_fn": "ce", "block_size": 16}
"""Generic keys with another default here."""
FIXED_DECAY, DPACE = "fixed-exp-decay", "dpace"
CALLED_BY_HAND = {"block_size": default_of(DraftKeys, "block_size"), "per_position_loss_weight": FIXED_DECAY}
"""The contract's defaults of calls in Python; the command line's are the better ones."""


def is_dpace(values: Values) -> bool:
    return values["per_position_loss_weight"] == DPACE


def slides_nowhere(values: Values) -> bool:
    """Says whether every layer has full attention, as far as the keys shape them."""
    is_shaped = not values["draft_config"] and not values["from_pretrained"]
    return is_shaped and set(range(values["num_layers"])) <= set(values["full_attention_indices"] or ())


NO_DPACE = Rule(("dpace_alpha",), lambda values: not is_dpace(values), f"--per-position-loss-weight is not {DPACE}")
ALL_FULL = Rule(("sliding_window_non_causal",), slides_nowhere, "every layer has full attention")


class DFlashTrainingArgs(TrainingArgs):
    rules: ClassVar[tuple[Rule, ...]] = (
        NO_DPACE,
        ALL_FULL,
        Rule(("dflash_decay_gamma",), is_dpace, f"--per-position-loss-weight is {DPACE}"),
    )

    sample_from_anchor: bool = Field(
        False, description="The anchor's own slot drafts too: block_size drafts per block."
    )
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


@SpeculatorModelConfig.register("dflash")
class DFlashSpeculatorConfig(SpeculatorModelConfig):
    speculators_model_type: Literal["dflash"] = "dflash"
    architectures: list[str] = Field(default_factory=lambda: ["DFlashSpeculator"], description="Model classes")
    transformer_layer_config: PretrainedConfig = Field(
        default_factory=Qwen3Config,
        description="Decoder config of the draft layers; num_hidden_layers counts them, vocab_size is the verifier's",
    )
    draft_vocab_size: int = Field(default=32000, ge=1, description="Rows of the draft head")
    block_size: int = Field(
        default=default_of(DraftKeys, "block_size"), ge=1, description="Slots of a block, the anchor's included"
    )
    max_anchors: int | None = Field(
        default=None, ge=1, description="Blocks trained in a packed row; an argument of training today, kept when given"
    )
    target_hidden_size: int | None = Field(default=None, description="Verifier's hidden size when it differs")
    aux_hidden_state_layer_ids: list[int] | None = Field(
        default=None, description="Verifier layers whose states are read; i = after i layers"
    )
    mask_token_id: int | None = Field(default=None, description="Token of the masked slots")
    sliding_window_non_causal: bool = Field(
        default=default_of(DFlashTrainingArgs, "sliding_window_non_causal"),
        description="Slots of sliding layers see later slots of their block",
    )
    sample_from_anchor: bool = Field(
        default=default_of(DFlashTrainingArgs, "sample_from_anchor"),
        description="Slot k drafts the token after its own position",
    )

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
    """Refuses what a config may leave open but a model cannot."""
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
