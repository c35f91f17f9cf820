"""What drafters share that learn in several steps a column, each compared with the verifier one column further right.

Shapes: S steps, T columns of the packed row, R of them answered.

    counts_ST[s, i]   step s of column i is compared at column i + s: supervised, and of the same document
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.losses.metrics import counted

ANSWERS_CHOSEN_COLUMNS = ("cpu", "cuda")
"""Devices with an attention route that does (see `nn.unrolled`)."""


def counted_steps(supervised_T: Tensor, document_ids_T: Tensor, num_steps: int) -> Tensor:
    """bool [S, T]"""
    length = len(supervised_T)
    supervised_T = supervised_T.bool() & (document_ids_T != -1)
    counts_ST = torch.zeros(num_steps, length, dtype=torch.bool, device=supervised_T.device)
    for s in range(min(num_steps, length)):
        same_document = document_ids_T[: length - s] == document_ids_T[s:]
        counts_ST[s, : length - s] = same_document & supervised_T[s:]
    return counts_ST


def answered_columns(counts_ST: Tensor, attention: str | None) -> Tensor:
    """Columns [R] with a step that counts; all of them where attention cannot answer chosen ones."""
    if attention == "eager" or counts_ST.device.type not in ANSWERS_CHOSEN_COLUMNS:
        return torch.arange(counts_ST.shape[1], device=counts_ST.device)
    columns_R = counts_ST.any(0).nonzero().squeeze(1)
    return columns_R if len(columns_R) else columns_R.new_zeros(1)  # one column keeps the graph and gives loss 0


def step_accuracy(counts_SR: Tensor, correct_SR: Tensor) -> dict[str, Tensor]:
    """`full_acc_s`: of the columns where step s counts, those where all steps up to it are right. `cond_acc_s`: of
    those right so far."""
    metrics: dict[str, Tensor] = {}
    chain_R = counts_SR[0]
    for s in range(len(counts_SR)):
        judged_R = chain_R & counts_SR[s]
        chain_R = judged_R & correct_SR[s]
        metrics |= counted(f"full_acc_{s}", chain_R.sum(), counts_SR[s].sum())
        metrics |= counted(f"cond_acc_{s}", chain_R.sum(), judged_R.sum())
    return metrics


def padded(draft_ids_T: Tensor, input_ids: Tensor) -> Tensor:
    """As the batch came, [1, columns]; -1 where nothing was drafted (padding, columns without loss)."""
    out = torch.full_like(input_ids, -1)
    out[0, : len(draft_ids_T)] = draft_ids_T
    return out
