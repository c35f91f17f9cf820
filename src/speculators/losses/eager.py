"""The reference losses under the contract's names: plain autograd over [..., V] logits."""

from speculators.losses.divergence import (
    ce_loss,
    js_div_loss,
    kl_div_loss,
    lk_hybrid_loss,
    neg_log_acceptance_loss,
    reverse_kl_div_loss,
    tv_loss,
)

__all__ = [
    "ce_loss",
    "js_div_loss",
    "kl_div_loss",
    "lk_hybrid_loss",
    "neg_log_acceptance_loss",
    "reverse_kl_div_loss",
    "tv_loss",
]
