"""The same divergences in closed form: value and gradient with respect to the draft logits, without autograd.

Shapes: N rows, V draft vocabulary. All tensors fp32 (or fp64). With p, q and their logarithms at hand,

    kl_div     q - p                                   tv    -q (1[q <= p] - sum_{q <= p} q)
    rkl        q (log q - log p - L)                   nla   grad(tv) / overlap, 0 below the floor
    jsd        q (log(q / m) - KL(q || m)) / 2         lk    share (q - p) + (1 - share) grad(tv)
    ce         q - onehot(argmax p)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.losses.divergence import LK_HYBRID_ETA, MIN_ACCEPTANCE, wide


@dataclass(frozen=True)
class TargetRows:
    """A target distribution a row. Log-probabilities are None for targets that are tokens (hard labels)."""

    token_ids_N: Tensor
    """argmax p, the smallest id on ties."""
    log_probs_NV: Tensor | None = None
    probs_NV: Tensor | None = None

    @classmethod
    def from_logits(cls, logits_NV: Tensor) -> TargetRows:
        log_probs_NV = wide(logits_NV).log_softmax(-1)
        return cls(first_argmax(logits_NV), log_probs_NV, log_probs_NV.exp())

    def take(self, index: Tensor) -> TargetRows:
        if self.log_probs_NV is None or self.probs_NV is None:
            return TargetRows(self.token_ids_N[index])
        return TargetRows(self.token_ids_N[index], self.log_probs_NV[index], self.probs_NV[index])


@dataclass(frozen=True)
class DraftRows:
    log_probs_NV: Tensor
    probs_NV: Tensor

    @classmethod
    def from_logits(cls, logits_NV: Tensor) -> DraftRows:
        log_probs_NV = wide(logits_NV).log_softmax(-1)
        return cls(log_probs_NV, log_probs_NV.exp())


ARGMAX_BLOCK = 64


def first_argmax(values_NV: Tensor) -> Tensor:
    """argmax of each row, the first on ties. torch's own is scalar code on a CPU: find the block by its maximum, which
    is vectorised, then look inside."""
    num_rows, vocab = values_NV.shape
    whole = vocab - vocab % ARGMAX_BLOCK
    if values_NV.device.type != "cpu" or vocab < 8 * ARGMAX_BLOCK:
        return values_NV.argmax(-1)
    blocks = values_NV[:, :whole].unflatten(1, (-1, ARGMAX_BLOCK))
    best, block_N = blocks.amax(-1).max(-1)
    index_N = block_N * ARGMAX_BLOCK + blocks[torch.arange(num_rows), block_N].argmax(-1)
    if whole == vocab:
        return index_N
    rest, rest_N = values_NV[:, whole:].max(-1)
    return torch.where(rest > best, rest_N + whole, index_N)


LossRows = tuple[Tensor, Tensor]
"""(loss [N], gradient with respect to the draft logits [N, V])"""
LossKernel = Callable[[DraftRows, TargetRows], LossRows]


def row_dot(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    return torch.einsum("nv,nv->n", left_NV, right_NV)


def kl_div(draft: DraftRows, target: TargetRows) -> LossRows:
    assert target.probs_NV is not None and target.log_probs_NV is not None
    # Entropy and cross entropy apart: no [N, V] tensor for log p - log q. Rounding may leave -1e-7 where KL is 0.
    loss_N = row_dot(target.probs_NV, target.log_probs_NV) - row_dot(target.probs_NV, draft.log_probs_NV)
    return loss_N, draft.probs_NV - target.probs_NV


def reverse_kl(draft: DraftRows, target: TargetRows) -> LossRows:
    assert target.log_probs_NV is not None
    ratio_NV = draft.log_probs_NV - target.log_probs_NV
    loss_N = row_dot(draft.probs_NV, ratio_NV)
    return loss_N, (ratio_NV - loss_N[:, None]) * draft.probs_NV


def js_div(draft: DraftRows, target: TargetRows) -> LossRows:
    assert target.probs_NV is not None and target.log_probs_NV is not None
    middle_NV = torch.logaddexp(draft.log_probs_NV, target.log_probs_NV) - math.log(2.0)
    ratio_NV = draft.log_probs_NV - middle_NV
    draft_part_N = row_dot(draft.probs_NV, ratio_NV)
    target_part_N = row_dot(target.probs_NV, target.log_probs_NV - middle_NV)
    return 0.5 * (draft_part_N + target_part_N), 0.5 * (ratio_NV - draft_part_N[:, None]) * draft.probs_NV


def ce(draft: DraftRows, target: TargetRows) -> LossRows:
    index = target.token_ids_N[:, None]
    loss_N = -draft.log_probs_NV.gather(1, index).squeeze(1)
    grad_NV = draft.probs_NV.clone()
    return loss_N, grad_NV.scatter_add_(1, index, grad_NV.new_full(index.shape, -1.0))


def tv(draft: DraftRows, target: TargetRows) -> LossRows:
    assert target.probs_NV is not None
    # Where q = p the loss has a kink; torch.minimum splits the gradient there, the closed form counts q <= p.
    below_NV = draft.probs_NV * (draft.probs_NV <= target.probs_NV)
    loss_N = 1.0 - torch.minimum(draft.probs_NV, target.probs_NV).sum(-1)
    return loss_N, draft.probs_NV * below_NV.sum(-1, keepdim=True) - below_NV


def neg_log_acceptance(draft: DraftRows, target: TargetRows) -> LossRows:
    rejected_N, grad_NV = tv(draft, target)
    accepted_N = 1.0 - rejected_N
    floored_N = accepted_N.clamp_min(MIN_ACCEPTANCE)
    return -floored_N.log(), grad_NV * ((accepted_N >= MIN_ACCEPTANCE) / floored_N)[:, None]


def lk_hybrid(draft: DraftRows, target: TargetRows, eta: float = LK_HYBRID_ETA) -> LossRows:
    rejected_N, tv_grad_NV = tv(draft, target)
    kl_N, kl_grad_NV = kl_div(draft, target)
    share_N = (-eta * (1.0 - rejected_N)).exp()
    grad_NV = tv_grad_NV.mul_((1.0 - share_N)[:, None]).add_(kl_grad_NV.mul_(share_N[:, None]))
    return share_N * kl_N + (1.0 - share_N) * rejected_N, grad_NV


class ClosedForm(torch.autograd.Function):
    """A kernel as a loss on logits, for callers that already hold [..., V]. Gradients reach the draft logits only."""

    @staticmethod
    def forward(ctx, kernel: LossKernel, logits: Tensor, targets: Tensor) -> Tensor:
        draft = DraftRows.from_logits(logits.detach().reshape(-1, logits.shape[-1]))
        target = TargetRows.from_logits(targets.detach().reshape(-1, targets.shape[-1]))
        with torch.autocast(logits.device.type, enabled=False):
            loss_N, grad_NV = kernel(draft, target)
        ctx.save_for_backward(grad_NV)
        ctx.like = logits.shape, logits.dtype
        return loss_N.view(logits.shape[:-1])

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (grad_NV,) = ctx.saved_tensors
        shape, dtype = ctx.like
        return None, (grad_NV * grad_loss.reshape(-1, 1)).view(shape).to(dtype), None
