"""The draft vocabulary, a subset of the verifier's ids. No other module interprets `d2t`, which holds offsets.

Shapes: V verifier vocabulary, D draft vocabulary (draft ids ascend with verifier ids).

    verifier_id = draft_id + d2t[draft_id]          d2t int64 [D], as vLLM reads it (llama_eagle3.py, compute_logits)
    t2d bool [V]: verifier ids that are in the draft vocabulary
Full vocabulary: both are None and ids are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draft_to_verifier_ids(draft_ids: Tensor, d2t: Tensor | None) -> Tensor:
    return draft_ids if d2t is None else draft_ids + d2t[draft_ids]


def verifier_ids(d2t: Tensor) -> Tensor:
    """Verifier id of every draft id: [D]."""
    return d2t + torch.arange(d2t.shape[0], device=d2t.device)


def select_rows(weight_VH: Tensor, t2d: Tensor | None) -> Tensor:
    """Selects the rows of a verifier head that the draft head keeps, in draft order."""
    return weight_VH if t2d is None else weight_VH[t2d.to(weight_VH.device)]


def logits_over_verifier(logits_D: Tensor, t2d: Tensor | None) -> Tensor:
    """Spreads [..., D] over [..., V] by the mask that selects training targets; -inf outside the draft vocabulary."""
    if t2d is None:
        return logits_D
    out = logits_D.new_full((*logits_D.shape[:-1], t2d.shape[0]), float("-inf"))
    out[..., t2d] = logits_D
    return out


def offsets_of(kept_ids_D: Tensor) -> Tensor:
    """Computes `d2t` from an ascending list of verifier ids."""
    return kept_ids_D - torch.arange(kept_ids_D.shape[0], device=kept_ids_D.device)


def scatter_to_verifier(probs_D: Tensor, d2t: Tensor | None, vocab_size: int, fill: float = 0.0) -> Tensor:
    """Spreads [..., D] over the verifier vocabulary [..., V]; ids outside the draft vocabulary get `fill`.

    0 for probabilities (rejection sampling stays exact: such tokens come from the residual), -inf for logits.
    """
    if d2t is None:
        return probs_D
    out = probs_D.new_full((*probs_D.shape[:-1], vocab_size), fill)
    return out.index_copy_(-1, verifier_ids(d2t), probs_D)
