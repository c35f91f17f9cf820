"""How DSpark learns: DFlash's blocks, the Markov head fed the true tokens before, the confidence head the overlap.

Shapes: P blocks, S slots, N supervised slots, H hidden size, R Markov rank, V draft vocabulary. Alignment of the slots:
see `dflash.blocks`; the token before a slot's draft is column p + k when the anchor's slot drafts, p + k - 1 when not.

    logits = head(h_k) + W2 phi_k                    one head, [V, H + R], of which W2 is trained
    kappa_k = w [h_k ; W1[u_k]] + b                  taught 1 - TV(q_k, p_k), the chance that a draw of q_k is accepted
    loss = sum(loss * weight) / n + alpha * sum(BCE(kappa, target) * decay) / n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.losses.chunked import RowLosses, SplitHead, row_losses, split_row_losses
from speculators.losses.metrics import counted
from speculators.losses.registry import resolve_loss_fn
from speculators.losses.weights import dflash_loss_decay
from speculators.models.dflash.blocks import PackedBatch
from speculators.models.dflash.training import Filled, Objective, fill_blocks, mean_length, on_grid, reduce, targets_of
from speculators.models.dspark.arguments import DSparkTrainingArgs

if TYPE_CHECKING:
    from speculators.models.dspark.core import DSparkDraftModel

CONFIDENCE_ALPHA = DSparkTrainingArgs.model_fields["confidence_head_alpha"].default
CONFIDENCE_TARGET = DSparkTrainingArgs.model_fields["confidence_target"].default
COUNT_EPSILON = 1e-8
"""Added to the number of supervised slots in the confidence loss."""
TV = "tv"


@dataclass(frozen=True)
class ConfidenceObjective:
    alpha: float = CONFIDENCE_ALPHA
    target: str = CONFIDENCE_TARGET
    """`acceptance`: 1 - TV; `greedy`: whether the most likely tokens agree."""
    tv_loss_fn: Any = None

    def __post_init__(self) -> None:
        if self.target not in ("acceptance", "greedy"):
            raise ValueError(f"confidence_target={self.target!r} is unknown; use 'acceptance' or 'greedy'")


def train_forward(
    model: DSparkDraftModel,
    row: PackedBatch,
    objective: Objective,
    confidence: ConfidenceObjective,
    max_anchors: int | None,
    generator: torch.Generator | None,
) -> tuple[None, Tensor, dict[str, Tensor]]:
    filled = fill_blocks(model, row, max_anchors, generator)
    embedded_PSR, features_PSR = markov_features(model, filled)
    losses = slot_losses(model, filled, features_PSR, objective, confidence)
    loss, metrics = reduce(losses, filled.blocks, objective)
    metrics |= acceptance_metrics(losses, filled)
    if model.confidence_head is not None:
        kappa_PS = model.confidence_head(filled.hidden_PSH, embedded_PSR)
        confidence_loss = confidence_loss_of(kappa_PS, losses, filled, objective.gamma, confidence.target)
        loss = loss + confidence.alpha * confidence_loss
        metrics |= {"loss": loss.detach(), **counted("loss", loss, 1.0)}
        metrics |= counted("confidence_loss", confidence_loss, 1.0)
        metrics |= confidence_metrics(kappa_PS, losses, filled)
    return None, loss, metrics


def markov_features(model: DSparkDraftModel, filled: Filled) -> tuple[Tensor | None, Tensor | None]:
    """(W1 of the tokens before, phi) of all slots [P, S, R]; slots that draft nothing get zeros."""
    head = model.markov_head
    if head is None:
        return None, None
    first = filled.blocks.first_slot
    embedded_PSR = head.markov_w1(filled.blocks.previous_tokens_PS(filled.row))
    # the recurrence starts at the first slot that drafts, as it does when drafting
    phi = head.features(embedded_PSR[:, first:], filled.hidden_PSH[:, first:])
    return embedded_PSR, F.pad(phi, (0, 0, first, 0))


def drafts_logits(model: DSparkDraftModel, filled: Filled) -> Tensor:
    """[S, D] of the slots of a single block, the tokens before them known."""
    logits_SD = model.lm_head(filled.hidden_PSH[0])
    _, features_PSR = markov_features(model, filled)
    if model.markov_head is None or features_PSR is None:
        return logits_SD
    return logits_SD + model.markov_head.markov_w2(features_PSR[0])


def slot_losses(
    model: DSparkDraftModel,
    filled: Filled,
    features_PSR: Tensor | None,
    objective: Objective,
    confidence: ConfidenceObjective,
) -> RowLosses:
    """Losses of the supervised slots, `tv` always among the terms: it is 1 - the chance of acceptance."""
    tv_loss_fn = confidence.tv_loss_fn or resolve_loss_fn(TV)
    config = {TV: (tv_loss_fn, 0.0), **objective.loss_config}
    targets = targets_of(model, filled.row)
    if features_PSR is None or model.markov_head is None:
        return row_losses(filled.hidden_NH, model.lm_head.weight, targets, filled.target_index_N, config)
    head = SplitHead(model.lm_head.weight, model.markov_head.markov_w2.weight)
    counts_PS = filled.blocks.counts_PS
    fixed_PS = objective.fixed_weights(filled.blocks)
    return split_row_losses(
        filled.hidden_NH,
        features_PSR[counts_PS],
        head,
        targets,
        filled.target_index_N,
        config,
        expected_weight_N=None if fixed_PS is None else fixed_PS[counts_PS],
    )


def confidence_loss_of(kappa_PS: Tensor, losses: RowLosses, filled: Filled, gamma: float, target: str) -> Tensor:
    """Always with the fixed decay."""
    blocks = filled.blocks
    target_N = losses.correct_N.float() if target == "greedy" else 1.0 - losses.terms[TV]
    kappa_N = kappa_PS[blocks.counts_PS].float()
    decay_N = dflash_loss_decay(blocks.slot_index_PS, gamma, blocks.first_slot == 0)[blocks.counts_PS]
    loss_N = F.binary_cross_entropy_with_logits(kappa_N, target_N.float(), reduction="none")
    return (loss_N * decay_N).sum() / (blocks.counts_PS.sum() + COUNT_EPSILON)


def acceptance_metrics(losses: RowLosses, filled: Filled) -> dict[str, Tensor]:
    """Of drafts drawn from q: the chance to be accepted, and tokens a round."""
    counts_PS = filled.blocks.counts_PS
    accept_N = 1.0 - losses.terms[TV]
    metrics = counted("accept_rate", accept_N.sum(), counts_PS.sum())
    return metrics | mean_length("accept_len", on_grid(accept_N, counts_PS), filled.blocks)


def confidence_metrics(kappa_PS: Tensor, losses: RowLosses, filled: Filled) -> dict[str, Tensor]:
    """How far the predicted chances, and the run lengths they promise, are from 1 - TV."""
    blocks = filled.blocks
    accept_N = 1.0 - losses.terms[TV]
    predicted_N = kappa_PS.detach()[blocks.counts_PS].float().sigmoid()
    num_slots = blocks.counts_PS.sum()
    promised = mean_length("promised", on_grid(predicted_N, blocks.counts_PS), blocks)
    actual = mean_length("actual", on_grid(accept_N, blocks.counts_PS), blocks)
    return {
        **counted("confidence_abs_error", (predicted_N - accept_N).abs().sum(), num_slots),
        **counted("confidence_pred_mean", predicted_N.sum(), num_slots),
        **counted(
            "confidence_cumprod_bias", promised["promised_sum"] - actual["actual_sum"], promised["promised_total"]
        ),
    }
