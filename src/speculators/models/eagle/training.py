"""Trains EAGLE and HASS: they predict the verifier's next feature and its next-token distribution.

Shapes: T columns of the packed row, R columns that carry loss, S unroll steps, N supervised (step, column) pairs,
H hidden size, V vocabulary. y = last state, f = final norm of y.

    token      x0   x1   x2   x3   x4       column i after `align`: token x[i+1], state y[i], target y[i+1]
    state      y0   y1   y2   y3   y4
    column     0    1    2    3             step s at column i reads x[i+1+s] and the feature of step s - 1 (f[i] at
                                            s = 0), stands at position i + s, is taught f[i+1+s] and head(f[i+1+s]),
                                            and is supervised if column i + s is, of the same document

One step is EAGLE-1. More are HASS's harmonised context: there the query moves with the token and the streams shift,
here the query stays at its column and the streams do (as in EAGLE-3's training-time test); the sums are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.interfaces import LossOutput, PackedBatch, Ratio
from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.metrics import ratio
from speculators.losses.registry import MASK_EPSILON, LossConfig
from speculators.model_training import LossArgs
from speculators.models.eagle.config import EagleTrainingArgs
from speculators.models.eagle.network import EagleNetwork
from speculators.models.supervision import StepPairs, VerifierHead, step_accuracy, step_means
from speculators.nn.flops import head_flop, product_flop, targets_flop, unrolled_flop
from speculators.nn.packed_row import PackedRow
from speculators.nn.routes import Route
from speculators.nn.unrolled import unrolled_attention

NOISE_LENGTH = 512
"""Noise of the given width is for rows of this length; longer rows get less (EAGLE's), shorter ones no more."""


def align(sample: dict[str, Any]) -> dict[str, Any]:
    """Pair token i + 1 with state i and target i + 1; one column less."""
    shifted = {**sample, "hidden_states": sample["verifier_last_hidden_states"][:-1]}
    for key in ("input_ids", "verifier_last_hidden_states", "loss_mask"):
        if key in shifted:
            shifted[key] = sample[key][1:]
    if "position_ids" in shifted:
        shifted["position_ids"] = sample["position_ids"][:-1]  # an entry stands where its feature does
    if "lengths" in shifted:
        shifted["lengths"] = (sample["lengths"] - 1).clamp_min(0)
    return shifted


def train_features(
    network: EagleNetwork, batch: PackedBatch, verifier: VerifierHead, args: LossArgs[EagleTrainingArgs]
) -> LossOutput:
    """Loss of all steps; `draft_ids` where they are supervised."""
    assert batch.aux_TD is not None and batch.last_hidden_TH is not None
    own = args.own
    pairs = StepPairs.of(batch, own.ttt_steps, args.attention)
    step_N, row_N, target_N = pairs.step_N, pairs.row_N, pairs.columns_R[pairs.row_N] + pairs.step_N
    with torch.no_grad():
        features_TH, targets_TH = network.combine(batch.aux_TD), network.combine(batch.last_hidden_TH)
        if own.feature_noise:
            features_TH = with_noise(features_TH, own.feature_noise)
    steps = unroll(network, batch, features_TH, pairs.columns_R, own.ttt_steps, own.detach_steps, args.attention)
    losses = row_losses(
        torch.stack([step.normed_RH for step in steps])[step_N, row_N],
        network.lm_head.weight,
        verifier.normed_targets(targets_TH),
        pairs.target_N,
        weighted_losses(args.loss_config, own),
    )
    predicted_NH = torch.stack([step.features_RH for step in steps])[step_N, row_N]
    regression_N = F.smooth_l1_loss(predicted_NH.float(), targets_TH[target_N].float(), reduction="none").mean(-1)
    loss, metrics = reduce(losses, regression_N, own.regression_weight, pairs.supervised_SR, step_N, row_N)
    flop = model_flop(network, batch, verifier, pairs, own)
    return LossOutput(loss, metrics, pairs.drafts(losses.draft_ids_N, len(features_TH)), flop)


def model_flop(
    network: EagleNetwork, batch: PackedBatch, verifier: VerifierHead, pairs: StepPairs, own: EagleTrainingArgs
) -> int:
    documents_T, num_asking = batch.host_document_ids_T, int(pairs.asks_T.sum())
    total = unrolled_flop(network.layers, network.windows, documents_T, pairs.asks_T, own.ttt_steps)
    for step in range(own.ttt_steps):
        num_rows = num_asking if step else int((documents_T != -1).sum())
        learns = network.embedding_layernorm is not None or (step > 0 and not own.detach_steps)
        total += product_flop(network.fusion_fc.weight, num_rows, input_learns=learns)
    total += head_flop(network.lm_head.weight, len(pairs.target_N))
    return total + targets_flop(verifier.lm_head.weight, pairs.target_N)


def weighted_losses(loss_config: LossConfig, own: EagleTrainingArgs) -> LossConfig:
    """The distribution losses of a step under their weights."""
    weighted: LossConfig = {
        name: (function, weight * own.distillation_weight) for name, (function, weight) in loss_config.items()
    }
    if own.top_k_weight:
        weighted["top_k"] = (TopKCrossEntropy(own.top_k), own.top_k_weight)
    return weighted


@dataclass(frozen=True)
class TopKCrossEntropy:
    """-sum of p log q over the k likeliest tokens of p (HASS)."""

    k: int

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        top = targets.softmax(-1).topk(min(self.k, targets.shape[-1]), dim=-1)
        return -(top.values * logits.log_softmax(-1).gather(-1, top.indices)).sum(-1)


@dataclass(frozen=True)
class Step:
    normed_RH: Tensor
    """What the head reads."""
    features_RH: Tensor


def unroll(
    network: EagleNetwork,
    batch: PackedBatch,
    features_TH: Tensor,
    columns_R: Tensor,
    num_steps: int,
    detach_steps: bool,
    attention: Route,
) -> list[Step]:
    """Step 0 runs every column, since each is context to others; later steps the columns that carry loss."""
    layer_attention = unrolled_attention(attention, PackedRow(batch.document_ids_T, columns_R), network.windows)
    # past the right edge: padding tokens, at columns that are not supervised
    token_ids = F.pad(batch.token_ids_T, (0, num_steps))
    hidden_1TH, columns, steps = features_TH[None], torch.arange(len(features_TH), device=columns_R.device), []
    for s in range(num_steps):
        rope = network.rope.at(batch.position_ids_T[columns] + s, torch.float32)
        normed_1RH, fed_back_1RH = network.step(token_ids[columns + s][None], hidden_1TH, rope, layer_attention)
        steps.append(Step(normed_1RH[0], fed_back_1RH[0]))
        hidden_1TH = fed_back_1RH.detach() if detach_steps else fed_back_1RH
        columns = columns_R
    return steps


def with_noise(features_TH: Tensor, width: float) -> Tensor:
    noise_TH = torch.rand_like(features_TH) - 0.5
    return features_TH + noise_TH * (width * min(1.0, NOISE_LENGTH / len(features_TH)))


def drafts_read(network: EagleNetwork, batch: PackedBatch, num_drafts: int, attention: Route) -> Tensor:
    """What the head reads in the places of the last K tokens of the batch: [K, H]."""
    assert batch.aux_TD is not None
    columns_T = torch.arange(len(batch.token_ids_T), device=batch.token_ids_T.device)
    features_TH = network.combine(batch.aux_TD)
    steps = unroll(network, batch, features_TH, columns_T, num_drafts, detach_steps=True, attention=attention)
    return torch.stack([step.normed_RH[-num_drafts - 1] for step in steps])


def reduce(
    losses: RowLosses,
    regression_N: Tensor,
    regression_weight: float,
    supervised_SR: Tensor,
    step_N: Tensor,
    row_N: Tensor,
) -> tuple[Tensor, dict[str, Ratio]]:
    """Steps are averaged over their own supervised columns and added."""

    def mean_of_steps(values_N: Tensor) -> Tensor:
        return step_means(values_N, step_N, supervised_SR, MASK_EPSILON)

    regression_N = regression_N.to(losses.loss_N.dtype)
    step_loss_S = mean_of_steps(losses.loss_N + regression_weight * regression_N)
    terms = {"loss": step_loss_S, **{f"{name}_loss": mean_of_steps(term_N) for name, term_N in losses.terms.items()}}
    terms["regression_loss"] = mean_of_steps(regression_N)
    correct_SR = torch.zeros_like(supervised_SR)
    correct_SR[step_N, row_N] = losses.correct_N
    metrics = {f"{name}_{s}": ratio(values[s]) for name, values in terms.items() for s in range(len(supervised_SR))}
    return step_loss_S.sum(), metrics | step_accuracy(supervised_SR, correct_SR)
