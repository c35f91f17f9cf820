"""How EAGLE and HASS learn: predict the verifier's next feature and its next-token distribution.

Shapes: T columns of the packed row, R columns that carry loss, S unroll steps, N supervised (step, column) pairs,
H hidden size, V vocabulary. y = last state, f = final norm of y.

    token      x0   x1   x2   x3   x4       column i after `align`: token x[i+1], state y[i], target y[i+1]
    state      y0   y1   y2   y3   y4
    column     0    1    2    3             step s at column i reads x[i+1+s] and the feature of step s - 1 (f[i] at
                                            s = 0), stands at position i + s, is taught f[i+1+s] and head(f[i+1+s]),
                                            and counts if column i + s is supervised and of the same document

One step is EAGLE-1. More are HASS's harmonised context: there the query moves with the token and the streams shift,
here the query stays at its column and the streams do (as in EAGLE-3's training-time test); the sums are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.chunks import HeadTargets
from speculators.losses.metrics import counted
from speculators.losses.registry import MASK_EPSILON, LossConfig, choose_loss_config
from speculators.models.draft_layers import attention_of
from speculators.models.eagle.arguments import default_of
from speculators.models.eagle.network import EagleNetwork
from speculators.models.packed_columns import PackedColumns
from speculators.models.unrolled_steps import answered_columns, counted_steps, step_accuracy
from speculators.nn.masks import PackedRow
from speculators.nn.unrolled import unrolled_attention

if TYPE_CHECKING:
    from speculators.models.eagle.core import EagleSpeculator

NOISE_LENGTH = 512
"""Noise of the given width is for rows of this length; longer rows get less (EAGLE's), shorter ones no more."""
OBJECTIVE_KEYS = ("ttt_steps", "detach_steps", "regression_weight", "feature_noise")
"""Training keys that reach the forward as they are."""


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


@dataclass(frozen=True)
class Objective:
    """What is learnt and how it is weighed."""

    loss_config: LossConfig
    """Losses between next-token distributions, weighed already."""
    regression_weight: float
    num_steps: int
    detach_steps: bool
    feature_noise: float


@dataclass(frozen=True)
class TopKCrossEntropy:
    """-sum of p log q over the k likeliest tokens of p (HASS)."""

    k: int

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        top = targets.softmax(-1).topk(min(self.k, targets.shape[-1]), dim=-1)
        return -(top.values * logits.log_softmax(-1).gather(-1, top.indices)).sum(-1)


@dataclass(frozen=True)
class PackedBatch:
    """One packed row without its padding."""

    states_TH: Tensor
    token_ids_T: Tensor
    document_ids_T: Tensor
    position_ids_T: Tensor
    targets_TH: Tensor
    loss_mask_T: Tensor

    @classmethod
    def of(
        cls,
        hidden_states: Tensor,
        input_ids: Tensor,
        document_ids: Tensor | None,
        loss_mask: Tensor | None,
        position_ids: Tensor | None,
        last_hidden: Tensor,
    ) -> PackedBatch:
        columns = PackedColumns.of(input_ids, document_ids, loss_mask, position_ids).without_padding()
        if hidden_states.shape[-1] == 0:  # a row of padding alone was never aligned
            hidden_states = torch.zeros_like(last_hidden)
        return cls(
            hidden_states[0, : columns.length],
            columns.token_ids_T,
            columns.document_ids_T,
            columns.position_ids_T,
            last_hidden[0, : columns.length],
            columns.loss_mask_T,
        )


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
    objective: Objective,
    attention: str | None,
) -> list[Step]:
    """Step 0 runs every column, since each is context to others; later steps the columns that carry loss."""
    layer_attention = unrolled_attention(attention, PackedRow(batch.document_ids_T, columns_R), network.windows)
    # past the right edge: padding tokens, at columns that cannot count
    token_ids = F.pad(batch.token_ids_T, (0, objective.num_steps))
    hidden_1TH, columns, steps = features_TH[None], torch.arange(len(features_TH), device=columns_R.device), []
    for s in range(objective.num_steps):
        rope = network.rope.at(batch.position_ids_T[columns] + s, torch.float32)
        normed_1RH, fed_back_1RH = network.step(token_ids[columns + s][None], hidden_1TH, rope, layer_attention)
        steps.append(Step(normed_1RH[0], fed_back_1RH[0]))
        hidden_1TH = fed_back_1RH.detach() if objective.detach_steps else fed_back_1RH
        columns = columns_R
    return steps


def with_noise(features_TH: Tensor, width: float) -> Tensor:
    noise_TH = torch.rand_like(features_TH) - 0.5
    return features_TH + noise_TH * (width * min(1.0, NOISE_LENGTH / len(features_TH)))


