"""Trains an MTP layer: it is run over its own states, the tokens are the true ones (teacher forcing).

Shapes: B rows end to end (1 when packed), S columns of each as it came, T columns of all, K steps, R columns that take
part (of each row the first S - K - 1), N supervised (step, column) pairs, H hidden size, V vocabulary.

    token      x0   x1   x2   x3   x4       nothing is shifted: column t holds token x[t] and state y[t]
    state      y0   y1   y2   y3   y4       f[t] = the verifier's final norm of y[t] (MiMo: y[t])

    step 0 at column t   reads x[t+1] and f[t]                      is taught x[t+2]
    step k at column t   reads x[t+1+k] and the state of step k-1   is taught x[t+2+k]
                         stands at position t + k, sees the states of step k at columns up to t of its document

Step k is supervised at column t if column t+2+k is and of the same document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.interfaces import LossOutput, PackedBatch, Ratio
from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.chunks import Targets, TokenTargets
from speculators.model_training import LossArgs
from speculators.models.last_state_model import align, teaches_tokens
from speculators.models.mtp.config import MTPTrainingArgs
from speculators.models.mtp.network import MTPNetwork
from speculators.models.supervision import VerifierHead, step_accuracy
from speculators.nn.flops import head_flop, layer_flop, num_visible, product_flop, targets_flop
from speculators.nn.packed_row import PackedRow
from speculators.nn.routes import Route
from speculators.nn.unrolled import unrolled_attention
from speculators.training_keys import default_of

shift_batch_mtp = align
"""The contract's name for it in this algorithm."""


def compute_step_weights(
    beta: float = default_of(MTPTrainingArgs, "step_weight_beta"),
    num_steps: int = default_of(MTPTrainingArgs, "num_speculative_steps"),
) -> list[float]:
    """beta ** k, scaled to add up to 1."""
    weights = [beta**k for k in range(num_steps)]
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class MTPArgs(LossArgs[MTPTrainingArgs]):
    step_weights: list[float]
    """Of each step; as many as the layer is run."""


def train_steps(network: MTPNetwork, batch: PackedBatch, verifier: VerifierHead, args: MTPArgs) -> LossOutput:
    """Loss of all steps; rows too short for one have loss 0."""
    columns = StepColumns.of(batch, len(args.step_weights))
    if columns is None:
        return LossOutput(network.layer.input_proj.weight.sum() * 0.0, {})
    steps = unroll(network, columns, args.attention)
    host_supervised_KR = torch.stack([columns.supervised(k) for k in range(columns.num_steps)])
    pairs_N2 = host_supervised_KR.nonzero()
    target_N = columns.host_columns_R[pairs_N2[:, 1]] + pairs_N2[:, 0] + 2
    targets, index_N = targets_of(batch, verifier, args, target_N)
    device = batch.token_ids_T.device
    supervised_KR = host_supervised_KR.to(device, non_blocking=True)
    step_N, row_N = pairs_N2.to(device, non_blocking=True).unbind(1)
    losses = row_losses(torch.stack(steps)[step_N, row_N], network.lm_head.weight, targets, index_N, args.loss_config)
    loss, metrics = reduce(losses, supervised_KR, step_N, row_N, args.step_weights)
    if len(pairs_N2) == 0:
        loss = loss + sum(step.sum() for step in steps) * 0.0  # keeps the graph
    flop = model_flop(network, columns, len(target_N))
    flop += 0 if teaches_tokens(args.loss_config) else targets_flop(verifier.lm_head.weight, index_N)
    return LossOutput(loss, metrics, model_flop=flop)


def model_flop(network: MTPNetwork, columns: StepColumns, num_supervised: int) -> int:
    """Of the drafter. Every column is context of the next step; what the last one makes of it is read by the loss
    alone."""
    documents_R = columns.batch.host_document_ids_T[columns.host_columns_R]
    context_R, num_real = num_visible(documents_R), int((documents_R != -1).sum())
    total = head_flop(network.lm_head.weight, num_supervised)
    for step in range(columns.num_steps):
        asks_R = columns.supervised(step) if step == columns.num_steps - 1 else documents_R != -1
        num_pairs, num_queries = int(context_R[asks_R].sum()), int(asks_R.sum())
        total += product_flop(network.layer.input_proj.weight, num_real)
        total += layer_flop(network.layer, num_queries=num_queries, num_keys=num_real, num_pairs=num_pairs)
    return total


@dataclass(frozen=True)
class StepColumns:
    """The columns that take part, of all rows end to end, and what lies to their right."""

    batch: PackedBatch
    num_steps: int
    host_columns_R: Tensor
    columns_R: Tensor
    """The same, on the device."""

    @classmethod
    def of(cls, batch: PackedBatch, num_steps: int) -> StepColumns | None:
        """None when rows are too short for a single step."""
        num_steps = min(num_steps, batch.row_length - 2)
        num_columns = batch.row_length - num_steps - 1
        if num_steps < 1 or num_columns < 1:
            return None
        index_T = torch.arange(len(batch.token_ids_T))
        host_columns_R = index_T[index_T % batch.row_length < num_columns]
        return cls(batch, num_steps, host_columns_R, host_columns_R.to(batch.token_ids_T.device, non_blocking=True))

    def tokens(self, shift: int) -> Tensor:
        """[R]: those `shift` columns further right; 0 past the end."""
        return self.at(self.batch.token_ids_T, self.columns_R + shift, 0)

    def at(self, values_T: Tensor, columns_R: Tensor, fill: int) -> Tensor:
        return F.pad(values_T, (0, self.num_steps + 1), value=fill)[columns_R]

    def supervised(self, step: int) -> Tensor:
        """bool [R], on the host"""
        documents_T, columns_R = self.batch.host_document_ids_T, self.host_columns_R
        same_document_R = documents_T[columns_R] == self.at(documents_T, columns_R + step + 2, -1)
        return same_document_R & self.at(self.batch.host_supervised_T, columns_R + step + 2, False)


