"""The attention of MTP layers that is not plain grouped-query attention: gated (Qwen3-Next, Qwen3.5) and latent (MLA).

Shapes: B rows, T new positions, R query positions, N heads, H hidden size, W width of the layer's input, c features
without position, r rotated ones, d head size of queries and keys (c + r in MLA), v head size of values.

Gated: q_proj gives 2 d numbers per head, [query ; gate], and out = o_proj(attention(..) * sigmoid(gate)).

Latent (DeepSeek-V3), written out as ordinary attention in which each head has its own keys:

    query    q_proj(x), or q_b(norm(q_a(x)))          [N, c | r]      the last r are rotated
    latent   kv_a(x) = [l | k_r]                      k_r is rotated and shared by all heads
             kv_b(norm(l)) = [k_c | value]            [N, c | v]
    key      [k_c | k_r]                              scores: d ** -0.5, times YaRN's factor

Values are padded with zeros to the head size of keys, which leaves the output as it is: so every `AttentionFunction`
that drafters have serves this layer too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.nn.attention import Attention, AttentionFunction
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import RopeTables, rope_parameters


class GatedAttention(Attention):
    """Grouped-query attention with an output gate; otherwise as `Attention`."""

    def __init__(self, config: Any):
        super().__init__(config)
        q_proj = self.q_proj
        self.q_proj = nn.Linear(q_proj.in_features, 2 * q_proj.out_features, bias=q_proj.bias is not None)

    def forward(self, hidden_BTW: Tensor, rope: RopeTables, attention: AttentionFunction) -> Tensor:
        both = self.q_proj(hidden_BTW).unflatten(-1, (self.num_heads, 2 * self.head_dim))
        query_BTNd, gate_BTNd = both.chunk(2, dim=-1)
        key_BTGd, value_BTGd = self.project_kv(hidden_BTW, rope)
        if self.q_norm is not None:
            query_BTNd = self.q_norm(query_BTNd)
        attended = attention(rope.rotate(query_BTNd), key_BTGd, value_BTGd).flatten(-2)
        return self.o_proj(attended * attention.select_queries(gate_BTNd.flatten(-2)).sigmoid())

    def fused(self) -> Any:
        """Returns itself: its query projection is already the larger part of the products."""
        return self


class LatentAttention(nn.Module):
    """Multi-head latent attention, under the names of transformers."""

    def __init__(self, config: Any):
        super().__init__()
        size, eps, bias = config.hidden_size, config.rms_norm_eps, bool(getattr(config, "attention_bias", False))
        self.num_heads, self.latent_size = config.num_attention_heads, config.kv_lora_rank
        self.plain_size, self.rotated_size = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_size, self.head_dim = config.v_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
        if self.value_size > self.head_dim:
            raise ValueError(
                f"v_head_dim={self.value_size} is larger than qk_nope_head_dim + qk_rope_head_dim = {self.head_dim}: "
                "no released model is so, and this layer pads values to the size of keys"
            )
        self.num_kv_heads = self.num_heads  # once written out, every head has keys of its own
        self.is_interleaved = bool(getattr(config, "rope_interleave", True))
        self.query_scale = yarn_factor(config)
        width = self.num_heads * self.head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(size, width, bias=False)
        else:
            self.q_a_proj = nn.Linear(size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(size, self.latent_size + self.rotated_size, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_size, eps)
        self.kv_b_proj = nn.Linear(self.latent_size, self.num_heads * (self.plain_size + self.value_size), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_size, size, bias=bias)

    def forward(self, hidden_BTH: Tensor, rope: RopeTables, attention: AttentionFunction) -> Tensor:
        query_BTNd = self.queries(hidden_BTH, rope)
        key_BTNd, value_BTNd = self.keys_and_values(hidden_BTH, rope)
        attended_BRNd = attention(query_BTNd, key_BTNd, value_BTNd)
        return self.o_proj(attended_BRNd[..., : self.value_size].flatten(-2))

    def queries(self, hidden_BTH: Tensor, rope: RopeTables) -> Tensor:
        if hasattr(self, "q_proj"):
            query = self.q_proj(hidden_BTH)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTH)))
        plain, rotated = query.unflatten(-1, (self.num_heads, self.head_dim)).split(
            (self.plain_size, self.rotated_size), dim=-1
        )
        return torch.cat((plain, rope.rotate(self.half_split(rotated))), dim=-1) * self.query_scale

    def keys_and_values(self, hidden_BTH: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        latent, rotated = self.kv_a_proj_with_mqa(hidden_BTH).split((self.latent_size, self.rotated_size), dim=-1)
        both = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.num_heads, -1))
        plain, value = both.split((self.plain_size, self.value_size), dim=-1)
        rotated_BT1r = rope.rotate(self.half_split(rotated.unsqueeze(-2)))
        key = torch.cat((plain, rotated_BT1r.expand(*plain.shape[:-1], -1).to(plain.dtype)), dim=-1)
        return key, F.pad(value, (0, self.head_dim - self.value_size))

    def half_split(self, x: Tensor) -> Tensor:
        """Reorders neighbouring pairs into two halves, as our rotation expects. Scores do not depend on the order."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.is_interleaved else x


def yarn_factor(config: Any) -> float:
    """Returns the factor that YaRN puts on the scores of this family (`mscale_all_dim`)."""
    parameters = rope_parameters(config)
    factor, share = parameters.get("factor") or 1.0, parameters.get("mscale_all_dim") or 0.0
    if parameters["rope_type"] == "default" or not share or factor <= 1.0:
        return 1.0
    return (0.1 * share * math.log(factor) + 1.0) ** 2
