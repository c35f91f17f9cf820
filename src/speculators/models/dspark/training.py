"""Trains DSpark: DFlash's blocks, the Markov head fed the true tokens before, the confidence head the overlap.

Shapes: P blocks, S slots, N supervised slots, H hidden size, R Markov rank, V draft vocabulary. Alignment of the slots:
see `dflash.blocks`; the token before a slot's draft is column p + k when the anchor's slot drafts, p + k - 1 when not.

    logits = head(h_k) + W2 phi_k                    one head, [V, H + R], of which W2 is trained
    kappa_k = w [h_k ; W1[u_k]] + b                  taught 1 - TV(q_k, p_k), the chance that a draw of q_k is accepted
    loss = sum(loss * weight) / n + alpha * sum(BCE(kappa, target) * decay) / n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from speculators.interfaces import LossOutput, PackedBatch, Ratio
from speculators.losses.chunked import RowLosses, SplitHead, row_losses, split_row_losses
from speculators.losses.chunks import WholeVocabulary
from speculators.losses.metrics import as_pairs, ratio
from speculators.losses.registry import LossConfig, LossFunction, dflash_loss_decay, tv_loss
from speculators.models.dflash.metrics import args_of, blocks_of, losses_of
from speculators.models.dflash.training import (
    BlockArgs,
    BlockOutput,
    Blocks,
    blocks_flop,
    fill_sampled_blocks,
    fixed_weights,
    mean_length,
    on_grid,
    reduce,
)
from speculators.models.dspark.config import DSparkTrainingArgs
from speculators.models.dspark.network import DSparkNetwork
from speculators.models.supervision import VerifierHead
from speculators.nn.flops import head_flop, modules_flop
from speculators.training_keys import default_of, read_keys

COUNT_EPSILON = 1e-8
"""Added to the number of supervised slots in the confidence loss."""
TV, WHOLE_TV = "tv", "tv over the whole vocabulary"


@dataclass(frozen=True)
class DSparkArgs(BlockArgs[DSparkTrainingArgs]):
    tv_loss_fn: LossFunction
    """1 - the chance that a draft drawn from q is accepted."""


def train_blocks_and_heads(
    network: DSparkNetwork, batch: PackedBatch, verifier: VerifierHead, args: DSparkArgs
) -> LossOutput:
    """Loss of the supervised slots of sampled blocks, and of the confidence head."""
    output = fill_sampled_blocks(network, batch, args)
    embedded_PSR, features_PSR = markov_features(network, output)
    losses = slot_losses(network, output, features_PSR, verifier, args)
    loss, metrics = reduce(losses, output.blocks, args)
    metrics |= acceptance_metrics(losses, output.blocks)
    if network.confidence_head is not None:
        kappa_PS = network.confidence_head(output.hidden_PSH, embedded_PSR)
        loss, confident = with_confidence(loss, kappa_PS, losses, output.blocks, args.own)
        metrics |= confident
    return LossOutput(loss, metrics, model_flop=model_flop(network, output, verifier))


def model_flop(network: DSparkNetwork, output: BlockOutput, verifier: VerifierHead) -> int:
    """The recurrence and its products are of the slots that draft, the confidence of all slots."""
    blocks, num_supervised = output.blocks, len(output.blocks.target_index_N)
    total = blocks_flop(network, output.batch, blocks, verifier)
    total += head_flop(network.lm_head.weight, num_supervised)
    if network.markov_head is not None:
        num_drafts = blocks.columns_PS[:, blocks.first_slot :].numel()
        total += network.markov_head.features_flop(num_drafts)
        total += head_flop(network.markov_head.markov_w2.weight, num_supervised)
    if network.confidence_head is not None:
        total += modules_flop(network.confidence_head, blocks.columns_PS.numel())
    return total


def markov_features(network: DSparkNetwork, output: BlockOutput) -> tuple[Tensor | None, Tensor | None]:
    """(W1 of the tokens before, phi) of all slots [P, S, R]; slots that draft nothing get zeros."""
    head = network.markov_head
    if head is None:
        return None, None
    first = output.blocks.first_slot
    embedded_PSR = head.markov_w1(output.blocks.previous_tokens_PS(output.batch))
    # the recurrence starts at the first slot that drafts, as it does when drafting
    phi = head.features(embedded_PSR[:, first:], output.hidden_PSH[:, first:])
    return embedded_PSR, F.pad(phi, (0, 0, first, 0))


def drafts_logits(network: DSparkNetwork, output: BlockOutput) -> Tensor:
    """[S, D] of the slots of a single block, the tokens before them known."""
    logits_SD = network.lm_head(output.hidden_PSH[0])
    _, features_PSR = markov_features(network, output)
    if network.markov_head is None or features_PSR is None:
        return logits_SD
    return logits_SD + network.markov_head.markov_w2(features_PSR[0])


def slot_losses(
    network: DSparkNetwork, output: BlockOutput, features_PSR: Tensor | None, verifier: VerifierHead, args: DSparkArgs
) -> RowLosses:
    """Losses of the supervised slots, `tv` always among the terms: it is 1 - the chance of acceptance."""
    config: dict[str, Any] = {TV: (args.tv_loss_fn, 0.0), **args.loss_config}
    if verifier.outside is not None:  # where tokens cannot be drafted, fewer drafts are accepted than TV says
        config[WHOLE_TV] = (WholeVocabulary(args.tv_loss_fn), 0.0)
    assert output.batch.last_hidden_TH is not None
    targets, index_N = verifier.targets(output.batch.last_hidden_TH), output.blocks.target_index_N
    if features_PSR is None or network.markov_head is None:
        return row_losses(output.hidden_NH, network.lm_head.weight, targets, index_N, config)
    head = SplitHead(network.lm_head.weight, network.markov_head.markov_w2.weight)
    fixed_PS = fixed_weights(output.blocks, args.own)
    return split_row_losses(
        output.hidden_NH,
        output.blocks.supervised(features_PSR),
        head,
        targets,
        index_N,
        config,
        weight_N=None if fixed_PS is None else output.blocks.supervised(fixed_PS),
    )


def with_confidence(
    loss: Tensor, kappa_PS: Tensor, losses: RowLosses, blocks: Blocks, own: DSparkTrainingArgs
) -> tuple[Tensor, dict[str, Ratio]]:
    """Returns the loss with the confidence head's added, and that head's metrics."""
    confidence_loss = confidence_loss_of(kappa_PS, losses, blocks, own)
    metrics = {"confidence_loss": ratio(confidence_loss), **confidence_metrics(kappa_PS, losses, blocks)}
    return loss + own.confidence_head_alpha * confidence_loss, metrics


def confidence_loss_of(kappa_PS: Tensor, losses: RowLosses, blocks: Blocks, own: DSparkTrainingArgs) -> Tensor:
    """Always with the fixed decay."""
    supervised_PS = blocks.supervised_PS
    target_N = losses.agrees_N.float() if own.confidence_target == "greedy" else 1.0 - losses.terms[TV]
    kappa_N = blocks.supervised(kappa_PS).float()
    decay_PS = dflash_loss_decay(blocks.slot_index_PS, own.dflash_decay_gamma, blocks.first_slot == 0)
    loss_N = F.binary_cross_entropy_with_logits(kappa_N, target_N.float(), reduction="none")
    return (loss_N * blocks.supervised(decay_PS)).sum() / (supervised_PS.sum() + COUNT_EPSILON)


def accepted(losses: RowLosses) -> Tensor:
    """[N]: the chance that the verifier accepts a draft drawn from q."""
    return 1.0 - losses.terms.get(WHOLE_TV, losses.terms[TV])


def acceptance_metrics(losses: RowLosses, blocks: Blocks) -> dict[str, Ratio]:
    """Of drafts drawn from q: the chance to be accepted, and tokens per round."""
    supervised_PS = blocks.supervised_PS
    accept_N = accepted(losses)
    return {
        "accept_rate": ratio(accept_N.sum(), supervised_PS.sum()),
        "accept_len": mean_length(on_grid(accept_N, supervised_PS), blocks),
    }


def confidence_metrics(kappa_PS: Tensor, losses: RowLosses, blocks: Blocks) -> dict[str, Ratio]:
    """Measures how far the predicted chances, and the run lengths they promise, are from those of acceptance."""
    supervised_PS = blocks.supervised_PS
    accept_N = accepted(losses)
    predicted_N = blocks.supervised(kappa_PS.detach()).float().sigmoid()
    num_slots = supervised_PS.sum()
    promised = mean_length(on_grid(predicted_N, supervised_PS), blocks)
    actual = mean_length(on_grid(accept_N, supervised_PS), blocks)
    bias = Ratio(promised.numerator - actual.numerator, promised.denominator)
    return {
        "confidence_abs_error": ratio((predicted_N - accept_N).abs().sum(), num_slots),
        "confidence_pred_mean": ratio(predicted_N.sum(), num_slots),
        "confidence_cumprod_bias": bias,
    }


def compute_metrics(
    logits: Tensor,
    targets: Tensor,
    confidence_logits: Tensor | None,
    loss_mask: Tensor,
    block_size: int,
    loss_config: LossConfig,
    tv_loss_fn: LossFunction = tv_loss,
    gamma: float = default_of(DSparkTrainingArgs, "dflash_decay_gamma"),
    confidence_head_alpha: float = default_of(DSparkTrainingArgs, "confidence_head_alpha"),
    per_position_loss_weight: str = default_of(DSparkTrainingArgs, "per_position_loss_weight"),
    dpace_alpha: float = default_of(DSparkTrainingArgs, "dpace_alpha"),
    sample_from_anchor: bool = default_of(DSparkTrainingArgs, "sample_from_anchor"),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, metrics as `X_sum` and `X_total`) of logits that have the Markov bias, as training computes them.

    `logits`, `targets` [1, T, V]; `confidence_logits` (kappa) and `loss_mask` [1, T]. The confidence head is taught
    acceptance, with the fixed decay. Raises `ValueError` when blocks do not divide T, and for settings outside their
    ranges.
    """
    given = {
        "dflash_decay_gamma": gamma,
        "confidence_head_alpha": confidence_head_alpha,
        "per_position_loss_weight": per_position_loss_weight,
        "dpace_alpha": dpace_alpha,
        "sample_from_anchor": sample_from_anchor,
    }
    own = read_keys(DSparkTrainingArgs, given)
    blocks = blocks_of(loss_mask, block_size, 0 if sample_from_anchor else 1)
    losses = losses_of(logits, targets, blocks, {TV: (tv_loss_fn, 0.0), **loss_config})
    loss, metrics = reduce(losses, blocks, args_of(own, loss_config, blocks))
    metrics |= acceptance_metrics(losses, blocks)
    if confidence_logits is not None:
        kappa_PS = confidence_logits.reshape(blocks.supervised_PS.shape)
        loss, confident = with_confidence(loss, kappa_PS, losses, blocks, own)
        metrics |= confident
    return loss, as_pairs({"loss": ratio(loss), **metrics})