def unroll(network: MTPNetwork, columns: StepColumns, attention: Route, *, as_served: bool = False) -> list[Tensor]:
    """What the head reads at each step: [R, H] per step. Steps of training have keys of their own; a layer that is
    served sees the keys of step 0 and, after them, those of the tokens it drafted."""
    batch, columns_R = columns.batch, columns.columns_R
    assert batch.last_hidden_TH is not None
    hidden = network.combine(batch.last_hidden_TH)[columns_R][None]
    packed = PackedRow(batch.document_ids_T[columns_R])
    out: list[Tensor] = []
    for k in range(columns.num_steps):
        positions = batch.position_ids_T[columns_R][None] + k
        if k == 0 or not as_served:
            layer_attention = unrolled_attention(attention, packed, [None])
        rope = network.rope.at(positions[0], torch.float32)
        tokens = network.tokens_at(columns.tokens(k + 1)[None], positions)
        normed, hidden = network.step(tokens, hidden, rope, layer_attention)
        out.append(normed[0])
    return out


def drafts_read(network: MTPNetwork, batch: PackedBatch, num_drafts: int, attention: Route) -> Tensor:
    """What the head reads in the places of the last K tokens: [K, H]. The first is a step of training; the others are
    that step continued as engines serve it."""
    columns = StepColumns.of(batch, num_drafts)
    assert columns is not None and columns.num_steps == num_drafts, "a draft needs two tokens before it"
    steps = unroll(network, columns, attention, as_served=True)
    return torch.stack([normed_RH[-1] for normed_RH in steps])


def step_logits(network: MTPNetwork, batch: PackedBatch, num_rows: int, args: MTPArgs) -> list[Tensor]:
    """[B, S - K - 1, V] per step; zeros in columns behind the last document. For callers that ask; training never holds
    them."""
    columns = StepColumns.of(batch, len(args.step_weights))
    if columns is None:
        return []
    out = []
    for hidden_RH in unroll(network, columns, args.attention):
        hidden = hidden_RH.new_zeros(num_rows * batch.row_length, hidden_RH.shape[1])
        hidden = hidden.index_copy(0, columns.columns_R, hidden_RH)
        num_columns = batch.row_length - columns.num_steps - 1
        out.append(network.lm_head(hidden.unflatten(0, (num_rows, -1))[:, :num_columns]))
    return out


def documents_of(
    input_ids: Tensor, document_ids: Tensor | None, attention_mask: Tensor | None, positions: Tensor
) -> Tensor:
    """Document of each column. Without `document_ids` a new one starts wherever positions do not go on."""
    if document_ids is None:
        starts = torch.ones_like(input_ids, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        document_ids = starts.long().cumsum(1) - 1
    if attention_mask is not None and attention_mask.ndim == 2:
        document_ids = document_ids.masked_fill(attention_mask.to(document_ids.device) == 0, -1)
    return document_ids


def positions_of(input_ids: Tensor, position_ids: Tensor | None, model_type: str) -> Tensor:
    if position_ids is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    if position_ids.ndim == 3:  # (3, B, S): time, height, width; all the same for text
        if not model_type.startswith("qwen3_5"):
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}; {model_type} has one position per token: [B, S]"
            )
        return position_ids[0]
    return position_ids.expand(input_ids.shape)


def targets_of(batch: PackedBatch, verifier: VerifierHead, args: MTPArgs, target_N: Tensor) -> tuple[Targets, Tensor]:
    """(targets, which of them each pair is taught): the data's tokens, or the distributions of the verifier's states
    one column to the left of them."""
    if teaches_tokens(args.loss_config):
        return TokenTargets(batch.token_ids_T), target_N
    assert batch.last_hidden_TH is not None
    return verifier.targets(batch.last_hidden_TH), target_N - 1


def reduce(
    losses: RowLosses, supervised_KR: Tensor, step_N: Tensor, row_N: Tensor, weights: list[float]
) -> tuple[Tensor, dict[str, Ratio]]:
    """Each step is averaged over its own supervised columns and weighted; steps are added."""
    num_steps = len(supervised_KR)
    counts_K = supervised_KR.sum(1)
    sums_K = losses.loss_N.new_zeros(num_steps).index_add(0, step_N, losses.loss_N)
    weight_K = torch.tensor(weights[:num_steps], dtype=sums_K.dtype).to(sums_K.device, non_blocking=True)
    step_loss_K = weight_K * sums_K / counts_K.clamp_min(1)
    loss = step_loss_K.sum()

    correct_KR = torch.zeros_like(supervised_KR)
    correct_KR[step_N, row_N] = losses.correct_N
    metrics = {f"loss_step_{k}": Ratio(step_loss_K[k].detach(), None) for k in range(num_steps)}
    return loss, metrics | step_accuracy(supervised_KR, correct_KR)
