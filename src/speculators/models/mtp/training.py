"""How an MTP layer learns: run over its own states, the tokens are the true ones (teacher forcing).

Shapes: B rows (1 when packed), S columns, K steps, L = S - K - 1 columns that take part, N supervised (step, column)
pairs, H hidden size, V vocabulary.

    token      x0   x1   x2   x3   x4       nothing is shifted: column t holds token x[t] and state y[t]
    state      y0   y1   y2   y3   y4       f[t] = the verifier's final norm of y[t] (MiMo: y[t])

    step 0 at column t   reads x[t+1] and f[t]                      is taught x[t+2]
    step k at column t   reads x[t+1+k] and the state of step k-1   is taught x[t+2+k]
                         stands at position t + k, sees the states of step k at columns up to t of its document

Step k counts at column t if column t+2+k is supervised and of the same document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.chunks import HeadTargets, Targets, TokenTargets
from speculators.losses.metrics import counted
from speculators.losses.registry import LossConfig, resolve_loss_config
from speculators.models.draft_layers import attention_of
from speculators.models.last_state_training import HARD_LABELS, align
from speculators.models.mtp.arguments import MTPTrainingArgs
from speculators.models.mtp.network import MTPNetwork
from speculators.models.unrolled_steps import step_accuracy
from speculators.nn.masks import PackedRow
from speculators.nn.unrolled import unrolled_attention

if TYPE_CHECKING:
    from speculators.models.mtp.core import MTPDraftModel

NUM_STEPS = MTPTrainingArgs.model_fields["num_speculative_steps"].default
STEP_WEIGHT_BETA = MTPTrainingArgs.model_fields["step_weight_beta"].default
shift_batch_mtp = align
"""The contract's name for it in this algorithm."""


def compute_step_weights(beta: float = STEP_WEIGHT_BETA, num_steps: int = NUM_STEPS) -> list[float]:
    """beta ** k, scaled to add up to 1."""
    weights = [beta**k for k in range(num_steps)]
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Columns:
    """The columns that take part, of all rows end to end: as many as hold a document, at most L a row."""

    num_steps: int
    token_ids_BS: Tensor
    documents_BS: Tensor
    """Document of each column, distinct between rows, -1 = padding."""
    positions_BS: Tensor
    loss_mask_BS: Tensor
    num_columns: int
    """Of each row."""

    @classmethod
    def of(
        cls, input_ids: Tensor, documents: Tensor, positions: Tensor, loss_mask: Tensor | None, num_steps: int
    ) -> Columns | None:
        """None when rows are too short for a single step."""
        num_rows, length = input_ids.shape
        num_steps = min(num_steps, length - 2)
        num_columns = length - num_steps - 1
        if num_steps < 1 or num_columns < 1:
            return None
        real = (documents != -1).any(0).nonzero()
        num_columns = min(num_columns, max(1, int(real[-1]) + 1 if len(real) else 1))
        rows_B1 = torch.arange(num_rows, device=input_ids.device)[:, None]
        distinct = torch.where(documents == -1, -1, documents + rows_B1 * (documents.max() + 1))
        mask = torch.ones_like(input_ids) if loss_mask is None else loss_mask
        return cls(num_steps, input_ids, distinct, positions, mask, num_columns)

    def at(self, values_BS: Tensor, shift: int) -> Tensor:
        """[B, columns]: what lies `shift` columns further right."""
        return values_BS[:, shift : shift + self.num_columns]

    def flat(self, values_BS: Tensor, shift: int) -> Tensor:
        """[1, B * columns]"""
        return self.at(values_BS, shift).reshape(1, -1)

    def counts_at(self, step: int) -> Tensor:
        """bool [B, columns]"""
        document, target = self.at(self.documents_BS, 0), self.at(self.documents_BS, step + 2)
        return (document == target) & (document != -1) & self.at(self.loss_mask_BS, step + 2).bool()

    def target_columns(self, row_N: Tensor, step_N: Tensor) -> Tensor:
        """Index of x[t+2+k] among all columns of all rows."""
        row, column = row_N // self.num_columns, row_N % self.num_columns
        return row * self.token_ids_BS.shape[1] + column + step_N + 2


def unroll(
    network: MTPNetwork, columns: Columns, hidden_BSH: Tensor, attention: str | None, *, as_served: bool = False
) -> list[Tensor]:
    """What the head reads at each step: [B * columns, H] a step. Steps of training have keys of their own; a layer
    that is served sees the keys of step 0 and, after them, those of the tokens it drafted."""
    documents_R = columns.flat(columns.documents_BS, 0)[0]
    hidden = columns.at(hidden_BSH, 0).reshape(1, -1, hidden_BSH.shape[-1])
    out: list[Tensor] = []
    for k in range(columns.num_steps):
        positions = columns.flat(columns.positions_BS, 0) + k
        if k == 0 or not as_served:
            layer_attention = unrolled_attention(attention, PackedRow(documents_R), [None])
        rope = network.rope.at(positions[0], torch.float32)
        tokens = network.tokens_at(columns.flat(columns.token_ids_BS, k + 1), positions)
        normed, hidden = network.step(tokens, hidden, rope, layer_attention)
        out.append(normed[0])
    return out


def drafts_read(model: MTPDraftModel, input_ids: Tensor, hidden_states: Tensor, num_drafts: int) -> Tensor:
    """What the head reads in the places of the last K tokens: [K, H]. The first is a step of training; the others are
    that step continued as engines serve it."""
    nested, network = model.config.transformer_layer_config, model.network
    positions = positions_of(input_ids, None, nested.model_type)
    columns = Columns.of(input_ids, torch.zeros_like(input_ids), positions, None, num_drafts)
    assert columns is not None and columns.num_steps == num_drafts, "a draft needs two tokens before it"
    attention = attention_of(model.config)
    steps = unroll(network, columns, network.combine(hidden_states), attention, as_served=True)
    return torch.stack([normed_RH[-1] for normed_RH in steps])


