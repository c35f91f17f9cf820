"""Running the drafter over whole sequences, as `forward` does: padding masks, and a cache of transformers.

Shapes: B rows, T new columns, P columns in the cache, L = P + T, N query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speculators.models.eagle.network import EagleNetwork
from speculators.nn.attention import dense_attention


class SequenceAttention:
    """Causal attention over the cache (anything with transformers' `update`) and this call's columns."""

    def __init__(self, past: Any, visible_BTL: Tensor):
        self.past, self.visible_BTL = past, visible_BTL

    def select_queries(self, hidden_BTH: Tensor) -> Tensor:
        return hidden_BTH

    def __call__(self, query_BTNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor) -> Tensor:
        if self.past is not None:
            key_BGLd, value_BGLd = self.past.update(key_BTGd.transpose(1, 2), value_BTGd.transpose(1, 2), 0)
            key_BTGd, value_BTGd = key_BGLd.transpose(1, 2), value_BGLd.transpose(1, 2)
        return dense_attention(query_BTNd, key_BTGd, value_BTGd, self.visible_BTL[:, None, None])


def run_sequences(
    network: EagleNetwork,
    input_ids_BT: Tensor,
    features_BTH: Tensor,
    attention_mask: Tensor | None,
    position_ids_BT: Tensor | None,
    past: Any,
) -> Tensor:
    """Logits [B, T, V] after each column."""
    B, T = input_ids_BT.shape
    num_past = 0 if past is None else past.get_seq_length()
    device = input_ids_BT.device
    if position_ids_BT is None:
        position_ids_BT = torch.arange(num_past, num_past + T, device=device).expand(B, T)
    visible_BTL = visible(attention_mask, num_past, T, device).expand(B, T, num_past + T)
    window = network.windows[0]
    if window is not None:
        keys_L = torch.arange(num_past + T, device=device)
        visible_BTL = visible_BTL & (keys_L > keys_L[num_past:, None] - window)
    rope = network.rope.at(position_ids_BT, torch.float32)
    attention = SequenceAttention(past, visible_BTL)
    return network.lm_head(network.step(input_ids_BT, features_BTH, rope, [attention]).normed_BRH)


def visible(attention_mask: Tensor | None, num_past: int, T: int, device: torch.device) -> Tensor:
    """bool [B or 1, T, L] of a mask [B, L] (1 = a token), an additive or boolean mask [B, 1, T, L], or none."""
    if attention_mask is not None and attention_mask.ndim == 4:
        mask = attention_mask[:, 0]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    index_L = torch.arange(num_past + T, device=device)
    causal_TL = index_L <= index_L[num_past:, None]
    if attention_mask is None:
        return causal_TL[None]
    itself_TL = index_L == index_L[num_past:, None]  # padding sees itself: its softmax stays finite
    return (causal_TL & attention_mask[:, None].bool()) | itself_TL
