"""Losses from hidden rows and heads: [rows, V] logits exist for one small chunk at a time, never for a sequence.

Shapes: N draft rows, R target rows, H hidden size, V draft vocabulary, C rows of a chunk, M loss terms.

A head is linear and the loss of a row depends on that row alone. So forward can compute, chunk by chunk, the loss of
each row and its gradient with respect to the hidden row, and drop the logits. What is returned are losses a row: masks,
decays, D-PACE and denominators are ordinary autograd on top. Draft rows that share a target row (unroll steps, anchors)
share its logits and softmax.

A head that is trained needs the incoming gradient of each row before it can be accumulated: then backward walks over
the chunks a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators.losses.gradients import DraftRows, LossKernel, LossRows, TargetRows, first_argmax
from speculators.losses.registry import KERNELS, LossConfig, LossFunction, is_reference

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of a chunk, by device: a CPU wants them in its cache, a GPU wants products worth launching."""
MIN_FILL = 0.5
"""A group of draft rows that covers at least this share of the chunk's target rows is padded rather than gathered."""


class Targets(Protocol):
    """Makes target distributions of chosen rows."""

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows: ...


@dataclass(frozen=True)
class HeadTargets:
    """The verifier's own distributions: its head on its (normed) hidden rows, and what it does to logits."""

    hidden_RH: Tensor
    weight_VH: Tensor
    scale: float = 1.0
    """Logits are multiplied by it (`logit_scale`; 1 / `logits_scaling`)."""
    softcap: float | None = None
    """`final_logit_softcapping`: cap * tanh(logits / cap)."""

    def logits(self, rows_C: Tensor, dtype: torch.dtype) -> Tensor:
        logits_CV = F.linear(self.hidden_RH[rows_C].to(dtype), self.weight_VH.to(dtype))
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        return logits_CV if self.softcap is None else self.softcap * torch.tanh(logits_CV / self.softcap)

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows:
        return TargetRows.from_logits(self.logits(rows_C, dtype))


@dataclass(frozen=True)
class TokenTargets:
    """Hard labels; only `ce` makes sense with them."""

    token_ids_R: Tensor

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows:
        return TargetRows(self.token_ids_R[rows_C])


@dataclass(frozen=True)
class RowLosses:
    """One entry a draft row, in the order they were given."""

    loss_N: Tensor
    """Weighted sum of the terms; differentiable with respect to the hidden rows (and a trained head)."""
    terms: dict[str, Tensor]
    """Each term, unweighted and detached."""
    draft_ids_N: Tensor
    target_ids_N: Tensor

    @property
    def correct_N(self) -> Tensor:
        return self.draft_ids_N == self.target_ids_N


