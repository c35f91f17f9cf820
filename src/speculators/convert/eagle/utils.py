"""What the EAGLE converters of earlier releases offered beside the class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

EXTRA_NORMS = ("embed_layernorm.weight", "post_embedding_layernorm.weight", "lm_head_layernorm.weight")


def find_vocab_size(config: Mapping[str, Any]) -> int | None:
    """The first `vocab_size` of a config, at any depth; None when there is none."""
    if isinstance(config.get("vocab_size"), int):
        return config["vocab_size"]
    inner = (find_vocab_size(value) for value in config.values() if isinstance(value, Mapping))
    return next((found for found in inner if found is not None), None)


def detect_fusion_bias_and_layernorms(weights: Iterable[str]) -> tuple[bool, bool]:
    """(fusion_bias, layernorms) of an EAGLE-1 or HASS checkpoint, by the names of its tensors."""
    names = set(weights)
    return "fc.bias" in names, bool(names & set(EXTRA_NORMS))
