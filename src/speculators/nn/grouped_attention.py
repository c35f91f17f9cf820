"""Attention of rows in groups: a group sees a range of columns that its rows share, and its own rows.

Shapes: M rows, T columns, N query heads, G key/value heads, d head size.

    keys of a group     columns [low, high) | rows [first, last)        under the group's mask

The rows of a group are neighbours that see nearly the same columns: one flash call, little of it masked. The whole mask
never exists; the backward pass makes the masks of groups again. Runs on the flash kernels of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators.nn.packed_row import additive_mask

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

GROUP_ROWS = 128
"""Rows per group: neighbours share the keys they read; larger groups compute more masked scores."""


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
