"""Supervises drafters, what and where: the verifier's next-token distributions, made of its last states when they are
needed; and the steps of drafters that learn in several steps per column, each one column further right.

Shapes: S steps, T columns of the packed row, R of them queries, H hidden size.

    supervised_ST[s, i]   step s of column i is compared at column i + s: supervised, and of the same document
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speculators.interfaces import PackedBatch, Ratio
from speculators.losses.chunks import HeadTargets, OutsideHead
from speculators.losses.metrics import ratio
from speculators.nn.routes import Route
from speculators.verifier.config import LogitTransform


@dataclass(frozen=True)
class VerifierHead:
    """Turns the verifier's last state into logits: transform(lm_head(norm(state)))."""

    norm: nn.Module
    lm_head: nn.Linear
    """Of the draft vocabulary's tokens alone, where there is one."""
    transform: LogitTransform
    outside: OutsideHead | None = None
    """The head's other tokens, where `lm_head` is of a draft vocabulary."""

    def targets(self, last_hidden_TH: Tensor) -> HeadTargets:
        """Distributions after each column; states are before the final norm."""
        return self.normed_targets(self.norm(last_hidden_TH))

    def normed_targets(self, normed_TH: Tensor) -> HeadTargets:
        return HeadTargets(normed_TH, self.lm_head.weight, *self.transform, self.outside)


def supervised_steps(batch: PackedBatch, num_steps: int) -> Tensor:
    """bool [S, T], on the host"""
    documents_T, supervised_T = batch.host_document_ids_T, batch.host_supervised_T
    length = len(supervised_T)
    supervised_ST = torch.zeros(num_steps, length, dtype=torch.bool)
    for s in range(min(num_steps, length)):
        same_document = documents_T[: length - s] == documents_T[s:]
        supervised_ST[s, : length - s] = same_document & supervised_T[s:]
    return supervised_ST


class StepPairs(NamedTuple):
    """The supervised (step, query) pairs, on the device; chosen on the host."""

    columns_R: Tensor
    supervised_SR: Tensor
    step_N: Tensor
    row_N: Tensor
    target_N: Tensor
    """Column that each is compared with, on the host."""
    asks_T: Tensor
    """bool, on the host: columns with a supervised step."""

    @classmethod
    def of(cls, batch: PackedBatch, num_steps: int, route: Route) -> StepPairs:
        supervised_ST = supervised_steps(batch, num_steps)
        columns_R = query_columns(supervised_ST, route)
        supervised_SR = supervised_ST[:, columns_R]
        step_N, row_N = supervised_SR.nonzero().unbind(1)
        device = batch.token_ids_T.device
        chosen = (columns_R, supervised_SR, step_N, row_N)
        columns_on, supervised_on, step_on, row_on = (part.to(device, non_blocking=True) for part in chosen)
        return cls(columns_on, supervised_on, step_on, row_on, columns_R[row_N] + step_N, supervised_ST.any(0))

    def drafts(self, draft_ids_N: Tensor, num_columns: int) -> list[Tensor]:
        """[T] of each step; -1 where nothing is supervised."""
        drafts_ST = draft_ids_N.new_full((len(self.supervised_SR), num_columns), -1)
        drafts_ST[self.step_N, self.columns_R[self.row_N]] = draft_ids_N
        return list(drafts_ST)


def query_columns(supervised_ST: Tensor, route: Route) -> Tensor:
    """Columns [R] with a supervised step; all of them where attention cannot compute chosen queries."""
    if not route.computes_chosen_queries:
        return torch.arange(supervised_ST.shape[1], device=supervised_ST.device)
    columns_R = supervised_ST.any(0).nonzero().squeeze(1)
    return columns_R if len(columns_R) else columns_R.new_zeros(1)  # one column keeps the graph and gives loss 0


def step_accuracy(supervised_SR: Tensor, correct_SR: Tensor) -> dict[str, Ratio]:
    """`full_acc_s`: of the columns where step s is supervised, those where all steps up to it are right. `cond_acc_s`:
    of those right so far."""
    metrics: dict[str, Ratio] = {}
    chain_R = supervised_SR[0]
    for s in range(len(supervised_SR)):
        judged_R = chain_R & supervised_SR[s]
        chain_R = judged_R & correct_SR[s]
        metrics[f"full_acc_{s}"] = ratio(chain_R.sum(), supervised_SR[s].sum())
        metrics[f"cond_acc_{s}"] = ratio(chain_R.sum(), judged_R.sum())
    return metrics


def step_means(values_N: Tensor, step_N: Tensor, supervised_SR: Tensor, epsilon: float) -> Tensor:
    """[S]: mean over the supervised columns of each step, 0 where there are none."""
    counts_S = supervised_SR.sum(1)
    return values_N.new_zeros(len(supervised_SR)).index_add(0, step_N, values_N) / (counts_S + epsilon)


# -- counts of right drafts, as the contract names them: functions of tokens and masks alone ---------------------------


@torch.no_grad()
def compute_accuracy_single_step(
    pred_ids: Tensor, target_ids: Tensor, loss_mask: Tensor | None, prev_correct: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts one step: (right so far, supervised, right so far, supervised and right before), as `step_accuracy` does.

    All [1, T] (any shape, the same). `prev_correct`, bool: where all steps before were right; updated in place. Only
    supervised columns are counted: upstream's last count takes in those outside the mask as well.
    """
    supervised = torch.ones_like(pred_ids, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    before = torch.ones_like(supervised) if prev_correct is None else prev_correct.clone()
    right = before & (pred_ids == target_ids)
    if prev_correct is not None:
        prev_correct.copy_(right)
    num_right = (right & supervised).sum().float()
    return num_right, supervised.sum().float(), num_right.clone(), (before & supervised).sum().float()


@torch.no_grad()
def compute_accuracy_multi_step(
    pred_ids: Tensor, target_ids: Tensor, loss_mask: Tensor, pos_idx: Tensor, num_pos: int
) -> tuple[Tensor, Tensor]:
    """Counts by position, (right, supervised), float [num_pos] each. The others are [1, T] (any shape, the same)."""
    supervised = loss_mask.bool()
    place_N, right_N = pos_idx[supervised], (pred_ids == target_ids)[supervised].float()
    zeros = torch.zeros(num_pos, device=pred_ids.device)
    return zeros.index_add(0, place_N, right_N), zeros.index_add(0, place_N, torch.ones_like(right_N))


@torch.no_grad()
def compute_accepted_length_counts(correct: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(summed lengths, number of blocks) over the blocks with a supervised slot. A block's length is 1, the bonus
    token, + sum_k prod_{j <= k} correct_j. `correct`, chances or bool, and `valid`, bool: [P, slots that draft]."""
    is_judged_P = valid.any(-1)
    length_P = 1.0 + (correct * valid).cumprod(-1).sum(-1)
    return (length_P * is_judged_P).sum(), is_judged_P.sum().float()
