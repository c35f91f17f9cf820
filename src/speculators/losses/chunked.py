"""Losses from hidden rows and heads: [rows, V] logits exist for one small chunk at a time, never for a sequence.

Shapes: N draft rows, T target rows, H hidden size, R features, X = H, R or H + R, V draft vocabulary, C rows of a
chunk, M loss terms.

A head is linear and the loss of a row depends on that row alone. So forward can compute, chunk by chunk, the loss of
each row and its gradient with respect to the hidden row, and drop the logits. The result is one loss per row: masks,
decays, D-PACE and denominators are ordinary autograd on top. Draft rows that share a target row (unroll steps, anchors)
share its logits and softmax.

The gradient of a head that is trained is a sum over rows, each weighted by the gradient that reaches its loss. A caller
that knows these weights beforehand passes them (`weight_N`) and differentiates the weighted sum, `total`, of which
forward sums the gradient as well; otherwise backward computes the chunks a second time. The trained head may be one
part of a head: logits = hidden @ frozen.T + features @ trained.T is one head [V, H + R] on rows [hidden ; features], of
which only the trained columns need a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators.losses.chunks import (
    Chunk,
    Pairing,
    Targets,
    Terms,
    WholeVocabulary,
    iterate_chunks,
    kernel_of,
    rows_per_chunk,
)
from speculators.losses.closed_form import LogitRows, TokenRows
from speculators.losses.registry import LossConfig, is_reference


@dataclass(frozen=True)
class RowLosses:
    """One entry per draft row, in the given order."""

    loss_N: Tensor
    """Weighted sum of the terms. It, or `total`, is differentiable: in the hidden rows and a trained head."""
    terms: dict[str, Tensor]
    """Each term, unweighted and detached."""
    draft_ids_N: Tensor
    target_ids_N: Tensor
    """The most likely token of the draft vocabulary."""
    outside_N: Tensor
    """Bool: the verifier's own most likely token is not in the draft vocabulary, so that no draft is right."""
    total: Tensor | None = None
    """sum(weight * loss), differentiable in place of `loss_N`, where weights were given."""

    @property
    def agrees_N(self) -> Tensor:
        """Drafter and verifier agree on the best token of the draft vocabulary: what losses are made of."""
        return self.draft_ids_N == self.target_ids_N

    @property
    def correct_N(self) -> Tensor:
        """A greedy verifier accepts the draft: what is measured."""
        return self.agrees_N & ~self.outside_N


def row_losses(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets: Targets,
    target_index_N: Tensor,
    loss_config: LossConfig,
    *,
    weight_N: Tensor | None = None,
    chunk_elements: int | None = None,
) -> RowLosses:
    """Computes the loss of each draft row against target row `target_index_N`. Losses of `losses.eager` take the
    reference route: all logits at once, plain autograd. `weight_N`: of each loss in `total`, where it is known."""
    if is_reference_config(loss_config):
        return reference_row_losses(hidden_NH, head_VH, targets, target_index_N, loss_config, weight_N)
    head = SplitHead(None, head_VH) if head_VH.requires_grad else SplitHead(head_VH, None)
    return head_losses(hidden_NH, head, targets, target_index_N, loss_config, weight_N, chunk_elements)


def split_row_losses(
    hidden_NH: Tensor,
    features_NR: Tensor,
    head: SplitHead,
    targets: Targets,
    target_index_N: Tensor,
    loss_config: LossConfig,
    *,
    weight_N: Tensor | None = None,
    chunk_elements: int | None = None,
) -> RowLosses:
    """`row_losses` for two heads whose logits add up: hidden @ frozen.T + features @ trained.T."""
    rows_NX = torch.cat((hidden_NH, features_NR), -1)
    if is_reference_config(loss_config):
        assert head.frozen_VH is not None and head.trained_VR is not None
        side_by_side_VX = torch.cat((head.frozen_VH, head.trained_VR), -1)
        return reference_row_losses(rows_NX, side_by_side_VX, targets, target_index_N, loss_config, weight_N)
    return head_losses(rows_NX, head, targets, target_index_N, loss_config, weight_N, chunk_elements)


