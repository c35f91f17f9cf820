"""What a DSpark checkpoint must hold beside DFlash's tensors, and the mask it is served with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from speculators.models.dflash.checkpoint import expected_keys as backbone_keys
from speculators.models.dflash.config import is_sliding
from speculators.models.dspark.config import DSparkSpeculatorConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

SERVED_HEAD = "vanilla"
"""The one kind of Markov head vLLM loads; the tensors of the others are unknown names to it."""
HEAD_TENSORS = {
    "vanilla": [],
    "gated": ["gate_proj.weight", "gate_proj.bias"],
    "rnn": ["joint_proj.weight", "joint_proj.bias"],
}


def pin_causality(nested: PretrainedConfig, sliding_window_non_causal: bool) -> None:
    """vLLM serves sliding layers causal and full layers not, which is how they are trained; only slots of sliding
    layers that see later ones must be written down."""
    slides = any(is_sliding(nested, i) for i in range(nested.num_hidden_layers))
    if sliding_window_non_causal and slides and getattr(nested, "is_causal", None) is None:
        nested.is_causal = False


def warn_if_not_served(config: DSparkSpeculatorConfig) -> None:
    if config.markov_head_type != SERVED_HEAD or config.markov_rank == 0:
        logger.warning(
            "vLLM serves markov_head_type='vanilla' with markov_rank > 0 only, not %r with rank %d",
            config.markov_head_type,
            config.markov_rank,
        )


def expected_keys(config: DSparkSpeculatorConfig) -> set[str]:
    """Names of the tensors on disk."""
    keys = backbone_keys(config)
    if config.markov_rank:
        names = ["markov_w1.weight", "markov_w2.weight", *HEAD_TENSORS[config.markov_head_type]]
        keys |= {f"markov_head.{name}" for name in names}
    if config.enable_confidence_head:
        keys |= {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    return keys
