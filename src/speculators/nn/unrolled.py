"""Attention of a drafter unrolled over its own output: ordinary attention on step-0 keys plus a diagonal tail.

Shapes: B rows (1 when packed), T columns, R query positions, N query heads, G key/value heads, d head size, S steps.

At step s a query sees step-0 keys causally and one key of each later step, at its own column. Instead of (s + 1) T
columns: attention on the T step-0 keys, kept with its log-sum-exp, merged exactly with s scores a query,

    tot = logaddexp(lse_0, logsumexp(tail scores))
    out = exp(lse_0 - tot) out_0 + sum_m exp(score_m - tot) value_m

and backward through the stock kernel by handing it the merged `out` and `tot`: it recomputes P = exp(score - tot) and
D = rowsum(dout * out), which is the softmax over all keys, restricted to its own. Ring attention rests on the same
identity; a row of attention is cut into rectangles the same way, so that nothing outside the documents is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators.nn.attention import dense_attention, sdpa_attention
from speculators.nn.packed_row import Block, PackedRow, additive_mask, unrolled_mask
from speculators.nn.routes import DENSE, SDPA, Kernel, Route, flex

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class DenseUnrolledAttention:
    """Reference: all keys of all steps side by side under a dense mask."""

    def __init__(self, packed: PackedRow, window: int | None):
        self.packed, self.window = packed, window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, query_BTNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor) -> Tensor:
        self.keys.append(key_BTGd)
        self.values.append(value_BTGd)
        visible = unrolled_mask(self.packed.document_ids_T, len(self.keys) - 1, self.window)
        return self.attention(query_BTNd, torch.cat(self.keys, 1), torch.cat(self.values, 1), visible)

    def select_queries(self, hidden_BTH: Tensor) -> Tensor:
        return hidden_BTH

    attention = staticmethod(dense_attention)


class SdpaUnrolledAttention(DenseUnrolledAttention):
    """The same mask through `scaled_dot_product_attention`: any device, memory of the mask only."""

    attention = staticmethod(sdpa_attention)


class TailUnrolledAttention:
    """The fast route. Step 0 passes every column, since all are keys; the last layer then computes the query positions
    alone. From step 1 on, only query positions are passed."""

    def __init__(self, packed: PackedRow, window: int | None, *, last_layer: bool):
        self.packed, self.window, self.last_layer = packed, window, last_layer
        self.step = -1
        self.key_0: Tensor | None = None
        self.value_0: Tensor | None = None
        self.tail: list[Tensor] = []

    def __call__(self, query_BTNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor) -> Tensor:
        self.step += 1
        query_BTNd = self.select_queries(query_BTNd)
        if self.step == 0:
            self.key_0, self.value_0 = key_BTGd, value_BTGd
        else:
            self.tail += [key_BTGd, value_BTGd]
        assert self.key_0 is not None and self.value_0 is not None
        return self.attention(query_BTNd, self.key_0, self.value_0, self.visible_tail())

    def queries(self) -> PackedRow:
        return self.packed if self.last_layer or self.step > 0 else self.packed.every_column

    def visible_tail(self) -> list[Tensor]:
        """key, value, key, value, ... of the later steps inside the window."""
        if self.window is None:
            return self.tail
        return self.tail[2 * max(0, self.step - self.window) :]

    def select_queries(self, hidden_BTH: Tensor) -> Tensor:
        query_positions_R, num_columns = self.packed.query_positions_R, self.packed.document_ids_T.shape[0]
        if not self.last_layer or query_positions_R is None or hidden_BTH.shape[1] != num_columns:
            return hidden_BTH
        return hidden_BTH.index_select(1, query_positions_R)  # without effect when all columns are queries

    def attention(self, query_BRNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor, tail: list[Tensor]) -> Tensor:
        covers = self.queries().blocks(self.window, self.step)
        return TailAttention.apply(covers, query_BRNd, key_BTGd, value_BTGd, *tail)


class FlexUnrolledAttention(TailUnrolledAttention):
    """The fast route on a GPU: flex attention returns its log-sum-exp and is differentiable through it."""

    def __init__(self, packed: PackedRow, window: int | None, *, last_layer: bool, kernel: Kernel):
        super().__init__(packed, window, last_layer=last_layer)
        self.kernel = kernel

    def attention(self, query_BRNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor, tail: list[Tensor]) -> Tensor:
        query = query_BRNd.transpose(1, 2)
        if self.window is not None and self.step >= self.window:
            out, lse = torch.zeros_like(query), query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
        else:
            mask = self.queries().flex_mask(self.window, self.step)
            out, lse = flex(self.kernel, query_BRNd, key_BTGd, value_BTGd, mask)
        return merge_tail(out, lse, query, tail).transpose(1, 2)


def merge_tail(out_BNRd: Tensor, lse_BNR: Tensor, query_BNRd: Tensor, tail: list[Tensor]) -> Tensor:
    """Merges in plain autograd. Tail keys and values are [B, R, G, d]."""
    if not tail:
        return out_BNRd
    B, N, R, d = query_BNRd.shape
    G = tail[0].shape[2]
    query = query_BNRd.view(B, G, N // G, R, d)
    keys = torch.stack([key.transpose(1, 2) for key in tail[0::2]])[:, :, :, None]
    values = torch.stack([value.transpose(1, 2) for value in tail[1::2]])[:, :, :, None]
    scores = (query * keys).sum(-1, dtype=lse_BNR.dtype) * d**-0.5  # [S, B, G, N / G, R]
    lse = lse_BNR.view(B, G, N // G, R)
    total = torch.logaddexp(lse, scores.logsumexp(0))
    out = (lse - total).exp()[..., None] * out_BNRd.view(B, G, N // G, R, d)
    return (out + ((scores - total).exp()[..., None] * values).sum(0)).to(out_BNRd.dtype).view(B, N, R, d)


class TailAttention(torch.autograd.Function):
    """out [B, R, N, d] of queries over step-0 keys (in the given rectangles) and tail keys. CPU flash kernels."""

    @staticmethod
    def forward(ctx, covers: list[list[Block]], query_BRNd, key_BTGd, value_BTGd, *tail):
        query, key, value = (x.transpose(1, 2) for x in (query_BRNd, key_BTGd, value_BTGd))
        accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = tail_scores(query, tail[0::2], accumulate)
        total = query.new_full(query.shape[:3], float("-inf"), dtype=accumulate)
        out = torch.zeros(query_BRNd.shape, dtype=query.dtype).transpose(1, 2)
        for cover in covers:
            parts = [flash_block(query, key, value, block) for block in cover]
            rows = slice(cover[0].query_start, cover[0].query_end)
            lse = parts[0][1] if len(parts) == 1 else torch.logaddexp(parts[0][1], parts[1][1])
            out[:, :, rows] = parts[0][0] if len(parts) == 1 else sum(o * (p - lse).exp()[..., None] for o, p in parts)
            total[:, :, rows] = lse
        if scores is not None:
            lse, total = total, torch.logaddexp(total, scores.logsumexp(0))
            merged = out * (lse - total).exp()[..., None]
            grouped = merged.view(merged.shape[0], key.shape[1], -1, *merged.shape[2:])
            for score, value_m in zip(scores, tail[1::2], strict=True):
                grouped += (score - total).exp().view(*grouped.shape[:4], 1) * value_m.transpose(1, 2)[:, :, None]
            out = merged.to(query.dtype)
        ctx.covers = covers
        ctx.save_for_backward(query, key, value, out, total, scores, *tail)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_BRNd):
        query, key, value, out, total, scores, *tail = ctx.saved_tensors
        grad_out = grad_out_BRNd.transpose(1, 2)
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for cover in ctx.covers:
            for block in cover:
                rows, keys = slice(block.query_start, block.query_end), slice(block.key_start, block.key_end)
                grads = flash_backward(
                    grad_out[:, :, rows],
                    query[:, :, rows],
                    key[:, :, keys],
                    value[:, :, keys],
                    out[:, :, rows],
                    total[:, :, rows],
                    0.0,
                    block.causal,
                    attn_mask=block_mask(block, query.dtype),
                )
                grad_query[:, :, rows] += grads[0]
                grad_key[:, :, keys] += grads[1]
                grad_value[:, :, keys] += grads[2]
        tail_grads: list[Tensor] = []
        if scores is not None:
            tail_grads = tail_backward(grad_out, query, out, total, scores, tail, grad_query)
        return None, *(g.transpose(1, 2) for g in (grad_query, grad_key, grad_value)), *tail_grads


def flash_block(query: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    return flash_forward(
        query[:, :, block.query_start : block.query_end],
        key[:, :, block.key_start : block.key_end],
        value[:, :, block.key_start : block.key_end],
        0.0,
        block.causal,
        attn_mask=block_mask(block, query.dtype),
    )


def block_mask(block: Block, dtype: torch.dtype) -> Tensor | None:
    return None if block.visible_QK is None else additive_mask(block.visible_QK, dtype)


def tail_scores(query_BNRd: Tensor, keys: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | None:
    """[S, B, N, R]"""
    if not keys:
        return None
    B, N, R, d = query_BNRd.shape
    query = query_BNRd.unflatten(1, (keys[0].shape[2], -1))
    return torch.stack(
        [(query * key.transpose(1, 2)[:, :, None]).sum(-1, dtype=dtype).mul_(d**-0.5).view(B, N, R) for key in keys]
    )


def tail_backward(grad_out, query, out, total, scores, tail, grad_query) -> list[Tensor]:
    """Closed-form row operations; adds the tail's share to `grad_query` in place."""
    N, groups = query.shape[1], tail[0].shape[2]
    split = (groups, N // groups)
    grouped_grad_out, grouped_query = grad_out.unflatten(1, split), query.unflatten(1, split)
    grouped_grad_query = grad_query.unflatten(1, split)
    delta = (grad_out * out).sum(-1, dtype=total.dtype)
    grads: list[Tensor] = []
    for score, key_m, value_m in zip(scores, tail[0::2], tail[1::2], strict=True):
        key, value = key_m.transpose(1, 2)[:, :, None], value_m.transpose(1, 2)[:, :, None]
        prob = (score - total).exp()
        grad_prob = (grouped_grad_out * value).sum(-1, dtype=total.dtype).flatten(1, 2)
        grad_score = (
            (prob * (grad_prob - delta) * query.shape[-1] ** -0.5).unflatten(1, split)[..., None].to(query.dtype)
        )
        grouped_grad_query += grad_score * key
        grad_key = (grad_score * grouped_query).sum(2)
        grad_value = (prob.unflatten(1, split)[..., None].to(query.dtype) * grouped_grad_out).sum(2)
        grads += [grad_key.transpose(1, 2), grad_value.transpose(1, 2)]
    return grads


def unrolled_attention(
    route: Route, packed: PackedRow, windows: list[int | None]
) -> Sequence[DenseUnrolledAttention | TailUnrolledAttention]:
    """One function per layer."""
    if route in (DENSE, SDPA):
        kind = DenseUnrolledAttention if route is DENSE else SdpaUnrolledAttention
        return [kind(packed, window) for window in windows]
    layers = [(window, i == len(windows) - 1) for i, window in enumerate(windows)]
    if route.kernel is None:
        return [TailUnrolledAttention(packed, window, last_layer=is_last) for window, is_last in layers]
    return [FlexUnrolledAttention(packed, window, last_layer=last, kernel=route.kernel) for window, last in layers]
