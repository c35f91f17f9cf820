"""Which layers of a verifier a drafter reads: asked when a drafter is built, and when a server is to extract them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import AutoConfig, PretrainedConfig

logger = logging.getLogger(__name__)


def get_verifier_config(name_or_path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a verifier's language model (its `text_config` when it has other parts too)."""
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    return getattr(config, "text_config", None) or config


def resolve_target_layer_ids(
    target_layer_ids: Sequence[int] | None, verifier: str | PretrainedConfig, trust_remote_code: bool = False
) -> list[int]:
    """The checked aux layer ids, or the default `[2, n // 2, n - 3]` of an n-layer verifier.

    Id i is the residual stream after i layers: 0 the embeddings, n the last layer before the final norm."""
    config = verifier
    if not isinstance(config, PretrainedConfig):
        config = get_verifier_config(str(verifier), trust_remote_code)
    num_layers: int = config.num_hidden_layers
    rule = f"ids count finished layers, so distinct ones in 0..{num_layers} are valid"
    if target_layer_ids is None:
        ids = [2, num_layers // 2, num_layers - 3]
        if ids != sorted(set(ids)) or ids[-1] < 0:
            raise ValueError(
                f"the default target_layer_ids of a {num_layers}-layer verifier would be {ids}; give ids: {rule}"
            )
        logger.warning("target_layer_ids not given: using %s for a verifier of %d layers", ids, num_layers)
        return ids
    ids = [int(layer) for layer in target_layer_ids]
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) > num_layers:
        raise ValueError(f"target_layer_ids={ids} but the verifier has {num_layers} layers; {rule}")
    # serving engines sort the ids, and the columns of `fc` follow them (vLLM, aux_hidden_state_layers)
    return sorted(ids)