def drafts_read(model: EagleSpeculator, batch: PackedBatch, num_drafts: int) -> Tensor:
    """What the head reads in the places of the last K tokens of the batch: [K, H]."""
    network = model.network
    attention = attention_of(model.config)
    columns_T = torch.arange(len(batch.token_ids_T), device=batch.token_ids_T.device)
    nothing_learnt = Objective({}, 0.0, num_drafts, detach_steps=True, feature_noise=0.0)
    steps = unroll(network, batch, network.combine(batch.states_TH), columns_T, nothing_learnt, attention)
    return torch.stack([step.normed_RH[-num_drafts - 1] for step in steps])


def train_forward(model: EagleSpeculator, batch: PackedBatch, objective: Objective) -> Any:
    network = model.network
    attention = attention_of(model.config)
    counts_ST = counted_steps(batch.loss_mask_T, batch.document_ids_T, objective.num_steps)
    columns_R = answered_columns(counts_ST, attention)
    counts_SR = counts_ST[:, columns_R]
    with torch.no_grad():
        features_TH, targets_TH = network.combine(batch.states_TH), network.combine(batch.targets_TH)
        if model.training and objective.feature_noise:
            features_TH = with_noise(features_TH, objective.feature_noise)
    steps = unroll(network, batch, features_TH, columns_R, objective, attention)
    step_N, row_N = counts_SR.nonzero().unbind(1)
    target_N = columns_R[row_N] + step_N
    losses = row_losses(
        torch.stack([step.normed_RH for step in steps])[step_N, row_N],
        network.lm_head.weight,
        HeadTargets(targets_TH, network.lm_head.weight, *model.target_transform),
        target_N,
        objective.loss_config,
    )
    predicted_NH = torch.stack([step.features_RH for step in steps])[step_N, row_N]
    regression_N = F.smooth_l1_loss(predicted_NH.float(), targets_TH[target_N].float(), reduction="none").mean(-1)
    loss, metrics = reduce(losses, regression_N, objective, counts_SR, step_N, row_N)
    drafts_ST = torch.full((objective.num_steps, batch.token_ids_T.shape[0]), -1, device=step_N.device)
    drafts_ST[step_N, columns_R[row_N]] = losses.draft_ids_N
    return list(drafts_ST), loss, metrics


def reduce(
    losses: RowLosses, regression_N: Tensor, objective: Objective, counts_SR: Tensor, step_N: Tensor, row_N: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Steps are averaged over their own supervised columns and added."""
    num_steps, counts_S = len(counts_SR), counts_SR.sum(1)

    def step_means(loss_N: Tensor) -> Tensor:
        return loss_N.new_zeros(num_steps).index_add(0, step_N, loss_N) / (counts_S + MASK_EPSILON)

    regression_N = regression_N.to(losses.loss_N.dtype)
    step_loss_S = step_means(losses.loss_N + objective.regression_weight * regression_N)
    loss = step_loss_S.sum()
    metrics = {"loss": loss.detach(), **counted("loss", loss, 1.0)}
    terms = {f"{name}_loss": step_means(term_N) for name, term_N in losses.terms.items()}
    terms["regression_loss"] = step_means(regression_N)
    correct_SR = torch.zeros_like(counts_SR)
    correct_SR[step_N, row_N] = losses.correct_N
    for s in range(num_steps):
        metrics |= counted(f"loss_{s}", step_loss_S[s], 1.0)
        for name, values in terms.items():
            metrics |= counted(f"{name}_{s}", values[s], 1.0)
    return loss, metrics | step_accuracy(counts_SR, correct_SR)


def weighted_losses(
    config: Any,
    distillation_weight: float = default_of("distillation_weight"),
    top_k_weight: float = default_of("top_k_weight"),
    top_k: int = default_of("top_k"),
) -> dict[str, Any]:
    """The distribution losses of a step under their weights."""
    weighted = {name: (function, weight * distillation_weight) for name, (function, weight) in config.items()}
    if top_k_weight:
        weighted["top_k"] = (TopKCrossEntropy(top_k), top_k_weight)
    return weighted


def objective_of(
    loss_config: Any = None,
    loss_fn: Any = None,
    ttt_steps: int = default_of("ttt_steps"),
    detach_steps: bool = default_of("detach_steps"),
    regression_weight: float = default_of("regression_weight"),
    feature_noise: float = default_of("feature_noise"),
    **_: Any,
) -> Objective:
    """What a forward was told; `loss_config` is weighed already, `loss_fn` gets the default weights."""
    if loss_config is None:
        loss_config = weighted_losses(choose_loss_config(None, loss_fn, default="kl_div"))
    return Objective(loss_config, regression_weight, ttt_steps, detach_steps, feature_noise)
