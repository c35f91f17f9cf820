"""The losses in plain autograd, under the contract's names: the reference of every faster route.

Shapes: [..., V] logits over the draft vocabulary -> [...] in fp32 (fp64 stays).
p = softmax(targets) is the verifier's distribution, q = softmax(logits) the drafter's.
Autograd keeps several [..., V] tensors alive; `losses.chunked` never holds them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "ce_loss",
    "js_div_loss",
    "kl_div_loss",
    "lk_hybrid_loss",
    "neg_log_acceptance_loss",
    "reverse_kl_div_loss",
    "tv_loss",
]

MIN_ACCEPTANCE = 1e-5
"""Floor of the overlap inside the logarithm of `neg_log_acceptance_loss`."""
LK_HYBRID_ETA = 3.0
"""How fast `lk_hybrid_loss` moves from KL to total variation as the overlap grows."""


def at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probs(logits: Tensor) -> Tensor:
    return at_least_fp32(logits).log_softmax(-1)


def overlap(logits: Tensor, targets: Tensor) -> Tensor:
    """sum min(p, q): the probability that rejection sampling accepts a token drawn from q."""
    return torch.minimum(log_probs(logits).exp(), log_probs(targets).exp()).sum(-1)


def kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(p || q)"""
    target_log_probs = log_probs(targets)
    return (target_log_probs.exp() * (target_log_probs - log_probs(logits))).sum(-1)


def reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(q || p)"""
    return kl_div_loss(targets, logits)


def js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; at most ln 2."""
    draft, target = log_probs(logits), log_probs(targets)
    middle = torch.logaddexp(draft, target) - math.log(2.0)
    return 0.5 * (target.exp() * (target - middle) + draft.exp() * (draft - middle)).sum(-1)


def ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log q at the verifier's most likely token (ties: the smallest id)."""
    return -log_probs(logits).gather(-1, targets.argmax(-1, keepdim=True)).squeeze(-1)


def tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Total variation, 1 - sum min(p, q): the probability of a rejection."""
    return 1.0 - overlap(logits, targets)


def neg_log_acceptance_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log sum min(p, q), the overlap floored at 1e-5."""
    return -overlap(logits, targets).clamp_min(MIN_ACCEPTANCE).log()


def lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = LK_HYBRID_ETA) -> Tensor:
    """share KL(p || q) + (1 - share) TV with share = exp(-eta overlap): KL far from the target, TV near it."""
    accepted = overlap(logits, targets)
    share = (-eta * accepted.detach()).exp()
    return share * kl_div_loss(logits, targets) + (1.0 - share) * (1.0 - accepted)
