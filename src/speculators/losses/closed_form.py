"""The losses of `losses.eager` in closed form: value and gradient with respect to the draft logits, without autograd.

Shapes: N rows, V draft vocabulary. All tensors fp32 (or fp64). With p, q and their logarithms computed,

    kl_div     q - p                                   tv    -q (1[q <= p] - sum_{q <= p} q)
    rkl        q (log q - log p - L)                   nla   grad(tv) / overlap, 0 below the floor
    jsd        q (log(q / m) - KL(q || m)) / 2         lk    share (q - p) + (1 - share) grad(tv)
    ce         q - onehot(argmax p)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from speculators.losses.eager import LK_HYBRID_ETA, MIN_ACCEPTANCE, at_least_fp32


class LogitRows:
    """Logits of rows, and their probabilities, entropies and most likely tokens. Each is computed on first use: a loss
    rarely needs all of them."""

    def __init__(self, logits_NV: Tensor):
        self.logits_NV = at_least_fp32(logits_NV)

    @cached_property
    def token_ids_N(self) -> Tensor:
        """argmax, the smallest id on ties."""
        return first_argmax(self.logits_NV)

    @cached_property
    def probs_NV(self) -> Tensor:
        return self.logits_NV.softmax(-1)

    @cached_property
    def log_norm_N(self) -> Tensor:
        """log sum exp, from the largest entry: logits and probabilities are known, and a pass over V is not free."""
        index = self.token_ids_N[:, None]
        return (self.logits_NV.gather(1, index) - self.probs_NV.gather(1, index).log()).squeeze(1)

    @cached_property
    def log_probs_NV(self) -> Tensor:
        return self.logits_NV - self.log_norm_N[:, None]

    @cached_property
    def negative_entropy_N(self) -> Tensor:
        return row_dot(self.probs_NV, self.logits_NV) - self.log_norm_N

    def take(self, index: Tensor) -> LogitRows:
        """Some of the rows, with what is already computed of them."""
        taken = LogitRows(self.logits_NV[index])
        for name in ("token_ids_N", "probs_NV", "log_norm_N", "negative_entropy_N"):
            if name in self.__dict__:
                setattr(taken, name, getattr(self, name)[index])
        return taken


@dataclass(frozen=True)
class TokenRows:
    """Targets that are tokens (hard labels)."""

    token_ids_N: Tensor

    def take(self, index: Tensor) -> TokenRows:
        return TokenRows(self.token_ids_N[index])


TargetRows = LogitRows | TokenRows


ARGMAX_BLOCK = 64


def first_argmax(values_NV: Tensor) -> Tensor:
    """argmax of each row, the first on ties. torch's own is scalar code on a CPU: this finds the block by its maximum,
    which is vectorised, then searches inside."""
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


KernelOutput = tuple[Tensor, Tensor | None]
"""(loss [N], gradient with respect to the draft logits [N, V] or None where `wants_grad` is false)"""


class LossKernel(Protocol):
    def __call__(self, draft: LogitRows, target: Any, wants_grad: bool, /) -> KernelOutput:
        """Returns losses and, if `wants_grad`, their gradient: a new tensor, which the caller may change.

        `target` is `LogitRows`, or `TokenRows` for a loss that needs the target tokens alone."""
        ...


def row_dot(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    return torch.linalg.vecdot(left_NV, right_NV)


def kl_div(draft: LogitRows, target: LogitRows, wants_grad: bool) -> KernelOutput:
    # Entropy and cross entropy apart: no [N, V] tensor for log p - log q. Rounding may leave -1e-7 where KL is 0.
    cross_entropy_N = draft.log_norm_N - row_dot(target.probs_NV, draft.logits_NV)
    return target.negative_entropy_N + cross_entropy_N, draft.probs_NV - target.probs_NV if wants_grad else None


def reverse_kl(draft: LogitRows, target: LogitRows, wants_grad: bool) -> KernelOutput:
    ratio_NV = draft.log_probs_NV - target.log_probs_NV
    loss_N = row_dot(draft.probs_NV, ratio_NV)
    return loss_N, ratio_NV.sub_(loss_N[:, None]).mul_(draft.probs_NV) if wants_grad else None


def js_div(draft: LogitRows, target: LogitRows, wants_grad: bool) -> KernelOutput:
    middle_NV = torch.logaddexp(draft.log_probs_NV, target.log_probs_NV) - math.log(2.0)
    ratio_NV = draft.log_probs_NV - middle_NV
    draft_part_N = row_dot(draft.probs_NV, ratio_NV)
    loss_N = 0.5 * (draft_part_N + row_dot(target.probs_NV, target.log_probs_NV - middle_NV))
    return loss_N, ratio_NV.sub_(draft_part_N[:, None]).mul_(0.5 * draft.probs_NV) if wants_grad else None


def ce(draft: LogitRows, target: TargetRows, wants_grad: bool) -> KernelOutput:
    index = target.token_ids_N[:, None]
    loss_N = draft.log_norm_N - draft.logits_NV.gather(1, index).squeeze(1)
    if not wants_grad:
        return loss_N, None
    grad_NV = draft.probs_NV.clone()
    return loss_N, grad_NV.scatter_add_(1, index, grad_NV.new_full(index.shape, -1.0))


def tv(draft: LogitRows, target: LogitRows, wants_grad: bool) -> KernelOutput:
    loss_N = 1.0 - torch.minimum(draft.probs_NV, target.probs_NV).sum(-1)
    if not wants_grad:
        return loss_N, None
    # Where q = p the loss has a kink; torch.minimum splits the gradient there, the closed form counts q <= p.
    # The comparison as numbers: as a mask it costs several times more on a CPU.
    below_NV = torch.le(draft.probs_NV, target.probs_NV, out=torch.empty_like(draft.probs_NV)).mul_(draft.probs_NV)
    return loss_N, torch.addcmul(below_NV.neg_(), draft.probs_NV, -below_NV.sum(-1, keepdim=True))


def neg_log_acceptance(draft: LogitRows, target: LogitRows, wants_grad: bool) -> KernelOutput:
    rejected_N, grad_NV = tv(draft, target, wants_grad)
    accepted_N = 1.0 - rejected_N
    floored_N = accepted_N.clamp_min(MIN_ACCEPTANCE)
    if grad_NV is not None:
        grad_NV.mul_(((accepted_N >= MIN_ACCEPTANCE) / floored_N)[:, None])
    return -floored_N.log(), grad_NV


def lk_hybrid(draft: LogitRows, target: LogitRows, wants_grad: bool, eta: float = LK_HYBRID_ETA) -> KernelOutput:
    rejected_N, grad_NV = tv(draft, target, wants_grad)
    kl_N, kl_grad_NV = kl_div(draft, target, wants_grad)
    share_N = (-eta * (1.0 - rejected_N)).exp()
    if grad_NV is not None and kl_grad_NV is not None:
        grad_NV.mul_((1.0 - share_N)[:, None]).addcmul_(kl_grad_NV, share_N[:, None])
    return share_N * kl_N + (1.0 - share_N) * rejected_N, grad_NV


class ClosedForm(torch.autograd.Function):
    """Applies a kernel to logits [..., V]. Gradients reach the draft logits only."""

    @staticmethod
    def forward(ctx, kernel: LossKernel, logits: Tensor, targets: Tensor) -> Tensor:
        draft = LogitRows(logits.detach().reshape(-1, logits.shape[-1]))
        target = LogitRows(targets.detach().reshape(-1, targets.shape[-1]))
        with torch.autocast(logits.device.type, enabled=False):
            loss_N, grad_NV = kernel(draft, target, ctx.needs_input_grad[1])
        ctx.save_for_backward(grad_NV)
        ctx.like = logits.shape, logits.dtype
        return loss_N.view(logits.shape[:-1])

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (grad_NV,) = ctx.saved_tensors
        shape, dtype = ctx.like
        return None, (grad_NV * grad_loss.reshape(-1, 1)).view(shape).to(dtype), None


@dataclass(frozen=True)
class AutogradKernel:
    """Any other function of draft and target logits, differentiated by autograd."""

    function: Callable[..., Tensor]

    def __call__(self, draft: LogitRows, target: TargetRows, wants_grad: bool) -> KernelOutput:
        if isinstance(target, TokenRows):
            raise ValueError(f"loss {self.function!r} needs target distributions, but the targets are tokens; use 'ce'")
        if not wants_grad:
            return self.function(draft.logits_NV, target.logits_NV), None
        with torch.enable_grad():
            logits_NV = draft.logits_NV.detach().requires_grad_()
            loss_N = self.function(logits_NV, target.logits_NV)
            (grad_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
        return loss_N.detach(), grad_NV
