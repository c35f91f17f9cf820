"""The DFlash network: context features once, then blocks of slots through the layers. Training and decoding share it.

Shapes: C context positions, P blocks (rows), S slots, H hidden size, D = aux layers * H, G kv heads, d head size.

    features g_t [D] -> fc -> hidden_norm -> c_t [H]     the same c feeds the keys and values of every layer
    block    [x_p, mask, mask, ..]  -> embedding         positions p, p + 1, p + 2, ..
             layers: queries are slots, keys are [c_0 .. c_{p-1} ; slots]
             -> norm -> lm_head
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speculators.models.dflash.block_attention import LayerMask
from speculators.nn.attention import concatenated
from speculators.nn.decoder import DecoderLayer
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope, RopeTables


class BlockDecoderLayer(DecoderLayer):
    """A Qwen3 layer whose o_proj is biased with the other projections, as in vLLM (qwen3_dflash.py)."""

    def __init__(self, config: Any, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        out = self.self_attn.o_proj
        if getattr(config, "attention_bias", False) and out.bias is None:
            self.self_attn.o_proj = nn.Linear(out.in_features, out.out_features, bias=True)


@dataclass(frozen=True)
class DFlashNetwork:
    """The modules of a drafter and the functions over them. Owns none of them."""

    embed_tokens: nn.Embedding
    fc: nn.Linear
    hidden_norm: RMSNorm
    layers: Sequence[DecoderLayer]
    norm: RMSNorm
    lm_head: nn.Linear
    rope: Rope
    layer_masks: list[LayerMask]
    mask_token_id: int
    first_slot: int

    def context(self, features_CD: Tensor) -> Tensor:
        """[C, H], one row per verifier state."""
        return self.hidden_norm(self.fc(features_CD))

    def blocks(self, anchor_tokens_P: Tensor, num_slots: int) -> Tensor:
        """Token ids of the slots: [P, S]."""
        token_ids_PS = anchor_tokens_P.new_full((len(anchor_tokens_P), num_slots), self.mask_token_id)
        token_ids_PS[:, 0] = anchor_tokens_P
        return token_ids_PS

    def forward(self, token_ids_PS: Tensor, rope: RopeTables, layer_attention: Sequence[Any]) -> Tensor:
        """Returns the input of the head: [P, S, H]. `layer_attention`: one `AttentionFunction` per layer."""
        hidden_PSH = self.embed_tokens(token_ids_PS)
        for layer, attention in zip(self.layers, layer_attention, strict=True):
            hidden_PSH = layer(hidden_PSH, rope, attention)
        return self.norm(hidden_PSH)

    def fused(self) -> DFlashNetwork:
        """A snapshot for decoding: the same function, faster for few rows. Only the embedding and the head, which are
        the verifier's, stay shared."""
        return dataclasses.replace(
            self,
            fc=copy.deepcopy(self.fc),
            hidden_norm=copy.deepcopy(self.hidden_norm),
            layers=[layer.fused() for layer in self.layers],
            norm=copy.deepcopy(self.norm),
        )

    def context_projection(self) -> ContextProjection:
        """Made from the network as it trains, before it is fused."""
        return ContextProjection(self.layers)


class ContextProjection(nn.Module):
    """Keys and values of the context in all layers, by one product. Holds copies of the weights."""

    def __init__(self, layers: Sequence[DecoderLayer]):
        super().__init__()
        attentions: list[Any] = [layer.self_attn for layer in layers]
        self.kv_proj = concatenated(*(proj for a in attentions for proj in (a.k_proj, a.v_proj)))
        self.k_norms = nn.ModuleList([copy.deepcopy(a.k_norm) for a in attentions])
        self.shape = (len(attentions), 2, attentions[0].num_kv_heads, attentions[0].head_dim)

    def forward(self, context_CH: Tensor, rope: RopeTables) -> Tensor:
        """[C, layers, 2, G, d]: rotated keys, then values."""
        kv = self.kv_proj(context_CH).unflatten(-1, self.shape)
        keys = torch.stack([norm(kv[:, i, 0]) for i, norm in enumerate(self.k_norms)], dim=1)
        wide = RopeTables(rope.cos[:, None], rope.sin[:, None])  # the same position in every layer
        return torch.stack((wide.rotate(keys), kv[:, :, 1]), dim=2)
