"""Losses of a head that is partly frozen: logits = hidden @ frozen.T + features @ trained.T, never [rows, V] at once.

Shapes: N draft rows, H hidden size, R features, V draft vocabulary, C rows of a chunk.

The two heads are one head side by side, [V, H + R], so the chunk walk of `losses.chunked` serves it; backward walks a
second time and accumulates the gradient of the trained columns alone, which are few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators.losses.chunked import (
    CHUNK_ELEMENTS,
    Pairing,
    RowLosses,
    Targets,
    Terms,
    kernel_of,
    reference_row_losses,
    walk,
)
from speculators.losses.registry import LossConfig, is_reference


class SplitHead(NamedTuple):
    frozen_VH: Tensor
    trained_VR: Tensor


def split_row_losses(
    hidden_NH: Tensor,
    features_NR: Tensor,
    head: SplitHead,
    targets: Targets,
    target_index_N: Tensor,
    loss_config: LossConfig,
    *,
    chunk_elements: int | None = None,
) -> RowLosses:
    """As `chunked.row_losses`, for two heads whose logits add up."""
    if any(is_reference(function) for function, _ in loss_config.values()):
        both, side_by_side = torch.cat((hidden_NH, features_NR), -1), torch.cat(head, -1)
        return reference_row_losses(both, side_by_side, targets, target_index_N, loss_config)
    terms = [(kernel_of(function), weight) for function, weight in loss_config.values()]
    budget = chunk_elements or CHUNK_ELEMENTS.get(hidden_NH.device.type, CHUNK_ELEMENTS["cuda"])
    pairing = Pairing.of(target_index_N, chunk_rows=max(16, budget // head.frozen_VH.shape[0]))
    loss_N, terms_MN, draft_ids_N, target_ids_N = SplitRows.apply(
        hidden_NH, features_NR, head.frozen_VH.detach(), head.trained_VR, targets, pairing, terms
    )
    return RowLosses(loss_N, dict(zip(loss_config, terms_MN, strict=True)), draft_ids_N, target_ids_N)


class SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, features_NR, frozen_VH, trained_VR, targets: Targets, pairing: Pairing, terms: Terms):
        device = hidden_NH.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else frozen_VH.dtype
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        rows = torch.cat((hidden_NH.to(dtype), features_NR.to(dtype)), -1)
        head = torch.cat((frozen_VH.to(dtype), trained_VR.to(dtype)), -1)
        losses_MN = torch.zeros(len(terms), len(rows), dtype=accumulate, device=device)
        draft_ids_N, target_ids_N = torch.zeros(2, len(rows), dtype=torch.int64, device=device).unbind(0)
        with torch.autocast(device.type, enabled=False):  # products are cast by hand; sums stay fp32
            for chunk in walk(rows, head, targets, pairing, terms):
                for loss_N, loss in zip(losses_MN, chunk.losses, strict=True):
                    loss_N[chunk.draft_rows] = loss
                draft_ids_N[chunk.draft_rows] = chunk.draft_ids
                target_ids_N[chunk.draft_rows] = chunk.target_ids
        ctx.save_for_backward(rows, head)
        ctx.rest = targets, pairing, terms, hidden_NH.dtype, features_NR.dtype, trained_VR.dtype
        ctx.hidden_size = hidden_NH.shape[1]
        loss_N = (
            torch.tensor([weight for _, weight in terms], dtype=accumulate, device=device)[:, None] * losses_MN
        ).sum(0)
        ids = draft_ids_N.clone(), target_ids_N.clone()
        ctx.mark_non_differentiable(losses_MN, *ids)
        return loss_N, losses_MN, *ids

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss_N: Tensor, *_):
        rows_NX, head_VX = ctx.saved_tensors
        targets, pairing, terms, hidden_dtype, features_dtype, trained_dtype = ctx.rest
        size = ctx.hidden_size
        grad_rows_NX = torch.zeros_like(rows_NX)
        grad_trained_VR = torch.zeros(
            head_VX.shape[0], head_VX.shape[1] - size, device=head_VX.device, dtype=trained_dtype
        )
        with torch.autocast(rows_NX.device.type, enabled=False):
            for chunk in walk(rows_NX, head_VX, targets, pairing, terms):
                grad_logits = (chunk.grad_logits * grad_loss_N[chunk.draft_rows, None]).to(rows_NX.dtype)
                grad_rows_NX[chunk.draft_rows] = grad_logits @ head_VX
                grad_trained_VR += grad_logits.T @ rows_NX[chunk.draft_rows, size:]
        grad_hidden_NH, grad_features_NR = grad_rows_NX[:, :size], grad_rows_NX[:, size:]
        return (
            grad_hidden_NH.to(hidden_dtype), grad_features_NR.to(features_dtype), None, grad_trained_VR, None, None,
            None,
        )  # fmt: skip
