"""Attention of a drafter: projections and rope here; the caller's `AttentionFunction` decides what a query sees.

Shapes: B rows, T new positions, N query heads, G key/value heads, d head size, L keys, W width of the layer's input.

Training (packed rows, unrolled) and decoding (a cache) differ only in what a query sees, so that part is a parameter:
projections, norms and rope are the same code in both, which makes them agree.

What such functions compute with is at the end: dense and sdpa attention under a mask, and attention of rows in groups.
A group sees a range of columns that its rows share, and its own rows; M rows, T columns:

    keys of a group     columns [low, high) | rows [first, last)        under the group's mask

The rows of a group are neighbours that see nearly the same columns: one flash call, little of it masked. The whole mask
never exists; the backward pass makes the masks of groups again. Runs on the flash kernels of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from speculators.nn.norms import RMSNorm, cast_once
from speculators.nn.packed_row import additive_mask
from speculators.nn.rope import RopeTables, head_dim

GROUP_ROWS = 128
"""Rows per group: neighbours share the keys they read; larger groups compute more masked scores."""


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
        for_query, for_key, for_value = cast_once(hidden_BTW, 3)
        query = self.q_proj(for_query).unflatten(-1, (self.num_heads, self.head_dim))
        key, value = self.keys_and_values(for_key, for_value, rope)
        if self.q_norm is not None:
            query = self.q_norm(query)
        return rope.rotate(query), key, value

    def project_kv(self, hidden_BTW: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        for_key, for_value = cast_once(hidden_BTW, 2)
        return self.keys_and_values(for_key, for_value, rope)

    def keys_and_values(self, for_key_BTW: Tensor, for_value_BTW: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        key = self.k_proj(for_key_BTW).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.v_proj(for_value_BTW).unflatten(-1, (self.num_kv_heads, self.head_dim))
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


flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Group(NamedTuple):
    """Neighbouring rows of one document."""

    first: int
    last: int
    """Rows [first, last)."""
    low: int
    high: int
    """Columns [low, high) that at least one of them sees."""


class GroupedAttention(torch.autograd.Function):
    """out [M, N, d] of the rows over the columns and their own group. `visible(group)`: bool [rows, columns + rows]."""

    @staticmethod
    def forward(
        ctx,
        groups: Sequence[Group],
        visible: Callable[[Group], Tensor],
        query_MNd,
        key_MGd,
        value_MGd,
        key_TGd,
        value_TGd,
    ):
        out_MNd = torch.empty(query_MNd.shape, dtype=query_MNd.dtype)
        lse = []
        for group in groups:
            own = slice(group.first, group.last)
            mask = additive_mask(visible(group), query_MNd.dtype)
            keys, values = visible_to(key_TGd, key_MGd, group), visible_to(value_TGd, value_MGd, group)
            out, lse_of_group = flash_forward(heads_first(query_MNd[own]), keys, values, 0.0, False, attn_mask=mask)
            out_MNd[own] = out[0].transpose(0, 1)
            lse.append(lse_of_group)
        ctx.groups, ctx.visible = groups, visible
        ctx.save_for_backward(query_MNd, key_MGd, value_MGd, key_TGd, value_TGd, out_MNd, *lse)
        return out_MNd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MNd):
        query_MNd, key_MGd, value_MGd, key_TGd, value_TGd, out_MNd, *lse = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query_MNd, key_MGd, value_MGd))
        grad_column_key, grad_column_value = torch.zeros_like(key_TGd), torch.zeros_like(value_TGd)
        for group, lse_of_group in zip(ctx.groups, lse, strict=True):
            own, columns, width = slice(group.first, group.last), slice(group.low, group.high), group.high - group.low
            mask = additive_mask(ctx.visible(group), query_MNd.dtype)
            keys, values = visible_to(key_TGd, key_MGd, group), visible_to(value_TGd, value_MGd, group)
            query, out, grad_out = (heads_first(x[own]) for x in (query_MNd, out_MNd, grad_MNd))
            grads = flash_backward(grad_out, query, keys, values, out, lse_of_group, 0.0, False, attn_mask=mask)
            of_query, of_keys, of_values = (grad[0].transpose(0, 1) for grad in grads)
            grad_query[own] = of_query
            grad_column_key[columns] += of_keys[:width]
            grad_column_value[columns] += of_values[:width]
            grad_key[own], grad_value[own] = of_keys[width:], of_values[width:]
        return None, None, grad_query, grad_key, grad_value, grad_column_key, grad_column_value


def visible_to(columns_TGd: Tensor, rows_MGd: Tensor, group: Group) -> Tensor:
    """Concatenates the columns and rows that a group sees: [1, G, columns + rows, d]."""
    return heads_first(torch.cat((columns_TGd[group.low : group.high], rows_MGd[group.first : group.last])))


def heads_first(x_MNd: Tensor) -> Tensor:
    """[1, N, M, d]"""
    return x_MNd.transpose(0, 1)[None]
