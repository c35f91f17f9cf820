"""Public path of earlier releases: the EAGLE-3 converter and two functions for older EAGLE checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from speculators.convert.utils import Converter

EXTRA_NORMS = ("embed_layernorm.weight", "post_embedding_layernorm.weight", "lm_head_layernorm.weight")


class Eagle3Converter(Converter):
    """Converts heads of the EAGLE repository and of SpecForge."""

    algorithm = "eagle3"
    options = {
        "norm_before_residual": None,
        "norm_before_fc": None,
        "fc_norm": None,
        "norm_output": None,
        "eagle_aux_hidden_state_layer_ids": None,
    }


def find_vocab_size(config: Mapping[str, Any]) -> int | None:
    """Finds the first `vocab_size` of a config, at any depth; None when it has none."""
    if isinstance(config.get("vocab_size"), int):
        return config["vocab_size"]
    inner = (find_vocab_size(value) for value in config.values() if isinstance(value, Mapping))
    return next((found for found in inner if found is not None), None)


def detect_fusion_bias_and_layernorms(weights: Iterable[str]) -> tuple[bool, bool]:
    """Tells from the tensor names of an EAGLE-1 or HASS checkpoint whether it has a fusion bias and extra norms."""
    names = set(weights)
    return "fc.bias" in names, bool(names & set(EXTRA_NORMS))
