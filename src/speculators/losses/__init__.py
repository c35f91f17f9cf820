"""Losses that teach a drafter its verifier's distribution, their weights and their metrics."""

from speculators.losses.registry import (
    LossConfig,
    ce_loss,
    compound_loss,
    dflash_loss_decay,
    dpace_loss_decay,
    exp_loss_decay,
    js_div_loss,
    kl_div_loss,
    lk_hybrid_loss,
    loss_function,
    neg_log_acceptance_loss,
    resolve_loss_config,
    resolve_loss_fn,
    reverse_kl_div_loss,
    tv_loss,
)

__all__ = [
    "LossConfig",
    "ce_loss",
    "compound_loss",
    "dflash_loss_decay",
    "dpace_loss_decay",
    "exp_loss_decay",
    "js_div_loss",
    "kl_div_loss",
    "lk_hybrid_loss",
    "loss_function",
    "neg_log_acceptance_loss",
    "resolve_loss_config",
    "resolve_loss_fn",
    "reverse_kl_div_loss",
    "tv_loss",
]