class SplitHead(NamedTuple):
    """A head in two parts, side by side; at least one is given."""

    frozen_VH: Tensor | None
    trained_VR: Tensor | None


def head_losses(
    rows_NX: Tensor,
    head: SplitHead,
    targets: Targets,
    target_index_N: Tensor,
    loss_config: LossConfig,
    weight_N: Tensor | None,
    chunk_elements: int | None,
) -> RowLosses:
    terms = [(kernel_of(function), weight) for function, weight in loss_config.values()]
    vocab_size = next(part.shape[0] for part in head if part is not None)
    chunk_rows = rows_per_chunk(rows_NX.device, vocab_size, chunk_elements)
    pairing = Pairing.of(target_index_N, chunk_rows, rows_NX.device)
    frozen_VH = None if head.frozen_VH is None else head.frozen_VH.detach()
    loss_N, total, terms_MN, draft_ids_N, target_ids_N, outside_N = ChunkedRows.apply(
        rows_NX, frozen_VH, head.trained_VR, targets, pairing, terms, weight_N
    )
    total = None if weight_N is None else total
    named = dict(zip(loss_config, terms_MN, strict=True))
    return RowLosses(loss_N, named, draft_ids_N, target_ids_N, outside_N, total)


def reference_row_losses(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets: Targets,
    target_index_N: Tensor,
    loss_config: LossConfig,
    weight_N: Tensor | None,
) -> RowLosses:
    logits_NV = F.linear(hidden_NH, head_VH)
    target_index_N = target_index_N.to(hidden_NH.device)
    target = targets.at(target_index_N, logits_NV.dtype)
    outside = targets.outside(target_index_N, target, logits_NV.dtype)
    if isinstance(target, TokenRows):
        labels = F.cross_entropy(logits_NV.float(), target.token_ids_N, reduction="none")
        losses = dict.fromkeys(loss_config, labels)
    else:
        losses = {
            name: function.measure(LogitRows(logits_NV.detach()), target, outside)
            if isinstance(function, WholeVocabulary)
            else function(logits_NV, target.logits_NV)
            for name, (function, _) in loss_config.items()
        }
    loss_N = sum((weight * losses[name] for name, (_, weight) in loss_config.items()), start=logits_NV.new_zeros(()))
    assert isinstance(loss_N, Tensor)
    terms = {name: term_N.detach() for name, term_N in losses.items()}
    outside_N = torch.zeros_like(target_index_N, dtype=torch.bool) if outside is None else outside.is_best_C
    total = None if weight_N is None else (weight_N * loss_N).sum()
    return RowLosses(loss_N, terms, logits_NV.argmax(-1), target.token_ids_N, outside_N, total)


def is_reference_config(loss_config: LossConfig) -> bool:
    return any(is_reference(function) for function, _ in loss_config.values())


@dataclass
class Gradients:
    """Sums the gradient of sum(weight * loss) over chunks: for the rows and for the trained part of the head."""

    rows_NX: Tensor
    head_VX: Tensor
    weight_N: Tensor | None
    """None: gradients of the rows' own losses."""
    grad_rows_NX: Tensor
    grad_trained_VR: Tensor | None

    @classmethod
    def zeros(cls, rows_NX: Tensor, head_VX: Tensor, trained_VR: Tensor | None, weight_N: Tensor | None) -> Gradients:
        trained = None if trained_VR is None else torch.zeros_like(trained_VR)
        return cls(rows_NX, head_VX, weight_N, torch.zeros_like(rows_NX), trained)

    def add(self, chunk: Chunk) -> None:
        assert chunk.grad_logits is not None
        rows, real = chunk.group.draft_rows, chunk.group.real
        grad_logits = chunk.grad_logits.to(self.head_VX.dtype)
        grad_rows = grad_logits @ self.head_VX
        if self.weight_N is None:
            chunk.write(self.grad_rows_NX, grad_rows)
            return
        weights = self.weight_N[rows, None]  # fp32: rounding them would scale whole rows
        chunk.write(self.grad_rows_NX, (grad_rows * weights).to(grad_rows.dtype))
        if self.grad_trained_VR is not None:
            if real is not None:  # repeated rows weigh nothing
                weights = torch.zeros_like(weights).index_copy(0, real, weights[real])
            features = (self.rows_NX[rows, -self.grad_trained_VR.shape[1] :] * weights).to(grad_logits.dtype)
            self.grad_trained_VR += (grad_logits.T @ features).to(self.grad_trained_VR.dtype)


class ChunkedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NX, frozen_VH, trained_VR, targets: Targets, pairing: Pairing, terms: Terms, weight_N):
        device = rows_NX.device
        parts = [part.detach() for part in (frozen_VH, trained_VR) if part is not None]
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else parts[0].dtype
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        rows, parts = rows_NX.detach().to(dtype), [part.to(dtype) for part in parts]
        head = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        losses_MN = torch.zeros(len(terms), len(rows), dtype=accumulate, device=device)
        draft_ids_N, target_ids_N = torch.zeros(2, len(rows), dtype=torch.int64, device=device).unbind(0)
        outside_N = torch.zeros(len(rows), dtype=torch.bool, device=device)
        gradients = None
        if any(ctx.needs_input_grad) and (trained_VR is None or weight_N is not None):
            gradients = Gradients.zeros(rows, head, trained_VR, weight_N)
        with torch.autocast(device.type, enabled=False):  # products are cast by hand; sums stay fp32
            wants_grad = gradients is not None
            for chunk in iterate_chunks(rows, head, targets, pairing, terms, wants_grad=wants_grad, wants_outside=True):
                for loss_N, loss in zip(losses_MN, chunk.losses, strict=True):
                    chunk.write(loss_N, loss)
                chunk.write(draft_ids_N, chunk.draft_ids)
                chunk.write(target_ids_N, chunk.target_ids)
                if chunk.outside is not None:
                    chunk.write(outside_N, chunk.outside.is_best_C)
                if gradients is not None:
                    gradients.add(chunk)
                del chunk  # its logits, before the next ones are made
        known = (None, None) if gradients is None else (gradients.grad_rows_NX, gradients.grad_trained_VR)
        again = (None, None, None) if weight_N is not None or trained_VR is None else (rows, head, trained_VR)
        ctx.save_for_backward(*known, *again)
        ctx.rest = targets, pairing, terms, rows_NX.dtype, weight_N is not None
        weights_M = torch.tensor([weight for _, weight in terms], dtype=accumulate).to(device, non_blocking=True)
        loss_N = (weights_M[:, None] * losses_MN).sum(0)  # not a matmul: autocast would make it bf16
        total = loss_N.new_zeros(()) if weight_N is None else (weight_N * loss_N).sum()
        judged = draft_ids_N.clone(), target_ids_N.clone(), outside_N
        ctx.mark_non_differentiable(total if weight_N is None else loss_N, losses_MN, *judged)
        return loss_N, total, losses_MN, *judged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss_N: Tensor, grad_total: Tensor, *_):
        grad_rows_NX, grad_trained_VR, rows, head, trained_VR = ctx.saved_tensors
        targets, pairing, terms, rows_dtype, has_total = ctx.rest
        if has_total:
            grad_rows_NX = grad_rows_NX * grad_total
            grad_trained_VR = None if grad_trained_VR is None else grad_trained_VR * grad_total
        elif trained_VR is None:
            grad_rows_NX = grad_rows_NX * grad_loss_N[:, None]
        else:
            gradients = Gradients.zeros(rows, head, trained_VR, grad_loss_N)
            with torch.autocast(rows.device.type, enabled=False):
                for chunk in iterate_chunks(rows, head, targets, pairing, terms, wants_grad=True, wants_outside=False):
                    gradients.add(chunk)
                    del chunk
            grad_rows_NX, grad_trained_VR = gradients.grad_rows_NX, gradients.grad_trained_VR
        return grad_rows_NX.to(rows_dtype), None, grad_trained_VR, None, None, None, None
