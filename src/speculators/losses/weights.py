"""Weights of positions in a loss. They never carry gradient.

Shapes: any; `pos_idx` is the slot inside a block (or the unroll step).
"""

from __future__ import annotations

import torch
from torch import Tensor


def dflash_loss_decay(pos_idx: Tensor, gamma: float, sample_from_anchor: bool = False) -> Tensor:
    """exp(-(k - 1) / gamma) with weight 0 at slot 0 (the bonus token); sampling from the anchor: exp(-k / gamma)."""
    pos_idx = pos_idx.float()
    if sample_from_anchor:
        return (-pos_idx / gamma).exp()
    return (-(pos_idx - 1.0) / gamma).exp().where(pos_idx >= 1, 0.0)


def exp_loss_decay(pos_idx: Tensor, gamma: float) -> Tensor:
    """gamma ** k"""
    return torch.pow(gamma, pos_idx.float())


@torch.no_grad()
def dpace_loss_decay(
    pos_idx: Tensor, loss_mask: Tensor, block_size: int, dpace_alpha: float, elementwise_loss: Tensor
) -> Tensor:
    """D-PACE: the weight of a slot is the summed chance that the chain reaches it and each slot after it.

    c_k = exp(-ce_k), s_k = (1 - alpha) c_k + alpha (1 where masked), P_k = prod_{j <= k} s_j,
    w_k = m_k sum_{j >= k} P_j m_j                                                     block by block
    """
    length = loss_mask.shape[-1]
    if length % block_size:
        raise ValueError(f"{length} positions do not divide into blocks of block_size={block_size}; pad to a multiple")
    mask = loss_mask.float().unflatten(-1, (-1, block_size))
    correct = (-elementwise_loss.float().unflatten(-1, (-1, block_size)) * mask).exp()
    survive = ((1.0 - dpace_alpha) * correct + dpace_alpha).where(mask > 0, 1.0)
    reach = survive.cumprod(-1) * mask
    return (mask * reach.flip(-1).cumsum(-1).flip(-1)).flatten(-2)
