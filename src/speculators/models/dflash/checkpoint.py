"""What a DFlash checkpoint must hold. Engines do not report missing tensors or keys, so we check before writing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from speculators.models.dflash.config import DFlashSpeculatorConfig, is_sliding
from speculators.models.draft_layers import complete_layer_config, layer_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def complete_block_config(config: Any) -> Any:
    """A complete copy of the nested config, of the one family engines have layers for."""
    if config.model_type != "qwen3":
        raise ValueError(
            f"draft layers of model_type={config.model_type!r} cannot be served: engines read q_norm and k_norm, which "
            "only qwen3 layers have; use --draft-arch qwen3"
        )
    return complete_layer_config(config)


def pin_causality(nested: PretrainedConfig, sliding_window_non_causal: bool) -> None:
    """Write `is_causal` where vLLM would otherwise serve another mask than the one trained.

    vLLM's mask is causal in all layers or in none: `is_causal` if there, else `not sliding_window_non_causal`. Ours, by
    the kind of layer, agrees when all layers slide, or when none is causal. All full: they are trained to see the whole
    block, so that is written down. A mixture of causal sliding and full layers cannot be served: all become causal.
    """
    if getattr(nested, "is_causal", None) is not None or sliding_window_non_causal:
        return
    num_sliding = sum(is_sliding(nested, i) for i in range(nested.num_hidden_layers))
    if num_sliding == 0:
        nested.is_causal = False
    elif num_sliding < nested.num_hidden_layers:
        nested.is_causal = True
        logger.warning(
            "sliding and full layers are mixed: vLLM serves them with one kind of mask, so the full layers are trained "
            "causal too; use sliding_window_non_causal to let the slots of all layers see their whole block"
        )


def warn_if_served_differently(config: DFlashSpeculatorConfig) -> None:
    ours = [layer_mask.causal for layer_mask in config.layer_masks]
    if ours != config.served_causal:
        logger.warning(
            "the layers of this drafter are causal within a block as %s, but vLLM will serve them as %s; if it was "
            "trained that way, set is_causal inside transformer_layer_config (or sliding_window_non_causal)",
            ours,
            config.served_causal,
        )


def expected_keys(config: DFlashSpeculatorConfig) -> set[str]:
    """Names of the tensors on disk."""
    nested = config.transformer_layer_config
    keys = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    if config.draft_vocab_size != nested.vocab_size:
        keys |= {"d2t", "t2d", "lm_head.weight"}
    names = layer_keys(nested, output_bias=True)
    return keys | {f"layers.{i}.{name}" for i in range(nested.num_hidden_layers) for name in names}
