"""Attention of a drafter: projections and rope here; the caller's `AttentionFunction` decides what a query sees.

Shapes: B rows, T new positions, N query heads, G key/value heads, d head size, L keys, W width of the layer's input.

Training (packed rows, unrolled) and decoding (a cache) differ only in what a query sees, so that part is a parameter:
projections, norms and rope are the same code in both, which makes them agree.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.nn.norms import RMSNorm
from speculators.nn.rope import RopeTables, head_dim


class AttentionFunction(Protocol):
    """Attends from the queries of a call to its keys and to remembered ones. One per layer."""

    def __call__(self, query_BTNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor, /) -> Tensor:
        """Returns [B, R, N, d] for the R query positions, all T of them or fewer."""
        ...

    def select_queries(self, hidden_BTH: Tensor, /) -> Tensor:
        """Selects the query positions of the residual stream: [B, R, H]."""
        ...


class AttentionShape(NamedTuple):
    """What differs between the decoder families a drafter may imitate."""

    qk_norm: bool
    """RMSNorm on each head of q and k, before rope."""
    output_bias: bool
    """`attention_bias` also puts a bias on o_proj."""


# Qwen3 in vLLM has no bias on o_proj whatever `attention_bias` says (qwen3.py), Llama has (llama.py).
FAMILIES = {"llama": AttentionShape(False, True), "qwen3": AttentionShape(True, False)}


def attention_shape(config: Any) -> AttentionShape:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r} has no draft layer here; set `model_type` of transformer_layer_config "
            f"(or --draft-arch) to one of {sorted(FAMILIES)}"
        )
    return FAMILIES[config.model_type]


def layer_window(config: Any, layer: int) -> int | None:
    """Number of keys that a query of the layer sees, its own included; None = all."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer] == "sliding_attention":
        return config.sliding_window
    return None


class Attention(nn.Module):
    """Grouped-query attention over an input of any width."""

    def __init__(self, config: Any, input_size: int | None = None):
        super().__init__()
        shape = attention_shape(config)
        width = input_size or config.hidden_size
        bias = bool(getattr(config, "attention_bias", False))
        self.head_dim = head_dim(config)
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias and shape.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if shape.qk_norm else None

    def forward(self, hidden_BTW: Tensor, rope: RopeTables, attention: AttentionFunction) -> Tensor:
        query_BTNd, key_BTGd, value_BTGd = self.project(hidden_BTW, rope)
        return self.o_proj(attention(query_BTNd, key_BTGd, value_BTGd).flatten(-2))

    def project(self, hidden_BTW: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor, Tensor]:
        query = self.q_proj(hidden_BTW).unflatten(-1, (self.num_heads, self.head_dim))
        key, value = self.project_kv(hidden_BTW, rope)
        if self.q_norm is not None:
            query = self.q_norm(query)
        return rope.rotate(query), key, value

    def project_kv(self, hidden_BTW: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        key = self.k_proj(hidden_BTW).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.v_proj(hidden_BTW).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.k_norm is not None:
            key = self.k_norm(key)
        return rope.rotate(key), value

    def fused(self) -> FusedAttention:
        """The same function with one projection, for decoding."""
        return FusedAttention(self)


class FusedAttention(nn.Module):
    """q, k and v in one product: fewer, larger operations for one token at a time."""

    def __init__(self, source: Attention):
        super().__init__()
        self.qkv_proj = concatenated(source.q_proj, source.k_proj, source.v_proj)
        self.num_heads, self.num_kv_heads, self.head_dim = source.num_heads, source.num_kv_heads, source.head_dim
        self.o_proj, self.q_norm, self.k_norm = source.o_proj, source.q_norm, source.k_norm

    def __call__(self, hidden_BTW: Tensor, rope: RopeTables, attention: AttentionFunction) -> Tensor:
        return self.forward(hidden_BTW, rope, attention)  # a snapshot has no hooks

    def forward(self, hidden_BTW: Tensor, rope: RopeTables, attention: AttentionFunction) -> Tensor:
        N, G = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj.forward(hidden_BTW)
        qkv = qkv.view(*qkv.shape[:-1], N + 2 * G, self.head_dim)
        qk = qkv.narrow(-2, 0, N + G)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk.narrow(-2, 0, N)), self.k_norm(qk.narrow(-2, N, G))), dim=-2)
        qk = rope.rotate(qk)
        out = attention(qk.narrow(-2, 0, N), qk.narrow(-2, N, G), qkv.narrow(-2, N + G, G))
        return self.o_proj.forward(out.flatten(-2))


def concatenated(*linears: nn.Linear) -> nn.Linear:
    """Builds one linear whose outputs are those of the given ones, side by side. It holds copies of their weights."""
    first = linears[0]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    fused = nn.Linear(first.in_features, weight.shape[0], bias=first.bias is not None, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    return fused


def dense_attention(query_BTNd: Tensor, key_BLGd: Tensor, value_BLGd: Tensor, visible_TL: Tensor) -> Tensor:
    """Reference: every score written down. `visible_TL` broadcasts over [B, G, N / G, T, L]."""
    B, T, N, d = query_BTNd.shape
    G = key_BLGd.shape[2]
    query = query_BTNd.reshape(B, T, G, N // G, d)
    scores = torch.einsum("btgrd,blgd->bgrtl", query, key_BLGd) * d**-0.5
    scores = scores if scores.dtype == torch.float64 else scores.float()
    probs = scores.masked_fill(~visible_TL, float("-inf")).softmax(-1).to(value_BLGd.dtype)
    return torch.einsum("bgrtl,blgd->btgrd", probs, value_BLGd).reshape(B, T, N, d)


def sdpa_attention(query_BTNd: Tensor, key_BLGd: Tensor, value_BLGd: Tensor, visible_TL: Tensor) -> Tensor:
    """The same through `scaled_dot_product_attention`: any device, memory of the mask only."""
    query, key, value = (x.transpose(1, 2) for x in (query_BTNd, key_BLGd, value_BLGd))
    return F.scaled_dot_product_attention(query, key, value, visible_TL, enable_gqa=True).transpose(1, 2)
