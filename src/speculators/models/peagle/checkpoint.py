"""What a P-EAGLE checkpoint must hold beside what EAGLE-3's does."""

from __future__ import annotations

from typing import Any

from speculators.models.eagle3.checkpoint import expected_keys as eagle3_keys
from speculators.models.peagle.config import PEagleSpeculatorConfig


def expected_keys(config: PEagleSpeculatorConfig) -> set[str]:
    """Names of the tensors on disk. The embedding is trained, so it is never left to the verifier."""
    return eagle3_keys(config) | {"mask_hidden"}


def write_fc_norm(nested: Any, fc_norm: bool) -> None:
    """vLLM does not forward the top-level `fc_norm` of a peagle config (speculators/algos.py), but every key inside
    `transformer_layer_config` becomes one of the draft's config: so it is written there too."""
    if fc_norm:
        nested.fc_norm = True
