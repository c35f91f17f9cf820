"""The shape of the drafter: a decoder config synthesised from the verifier's, or read from a file.

Everything the drafter must share with its verifier (vocabulary, hidden size) is taken from it; everything else can be
chosen. Head counts, rope and norms follow the verifier because they suit its states.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from speculators.train.keys import DraftKeys
from speculators.verifier.config import (
    flatten_rope_parameters,
    open_verifier_config,
    resolve_draft_intermediate_size,
    text_config,
)

logger = logging.getLogger(__name__)

COPIED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
MAX_LAYER_SHARE = 1 / 3
"""Of the verifier's layers: a drafter with more of them takes a large part of the time that it is to save."""


def load_verifier_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    try:
        return open_verifier_config(name, trust_remote_code)
    except ValueError as error:
        raise ValueError(f"--verifier {error}") from error


def draft_config(verifier: PretrainedConfig, keys: DraftKeys) -> PretrainedConfig:
    """The decoder config an algorithm's `from_training_args` receives."""
    source = text_config(verifier)
    if keys.draft_config:
        return draft_config_from_file(keys.draft_config, source)
    heads = source.num_attention_heads
    kv_heads = getattr(source, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(
            f"the verifier has {heads} attention heads over {kv_heads} key-value heads, which does not "
            "divide: give the drafter's shape with --draft-config"
        )
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // heads
    warn_of_depth(keys.num_layers, getattr(source, "num_hidden_layers", None))
    values = {name: getattr(source, name) for name in COPIED if getattr(source, name, None) is not None}
    values |= {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": keys.num_layers,
        "intermediate_size": resolve_draft_intermediate_size(source),
        "hidden_act": keys.draft_hidden_act,
        "tie_word_embeddings": False,
        **sliding_layers(keys),
        **rope(source),
    }
    try:
        return AutoConfig.for_model(keys.draft_arch, **values)
    except ValueError as error:
        raise ValueError(
            f"--draft-arch {keys.draft_arch}: transformers knows no such architecture; use e.g. llama or "
            f"qwen3 ({error})"
        ) from error


def warn_of_depth(num_layers: int, num_verifier_layers: int | None) -> None:
    """Defaults of several layers are made for verifiers of dozens."""
    if num_layers > 1 and num_verifier_layers and num_layers > MAX_LAYER_SHARE * num_verifier_layers:
        logger.warning(
            "the drafter has %d layers beside the verifier's %d: drafting will cost a large part of what it saves; "
            "--num-layers %d is faster",
            num_layers,
            num_verifier_layers,
            max(1, num_verifier_layers // 6),
        )


def sliding_layers(keys: DraftKeys) -> dict[str, Any]:
    full = set(keys.full_attention_indices or ())
    outside = [index for index in full if not 0 <= index < keys.num_layers]
    if outside:
        raise ValueError(
            f"--full-attention-indices {outside[0]}: the drafter has {keys.num_layers} layers, 0..{keys.num_layers - 1}"
        )
    kinds = ["full_attention" if index in full else "sliding_attention" for index in range(keys.num_layers)]
    is_sliding = "sliding_attention" in kinds
    return {
        "layer_types": kinds,
        "sliding_window": keys.sliding_window if is_sliding else None,
        "use_sliding_window": is_sliding,
        "max_window_layers": 0,
    }


def rope(source: PretrainedConfig) -> dict[str, Any]:
    """Rope settings of the verifier, without what only its own kernels read."""
    settings = flatten_rope_parameters(getattr(source, "rope_parameters", None))
    if settings is None:
        return {}
    settings = dict(settings)
    settings.pop("type", None)
    settings.pop("mrope_interleaved", None)
    if "mrope_section" not in settings:
        settings.pop("partial_rotary_factor", None)
    return {"rope_parameters": settings}


def draft_config_from_file(path: str, verifier: PretrainedConfig) -> PretrainedConfig:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--draft-config {file} cannot be read as JSON: {error}") from error
    values = values.get("transformer_layer_config", values)  # a whole speculator config holds its decoder there
    if "model_type" not in values:
        raise ValueError(f"--draft-config {file} has no model_type: it must name a decoder, e.g. llama or qwen3")
    if values.get("hidden_size") != verifier.hidden_size:
        raise ValueError(
            f"--draft-config {file} has hidden_size={values.get('hidden_size')}, the verifier "
            f"{verifier.hidden_size}: they must be equal, the drafter reads the verifier's states"
        )
    if values.get("vocab_size") not in (None, verifier.vocab_size):
        warnings.warn(
            f"{file}: vocab_size={values['vocab_size']} replaced by the verifier's {verifier.vocab_size}", stacklevel=2
        )
    values = {**values, "vocab_size": verifier.vocab_size}
    return AutoConfig.for_model(values.pop("model_type"), **values)
