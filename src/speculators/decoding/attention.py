"""Attention for few queries over a long cache: query heads that share a key/value head become query rows.

Shapes: B rows, T new tokens, S slots, N key/value heads, G query heads each, D head size.

transformers' sdpa path repeats keys and values G times whenever there is a mask. For decoding, [B, N * G, T, D] queries
seen as [B, N, G * T, D] need no copy of the cache; the mask comes with its rows already repeated (`MaskBuilder`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

IMPLEMENTATION = "speculators_grouped_sdpa"
"""Registered without a mask function, so models build no masks of their own: ours arrive, or None."""


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    B, num_heads, T, D = query.shape
    num_key_heads = key.shape[1]
    num_rows = num_heads // num_key_heads * T
    if T > 1 and (attention_mask is None or attention_mask.shape[2] != num_rows):  # prefill: many queries
        return sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scaling, **kwargs)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(B, num_key_heads, num_rows, D), key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(B, num_heads, T, value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, grouped_sdpa)