def row_losses(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets: Targets,
    target_index_N: Tensor,
    loss_config: LossConfig,
    *,
    chunk_elements: int | None = None,
) -> RowLosses:
    """Loss of each draft row against target row `target_index_N`. Losses of `losses.eager` take the reference route:
    all logits at once, plain autograd."""
    if any(is_reference(function) for function, _ in loss_config.values()):
        return reference_row_losses(hidden_NH, head_VH, targets, target_index_N, loss_config)
    terms = [(kernel_of(function), weight) for function, weight in loss_config.values()]
    budget = chunk_elements or CHUNK_ELEMENTS.get(hidden_NH.device.type, CHUNK_ELEMENTS["cuda"])
    pairing = Pairing.of(target_index_N, chunk_rows=max(16, budget // head_VH.shape[0]))
    loss_N, terms_MN, draft_ids_N, target_ids_N = ChunkedRows.apply(hidden_NH, head_VH, targets, pairing, terms)
    return RowLosses(loss_N, dict(zip(loss_config, terms_MN, strict=True)), draft_ids_N, target_ids_N)


def reference_row_losses(
    hidden_NH: Tensor, head_VH: Tensor, targets: Targets, target_index_N: Tensor, loss_config: LossConfig
) -> RowLosses:
    logits_NV = F.linear(hidden_NH, head_VH)
    target = targets.at(target_index_N, logits_NV.dtype)
    if target.log_probs_NV is None:
        labels = F.cross_entropy(logits_NV.float(), target.token_ids_N, reduction="none")
        losses = dict.fromkeys(loss_config, labels)
    else:
        losses = {name: function(logits_NV, target.log_probs_NV) for name, (function, _) in loss_config.items()}
    total = sum((weight * losses[name] for name, (_, weight) in loss_config.items()), start=logits_NV.new_zeros(()))
    assert isinstance(total, Tensor)
    terms = {name: loss_N.detach() for name, loss_N in losses.items()}
    return RowLosses(total, terms, logits_NV.argmax(-1), target.token_ids_N)


def kernel_of(function: LossFunction) -> LossKernel:
    """The closed form of a known loss; any other function of two distributions is differentiated within the chunk."""
    return KERNELS[function] if function in KERNELS else AutogradKernel(function)


@dataclass(frozen=True)
class AutogradKernel:
    function: LossFunction

    def __call__(self, draft: DraftRows, target: TargetRows) -> LossRows:
        if target.log_probs_NV is None:
            raise ValueError(f"loss {self.function!r} needs target distributions, but the targets are tokens; use 'ce'")
        with torch.enable_grad():
            logits_NV = draft.log_probs_NV.detach().requires_grad_()
            loss_N = self.function(logits_NV, target.log_probs_NV)
            (grad_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
        # Log-probabilities stood in for logits; a function of the distribution has a gradient that sums to 0 a row.
        return loss_N.detach(), grad_NV


class Group(NamedTuple):
    """Draft rows of a chunk, at most one for each target row of the chunk."""

    draft_rows: Tensor
    """As computed: one for each target row (missing ones repeat a row) or only those that exist."""
    kept: Tensor | None
    """Places of the real ones among them; None = all."""
    take: Tensor | None
    """Target rows of the chunk to gather; None = all, in order."""


@dataclass(frozen=True)
class Pairing:
    """Which draft rows share which target rows, cut into chunks of target rows."""

    target_rows_U: Tensor
    table_UK: Tensor
    """Draft row of the k-th use of a target row, -1 = none."""
    counts: list[list[int]]
    """[chunk][k]: how many rows of the column exist. The only thing the host must know."""
    chunk_rows: int
    num_rows: int

    @classmethod
    def of(cls, target_index_N: Tensor, chunk_rows: int) -> Pairing:
        order_N = target_index_N.argsort(stable=True)
        sorted_N = target_index_N[order_N]
        target_rows_U, group_N, uses_U = sorted_N.unique_consecutive(return_inverse=True, return_counts=True)
        first_U = uses_U.cumsum(0) - uses_U
        use_N = torch.arange(len(order_N), device=order_N.device) - first_U[group_N]
        num_uses = int(uses_U.max()) if len(uses_U) else 0
        table_UK = order_N.new_full((len(target_rows_U), num_uses), -1)
        table_UK[group_N, use_N] = order_N
        exists = F.pad((table_UK >= 0).long(), (0, 0, 0, -len(target_rows_U) % chunk_rows))
        counts = exists.unflatten(0, (-1, chunk_rows)).sum(1).tolist() if num_uses else []
        return cls(target_rows_U, table_UK, counts, chunk_rows, len(order_N))

    def chunks(self) -> Iterator[tuple[Tensor, list[Group]]]:
        for i, counts in enumerate(self.counts):
            span = slice(i * self.chunk_rows, (i + 1) * self.chunk_rows)
            target_rows_C = self.target_rows_U[span]
            columns = self.table_UK[span].unbind(1)
            size = len(target_rows_C)
            yield target_rows_C, [group_of(rows, n, size) for rows, n in zip(columns, counts, strict=True) if n]


def group_of(draft_rows_C: Tensor, count: int, size: int) -> Group:
    if count == size:
        return Group(draft_rows_C, None, None)
    kept = (draft_rows_C >= 0).nonzero().squeeze(1)
    if count >= MIN_FILL * size:
        return Group(draft_rows_C.clamp_min(0), kept, None)
    return Group(draft_rows_C[kept], None, kept)


class Chunk(NamedTuple):
    """What one group of draft rows came to."""

    draft_rows: Tensor
    losses: list[Tensor]
    grad_logits: Tensor
    """Of the weighted sum of the terms."""
    draft_ids: Tensor
    target_ids: Tensor


Terms = list[tuple[LossKernel, float]]


def walk(hidden_NH: Tensor, head_VH: Tensor, targets: Targets, pairing: Pairing, terms: Terms) -> Iterator[Chunk]:
    """Chunk by chunk: target logits once, then the draft rows that share them."""
    for target_rows_C, groups in pairing.chunks():
        target = targets.at(target_rows_C, head_VH.dtype)
        for group in groups:
            logits = F.linear(hidden_NH[group.draft_rows].to(head_VH.dtype), head_VH)
            own_target = target if group.take is None else target.take(group.take)
            yield score(group, logits, own_target, terms)


def score(group: Group, logits: Tensor, target: TargetRows, terms: Terms) -> Chunk:
    draft = DraftRows.from_logits(logits)
    losses, grad_logits = [], None
    for kernel, weight in terms:
        loss, grad = kernel(draft, target)
        losses.append(loss)
        if weight != 0.0:
            grad = grad if weight == 1.0 else grad * weight
            grad_logits = grad if grad_logits is None else grad_logits + grad
    if grad_logits is None:
        grad_logits = torch.zeros_like(draft.probs_NV)
    draft_ids, target_ids, rows = first_argmax(logits), target.token_ids_N, group.draft_rows
    if group.kept is not None:
        losses = [loss[group.kept] for loss in losses]
        rows, grad_logits = rows[group.kept], grad_logits[group.kept]
        draft_ids, target_ids = draft_ids[group.kept], target_ids[group.kept]
    return Chunk(rows, losses, grad_logits, draft_ids, target_ids)


class ChunkedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH: Tensor, head_VH: Tensor, targets: Targets, pairing: Pairing, terms: Terms):
        device = hidden_NH.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head_VH.dtype
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        hidden, head = hidden_NH.detach(), head_VH.detach().to(dtype)
        losses_MN = torch.zeros(len(terms), len(hidden), dtype=accumulate, device=device)
        draft_ids_N, target_ids_N = torch.zeros(2, len(hidden), dtype=torch.int64, device=device).unbind(0)
        grad_hidden_NH = None if head_VH.requires_grad else torch.zeros(hidden.shape, dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False):  # products are cast by hand; sums stay fp32
            for chunk in walk(hidden, head, targets, pairing, terms):
                for loss_N, loss in zip(losses_MN, chunk.losses, strict=True):
                    loss_N[chunk.draft_rows] = loss
                draft_ids_N[chunk.draft_rows] = chunk.draft_ids
                target_ids_N[chunk.draft_rows] = chunk.target_ids
                if grad_hidden_NH is not None:
                    grad_hidden_NH[chunk.draft_rows] = chunk.grad_logits.to(dtype) @ head
        ctx.save_for_backward(*((hidden_NH, head_VH) if grad_hidden_NH is None else (grad_hidden_NH,)))
        ctx.rest = targets, pairing, terms, dtype, hidden_NH.dtype
        weights_M = torch.tensor([weight for _, weight in terms], dtype=accumulate, device=device)
        loss_N = (weights_M[:, None] * losses_MN).sum(0)  # not a matmul: autocast would make it bf16
        ids = draft_ids_N.clone(), target_ids_N.clone()
        ctx.mark_non_differentiable(losses_MN, *ids)
        return loss_N, losses_MN, *ids

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss_N: Tensor, *_):
        targets, pairing, terms, dtype, hidden_dtype = ctx.rest
        if len(ctx.saved_tensors) == 1:
            (grad_hidden_NH,) = ctx.saved_tensors
            return (grad_hidden_NH * grad_loss_N[:, None]).to(hidden_dtype), None, None, None, None
        hidden_NH, head_VH = ctx.saved_tensors
        head = head_VH.detach().to(dtype)
        grad_hidden_NH, grad_head_VH = torch.zeros_like(hidden_NH), torch.zeros_like(head_VH)
        for chunk in walk(hidden_NH, head, targets, pairing, terms):
            rows = chunk.draft_rows
            grad_logits = (chunk.grad_logits * grad_loss_N[rows, None]).to(dtype)
            grad_hidden_NH[rows] = (grad_logits @ head).to(hidden_dtype)
            grad_head_VH += grad_logits.T @ hidden_NH[rows].to(dtype)
        return grad_hidden_NH, grad_head_VH, None, None, None
