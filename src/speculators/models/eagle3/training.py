"""Trains EAGLE-3: the drafter is unrolled over its own states, the tokens are the true ones (teacher forcing).

Shapes: T columns of the packed row, R columns that carry loss, S unroll steps, N supervised (step, column) pairs,
H hidden size, D = aux layers * H, V draft vocabulary.

    token      x0   x1   x2   x3   x4       column i after `shift_batch`: token x[i+1], state g[i], target y[i+1]
    state      g0   g1   g2   g3   g4
    column     .    0    1    2    3        step s at column i reads x[i+1+s] and the state of step s - 1,
                                            stands at position i + s, is taught P(x[i+2+s]) = head(norm(y[i+1+s])),
                                            and counts if column i + s is supervised and of the same document
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speculators.interfaces import LossOutput, PackedBatch, Ratio
from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.metrics import ratio
from speculators.losses.registry import MASK_EPSILON
from speculators.model_training import LossArgs
from speculators.models.eagle3.keys import Eagle3TrainingArgs
from speculators.models.eagle3.network import Eagle3Network
from speculators.models.supervision import StepPairs, VerifierHead, step_accuracy, step_means
from speculators.nn.flops import head_flop, targets_flop, unrolled_flop
from speculators.nn.packed_row import PackedRow
from speculators.nn.routes import Route
from speculators.nn.unrolled import unrolled_attention


def shift_batch(sample: dict[str, Any]) -> dict[str, Any]:
    """Pair token i + 1 with state i and target i + 1; one column less."""
    shifted = dict(sample)
    for key in ("input_ids", "verifier_last_hidden_states", "loss_mask", "position_ids"):
        if key in shifted:
            shifted[key] = shifted[key][1:]
    shifted["hidden_states"] = sample["hidden_states"][:-1]
    if "lengths" in shifted:
        shifted["lengths"] = (sample["lengths"] - 1).clamp_min(0)
    return shifted


def train_unrolled(
    network: Eagle3Network, batch: PackedBatch, verifier: VerifierHead, args: LossArgs[Eagle3TrainingArgs]
) -> LossOutput:
    """Loss of all steps; `draft_ids` where they are supervised."""
    assert batch.last_hidden_TH is not None
    num_steps = args.own.ttt_steps
    pairs = StepPairs.of(batch, num_steps, args.attention)
    steps = unroll(network, batch, pairs.columns_R, num_steps, args.attention)
    losses = row_losses(
        torch.stack(steps)[pairs.step_N, pairs.row_N],
        network.lm_head.weight,
        verifier.targets(batch.last_hidden_TH),
        pairs.target_N,
        args.loss_config,
    )
    loss, metrics = reduce(losses, pairs.supervised_SR, pairs.step_N, pairs.row_N, args.own.ttt_step_loss_decay)
    drafts = pairs.drafts(losses.draft_ids_N, len(batch.token_ids_T))
    return LossOutput(loss, metrics, drafts, model_flop(network, batch, verifier, pairs, num_steps))


def model_flop(
    network: Eagle3Network, batch: PackedBatch, verifier: VerifierHead, pairs: StepPairs, num_steps: int
) -> int:
    documents_T = batch.host_document_ids_T
    return (
        network.combine_flop(int((documents_T != -1).sum()))
        + unrolled_flop(network.layers, network.windows, documents_T, pairs.asks_T, num_steps)
        + head_flop(network.lm_head.weight, len(pairs.target_N))
        + targets_flop(verifier.lm_head.weight, pairs.target_N)
    )


def reduce(
    losses: RowLosses, supervised_SR: Tensor, step_N: Tensor, row_N: Tensor, decay: float
) -> tuple[Tensor, dict[str, Ratio]]:
    """Steps are averaged over their own supervised columns and added, step s weighted by decay ** s."""
    num_steps = len(supervised_SR)
    step_loss_S = step_means(losses.loss_N, step_N, supervised_SR, MASK_EPSILON)
    decay_S = decay ** torch.arange(num_steps, device=step_N.device, dtype=step_loss_S.dtype)
    loss = (step_loss_S * decay_S).sum()

    metrics = {f"loss_{s}": ratio(step_loss_S[s]) for s in range(num_steps)}
    if len(losses.terms) > 1:
        for name, term_N in losses.terms.items():
            term_S = step_means(term_N, step_N, supervised_SR, MASK_EPSILON)
            metrics |= {f"{name}_loss_{s}": ratio(term_S[s]) for s in range(num_steps)}
    correct_SR = torch.zeros_like(supervised_SR)
    correct_SR[step_N, row_N] = losses.correct_N
    return loss, metrics | step_accuracy(supervised_SR, correct_SR)


def unroll(
    network: Eagle3Network, batch: PackedBatch, columns_R: Tensor, num_steps: int, attention: Route
) -> list[Tensor]:
    """Returns what the head reads, [R, H] per step. Step 0 runs every column, since each is context to others."""
    assert batch.aux_TD is not None
    packed = PackedRow(batch.document_ids_T, columns_R)
    layer_attention = unrolled_attention(attention, packed, network.windows)
    # past the right edge: padding tokens, at columns that are not supervised
    token_ids = torch.nn.functional.pad(batch.token_ids_T, (0, num_steps))
    hidden, columns, out = network.combine(batch.aux_TD[None]), None, []
    for s in range(num_steps):
        tokens = token_ids[s : s + len(batch.token_ids_T)] if columns is None else token_ids[columns + s]
        positions = batch.position_ids_T if columns is None else batch.position_ids_T[columns]
        rope = network.rope.at(positions + s, torch.float32)
        normed, hidden = network.step(tokens[None], hidden, rope, layer_attention)
        out.append(normed[0])
        columns = columns_R
    return out


def unroll_everywhere(network: Eagle3Network, batch: PackedBatch, num_steps: int, attention: Route) -> list[Tensor]:
    """The same with every column a query: [T, H] per step."""
    columns_T = torch.arange(len(batch.token_ids_T), device=batch.token_ids_T.device)
    return unroll(network, batch, columns_T, num_steps, attention)


def drafts_read(network: Eagle3Network, batch: PackedBatch, num_drafts: int, attention: Route) -> Tensor:
    """What the head reads in the places of the last K tokens of the batch: [K, H]."""
    steps = unroll_everywhere(network, batch, num_drafts, attention)
    return torch.stack([normed_TH[-num_drafts - 1] for normed_TH in steps])