def documents_of(
    input_ids: Tensor, document_ids: Tensor | None, attention_mask: Tensor | None, positions: Tensor
) -> Tensor:
    """Document of each column. Without `document_ids` a new one starts wherever positions do not go on."""
    if document_ids is None:
        starts = torch.ones_like(input_ids, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        document_ids = starts.long().cumsum(1) - 1
    if attention_mask is not None and attention_mask.ndim == 2:
        document_ids = document_ids.masked_fill(attention_mask == 0, -1)
    return document_ids


def positions_of(input_ids: Tensor, position_ids: Tensor | None, model_type: str) -> Tensor:
    if position_ids is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    if position_ids.ndim == 3:  # (3, B, S): time, height, width; all the same for text
        if not model_type.startswith("qwen3_5"):
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}; {model_type} has one position a token: [B, S]"
            )
        return position_ids[0]
    return position_ids.expand(input_ids.shape)


def train_forward(
    model: MTPDraftModel,
    input_ids: Tensor,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    loss_mask: Tensor | None,
    document_ids: Tensor | None,
    *,
    step_weights: Sequence[float] | None = None,
    loss_config: LossConfig | None = None,
    return_logits: bool = True,
    **_: Any,
) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    num_steps = model.config.num_speculative_steps
    weights = compute_step_weights(num_steps=num_steps) if step_weights is None else list(step_weights)
    if len(weights) != num_steps:
        raise ValueError(
            f"step_weights has {len(weights)} entries for num_speculative_steps={num_steps}; give one for each step"
        )
    nested = model.config.transformer_layer_config
    positions = positions_of(input_ids, position_ids, nested.model_type)
    documents = documents_of(input_ids, document_ids, attention_mask, positions)
    columns = Columns.of(input_ids, documents, positions, loss_mask, num_steps)
    if columns is None:
        nothing = model.network.layer.input_proj.weight.sum() * 0.0
        return [], nothing, {"loss": nothing.detach(), **counted("loss", 0.0, 1.0)}
    if hidden_states.shape[-1] == 0:  # a batch of which no sample could be had
        hidden_states = hidden_states.new_zeros(*input_ids.shape, nested.hidden_size)

    network = model.network
    steps = unroll(network, columns, network.combine(hidden_states), attention_of(model.config))
    counts_KR = torch.stack([columns.counts_at(k).flatten() for k in range(columns.num_steps)])
    step_N, row_N = counts_KR.nonzero().unbind(1)
    config = loss_config or resolve_loss_config(HARD_LABELS)
    targets, index_N = targets_of(model, config, hidden_states, input_ids, columns.target_columns(row_N, step_N))
    losses = row_losses(torch.stack(steps)[step_N, row_N], model.lm_head.weight, targets, index_N, config)
    loss, metrics = reduce(losses, counts_KR, step_N, row_N, weights)
    if not bool(counts_KR.any()):
        loss = loss + sum(step.sum() for step in steps) * 0.0  # keeps the graph
    logits = full_logits(model, steps, input_ids.shape, num_steps) if return_logits else []
    return logits, loss, metrics


def targets_of(
    model: MTPDraftModel, config: LossConfig, hidden_states: Tensor, input_ids: Tensor, target_N: Tensor
) -> tuple[Targets, Tensor]:
    """(targets, which of them each pair is taught): the data's tokens, or the distributions of the verifier's states
    one column to the left of them."""
    if set(config) == {HARD_LABELS}:
        return TokenTargets(input_ids.flatten()), target_N
    normed_BSH = model.verifier_norm(hidden_states)
    return HeadTargets(normed_BSH.flatten(0, 1), model.lm_head.weight, *model.target_transform), target_N - 1


def full_logits(model: MTPDraftModel, steps: list[Tensor], shape: torch.Size, num_steps: int) -> list[Tensor]:
    """[B, L, V] a step; zeros in columns behind the last document. For callers that ask; training never holds them."""
    num_rows, length = shape
    num_columns = length - min(num_steps, length - 2) - 1
    out = []
    for hidden_RH in steps:
        hidden = hidden_RH.unflatten(0, (num_rows, -1))
        out.append(model.lm_head(F.pad(hidden, (0, 0, 0, num_columns - hidden.shape[1]))))
    return out


def reduce(
    losses: RowLosses, counts_KR: Tensor, step_N: Tensor, row_N: Tensor, weights: list[float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each step is averaged over its own supervised columns and weighted; steps are added."""
    num_steps = len(counts_KR)
    counts_K = counts_KR.sum(1)
    sums_K = losses.loss_N.new_zeros(num_steps).index_add(0, step_N, losses.loss_N)
    weight_K = torch.tensor(weights[:num_steps], dtype=sums_K.dtype, device=sums_K.device)
    step_loss_K = weight_K * sums_K / counts_K.clamp_min(1)
    loss = step_loss_K.sum()

    metrics = {"loss": loss.detach(), **counted("loss", loss.detach(), 1.0)}
    correct_KR = torch.zeros_like(counts_KR)
    correct_KR[step_N, row_N] = losses.correct_N
    metrics |= {f"loss_step_{k}": step_loss_K[k].detach() for k in range(num_steps)}
    return loss, metrics | step_accuracy(counts_KR, correct_KR)
