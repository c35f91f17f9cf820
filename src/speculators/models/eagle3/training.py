"""How EAGLE-3 learns: the drafter is unrolled over its own states, the tokens are the true ones (teacher forcing).

Shapes: T columns of the packed row, R columns that carry loss, S unroll steps, N supervised (step, column) pairs,
H hidden size, D = aux layers * H, V draft vocabulary.

    token      x0   x1   x2   x3   x4       column i after `shift_batch`: token x[i+1], state g[i], target y[i+1]
    state      g0   g1   g2   g3   g4
    column     .    0    1    2    3        step s at column i reads x[i+1+s] and the state of step s - 1,
                                            stands at position i + s, is taught P(x[i+2+s]) = head(norm(y[i+1+s])),
                                            and counts if column i + s is supervised and of the same document
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.chunks import HeadTargets
from speculators.losses.metrics import counted
from speculators.losses.registry import MASK_EPSILON, LossConfig, choose_loss_config
from speculators.models.draft_layers import attention_of
from speculators.models.eagle3.arguments import Eagle3TrainingArgs
from speculators.models.eagle3.network import Eagle3Network
from speculators.models.packed_columns import PackedColumns
from speculators.models.unrolled_steps import answered_columns, counted_steps, padded, step_accuracy
from speculators.nn.masks import PackedRow
from speculators.nn.unrolled import unrolled_attention

if TYPE_CHECKING:
    from speculators.models.eagle3.core import Eagle3DraftModel

TTT_STEPS = Eagle3TrainingArgs.model_fields["ttt_steps"].default
STEP_LOSS_DECAY = Eagle3TrainingArgs.model_fields["ttt_step_loss_decay"].default


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


@dataclass(frozen=True)
class PackedBatch:
    """One packed row without its padding."""

    features_TD: Tensor
    token_ids_T: Tensor
    document_ids_T: Tensor
    loss_mask_T: Tensor
    position_ids_T: Tensor
    last_hidden_TH: Tensor | None

    @classmethod
    def of(
        cls,
        hidden_states: Tensor,
        input_ids: Tensor,
        document_ids: Tensor | None,
        loss_mask: Tensor | None,
        position_ids: Tensor | None,
        last_hidden: Tensor | None,
    ) -> PackedBatch:
        columns = PackedColumns.of(input_ids, document_ids, loss_mask, position_ids, first_position=1).without_padding()
        return cls(
            hidden_states[0, : columns.length],
            columns.token_ids_T,
            columns.document_ids_T,
            columns.loss_mask_T,
            columns.position_ids_T,
            None if last_hidden is None else last_hidden[0, : columns.length],
        )


def unroll(
    network: Eagle3Network, batch: PackedBatch, columns_R: Tensor, num_steps: int, attention: str | None
) -> list[Tensor]:
    """What the head reads at each step, [R, H] a step. Step 0 runs every column, since each is context to others."""
    packed = PackedRow(batch.document_ids_T, columns_R)
    layer_attention = unrolled_attention(attention, packed, network.windows)
    # past the right edge: padding tokens, at columns that cannot count
    token_ids = torch.nn.functional.pad(batch.token_ids_T, (0, num_steps))
    hidden, columns, out = network.combine(batch.features_TD[None]), None, []
    for s in range(num_steps):
        tokens = token_ids[s : s + len(batch.token_ids_T)] if columns is None else token_ids[columns + s]
        positions = batch.position_ids_T if columns is None else batch.position_ids_T[columns]
        rope = network.rope.at(positions + s, torch.float32)
        normed, hidden = network.step(tokens[None], hidden, rope, layer_attention)
        out.append(normed[0])
        columns = columns_R
    return out


def drafts_read(model: Eagle3DraftModel, batch: PackedBatch, num_drafts: int) -> Tensor:
    """What the head reads in the places of the last K tokens of the batch: [K, H]."""
    attention = attention_of(model.config)
    columns_T = torch.arange(len(batch.token_ids_T), device=batch.token_ids_T.device)
    steps = unroll(model.network, batch, columns_T, num_drafts, attention)
    return torch.stack([normed_TH[-num_drafts - 1] for normed_TH in steps])


def train_forward(
    model: Eagle3DraftModel,
    hidden_states: Tensor,
    input_ids: Tensor,
    document_ids: Tensor | None,
    loss_mask: Tensor | None,
    position_ids: Tensor | None,
    verifier_last_hidden_states: Tensor | None,
    *,
    ttt_steps: int = TTT_STEPS,
    ttt_step_loss_decay: float = STEP_LOSS_DECAY,
    loss_config: LossConfig | None = None,
    loss_fn: Any = None,
    **_: Any,
) -> Any:
    batch = PackedBatch.of(hidden_states, input_ids, document_ids, loss_mask, position_ids, verifier_last_hidden_states)
    attention = attention_of(model.config)
    if batch.last_hidden_TH is None:
        every_column_T = torch.arange(len(batch.token_ids_T), device=input_ids.device)
        steps = unroll(model.network, batch, every_column_T, ttt_steps, attention)
        return [padded(model.lm_head(normed_TH).argmax(-1), input_ids) for normed_TH in steps]

    counts_ST = counted_steps(batch.loss_mask_T, batch.document_ids_T, ttt_steps)
    columns_R = answered_columns(counts_ST, attention)
    counts_SR = counts_ST[:, columns_R]
    steps = unroll(model.network, batch, columns_R, ttt_steps, attention)
    targets = HeadTargets(
        model.verifier_norm(batch.last_hidden_TH), model.verifier_lm_head.weight, *model.target_transform
    )
    step_N, row_N = counts_SR.nonzero().unbind(1)
    losses = row_losses(
        torch.stack(steps)[step_N, row_N],
        model.lm_head.weight,
        targets,
        columns_R[row_N] + step_N,
        choose_loss_config(loss_config, loss_fn, default="kl_div"),
    )
    loss, metrics = reduce(losses, counts_SR, step_N, row_N, ttt_step_loss_decay)
    drafts_ST = torch.full((ttt_steps, len(batch.token_ids_T)), -1, device=input_ids.device)
    drafts_ST[step_N, columns_R[row_N]] = losses.draft_ids_N
    return [padded(drafts_T, input_ids) for drafts_T in drafts_ST], loss, metrics


def reduce(
    losses: RowLosses, counts_SR: Tensor, step_N: Tensor, row_N: Tensor, decay: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Steps are averaged over their own supervised columns and added, step s weighted by decay ** s."""
    num_steps, counts_S = len(counts_SR), counts_SR.sum(1)

    def step_means(loss_N: Tensor) -> Tensor:
        return loss_N.new_zeros(num_steps).index_add(0, step_N, loss_N) / (counts_S + MASK_EPSILON)

    step_loss_S = step_means(losses.loss_N)
    decay_S = decay ** torch.arange(num_steps, device=step_N.device, dtype=step_loss_S.dtype)
    loss = (step_loss_S * decay_S).sum()

    metrics = {"loss": loss.detach(), **counted("loss", loss.detach(), 1.0)}
    term_S = {f"{name}_loss": step_means(term_N) for name, term_N in losses.terms.items()}
    correct_SR = torch.zeros_like(counts_SR)
    correct_SR[step_N, row_N] = losses.correct_N
    for s in range(num_steps):
        metrics |= counted(f"loss_{s}", step_loss_S[s], 1.0)
        if len(term_S) > 1:
            for name, values in term_S.items():
                metrics |= counted(f"{name}_{s}", values[s], 1.0)
    return loss, metrics | step_accuracy(counts_SR, correct_SR)
