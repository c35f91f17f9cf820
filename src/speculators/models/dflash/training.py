"""Trains DFlash: blocks of masked slots at sampled anchors, all filled in one forward, the tokens before them true.

Shapes: T columns of the packed row, P blocks, S slots per block, N supervised slots, C context columns, H hidden size,
V draft vocabulary.

    column     0   1   2   3   4   5   6   7          anchor p = 3, S = 4
    token      x0  x1  x2  x3  x4  x5  x6  x7
    slot                   0   1   2   3              tokens [x3, mask, mask, mask], positions 3 4 5 6
    drafts                 .   x4  x5  x6             slot k is taught P(x[p+k]), made of state y[p+k-1]
    sample_from_anchor     x4  x5  x6  x7             slot k is taught P(x[p+k+1]), made of state y[p+k]

A slot is supervised if column p + k is and neither it nor its target is of another document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from speculators.interfaces import LossOutput, PackedBatch, Ratio
from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.metrics import ratio
from speculators.losses.registry import MASK_EPSILON, LossConfig, dflash_loss_decay, dpace_loss_decay
from speculators.model_training import LossArgs
from speculators.models.dflash.block_attention import BlockLayout, ContextKV, block_attention
from speculators.models.dflash.config import DPACE, FIXED_DECAY, DFlashTrainingArgs
from speculators.models.dflash.network import DFlashNetwork
from speculators.models.supervision import VerifierHead, compute_accepted_length_counts
from speculators.nn.flops import head_flop, layer_flop, product_flop, targets_flop
from speculators.nn.packed_row import document_starts, drawn
from speculators.nn.routes import Route

Own = TypeVar("Own", bound=DFlashTrainingArgs)


@dataclass(frozen=True)
class BlockArgs(LossArgs[Own]):
    """Of drafters that fill blocks; `max_anchors` is known here."""

    max_anchors: int
    block_size: int


def check_weighting(own: DFlashTrainingArgs, loss_config: LossConfig) -> None:
    if own.per_position_loss_weight == DPACE and list(loss_config) != ["ce"]:
        raise ValueError(
            f"per_position_loss_weight='dpace' takes the loss for -log of the chance to be right, which only ce is: "
            f"with {sorted(loss_config)} use --per-position-loss-weight {FIXED_DECAY}, or --loss-fn ce"
        )


def train_blocks(
    network: DFlashNetwork, batch: PackedBatch, verifier: VerifierHead, args: BlockArgs[DFlashTrainingArgs]
) -> LossOutput:
    """Loss of the supervised slots of sampled blocks."""
    output = fill_sampled_blocks(network, batch, args)
    assert batch.last_hidden_TH is not None
    targets = verifier.targets(batch.last_hidden_TH)
    losses = row_losses(
        output.hidden_NH, network.lm_head.weight, targets, output.blocks.target_index_N, args.loss_config
    )
    flop = blocks_flop(network, batch, output.blocks, verifier) + head_flop(network.lm_head.weight, len(losses.loss_N))
    return LossOutput(*reduce(losses, output.blocks, args), model_flop=flop)


def blocks_flop(network: DFlashNetwork, batch: PackedBatch, blocks: Blocks, verifier: VerifierHead) -> int:
    """Model FLOPs up to the head, and of the targets. Every column is context, and blocks are computed whole."""
    num_columns, num_slots = int((batch.host_document_ids_T != -1).sum()), blocks.columns_PS.numel()
    total = product_flop(network.fc.weight, num_columns, input_learns=False)
    for layer, layer_mask in zip(network.layers, network.layer_masks, strict=True):
        visible_R = blocks.host_layout.ranges(layer_mask, num_columns).num_visible
        num_pairs, num_keys = int(visible_R.sum()), num_columns + num_slots
        total += layer_flop(layer, num_queries=num_slots, num_keys=num_keys, num_pairs=num_pairs)
    return total + targets_flop(verifier.lm_head.weight, blocks.target_index_N)


@dataclass(frozen=True)
class BlockOutput:
    """A training forward up to the head."""

    batch: PackedBatch
    blocks: Blocks
    hidden_PSH: Tensor

    @property
    def hidden_NH(self) -> Tensor:
        return self.blocks.supervised(self.hidden_PSH)


def fill_sampled_blocks(network: DFlashNetwork, batch: PackedBatch, args: BlockArgs) -> BlockOutput:
    blocks = choose_blocks(batch, args.block_size, network.first_slot, args.max_anchors, args.generator)
    return fill_blocks(network, batch, blocks, args.attention)


def fill_blocks(network: DFlashNetwork, batch: PackedBatch, blocks: Blocks, attention: Route) -> BlockOutput:
    assert batch.aux_TD is not None
    context_CH = network.context(batch.aux_TD)
    context_rope = network.rope.at(batch.position_ids_T, torch.float32)
    layer_attention = []
    for layer, layer_mask in zip(network.layers, network.layer_masks, strict=True):
        key_1CGd, value_1CGd = layer.project_context(context_CH[None], context_rope)
        context = ContextKV(key_1CGd[0], value_1CGd[0])
        layer_attention.append(block_attention(attention, blocks.layout, layer_mask, context))
    token_ids_PS = network.blocks(batch.token_ids_T[blocks.anchors_P], blocks.layout.block_size)
    rope = network.rope.at(blocks.positions_PS(batch), torch.float32)
    return BlockOutput(batch, blocks, network.forward(token_ids_PS, rope, layer_attention))


def drafts_logits(network: DFlashNetwork, output: BlockOutput) -> Tensor:
    """[S, D] of the slots of a single block."""
    return network.lm_head(output.hidden_PSH[0])


# -- from losses per slot to one loss ----------------------------------------------------------------------------------


def fixed_weights(blocks: Blocks, own: DFlashTrainingArgs) -> Tensor | None:
    """[P, S] weights that do not depend on the losses, if they do not."""
    if own.per_position_loss_weight != FIXED_DECAY:
        return None
    return dflash_loss_decay(blocks.slot_index_PS, own.dflash_decay_gamma, blocks.first_slot == 0)


def slot_weights(blocks: Blocks, own: DFlashTrainingArgs, loss_PS: Tensor) -> Tensor:
    """[P, S]; never carries gradient."""
    fixed_PS = fixed_weights(blocks, own)
    if fixed_PS is not None:
        return fixed_PS
    weights = dpace_loss_decay(
        blocks.slot_index_PS.flatten(),
        blocks.supervised_PS.flatten(),
        blocks.layout.block_size,
        own.dpace_alpha,
        loss_PS.detach().flatten(),
    )
    return weights.view_as(loss_PS)


def on_grid(values_N: Tensor, supervised_PS: Tensor) -> Tensor:
    """Values of the supervised slots at their places, zeros elsewhere: [P, S]."""
    return values_N.new_zeros(supervised_PS.shape).masked_scatter(supervised_PS, values_N)


def reduce(losses: RowLosses, blocks: Blocks, args: BlockArgs) -> tuple[Tensor, dict[str, Ratio]]:
    """sum(loss * weight) / (supervised slots + eps); the weights are not in the denominator."""
    supervised_PS = blocks.supervised_PS
    total = supervised_PS.sum() + MASK_EPSILON
    loss_PS = on_grid(losses.loss_N, supervised_PS)
    weight_PS = slot_weights(blocks, args.own, loss_PS)
    loss = ((loss_PS * weight_PS).sum() if losses.total is None else losses.total) / total
    metrics: dict[str, Ratio] = {}
    if len(args.loss_config) > 1:
        for name in args.loss_config:
            term_PS = on_grid(losses.terms[name], supervised_PS)
            metrics[f"{name}_loss"] = ratio((term_PS * weight_PS).sum() / total)
    return loss, metrics | accuracy(losses, blocks)


def accuracy(losses: RowLosses, blocks: Blocks) -> dict[str, Ratio]:
    """Greedy agreement with the verifier: by slot, over all slots, and as tokens per round (`eal`)."""
    supervised_PS = blocks.supervised_PS
    correct_PS = on_grid(losses.correct_N, supervised_PS)
    metrics = {"full_acc": ratio(correct_PS.sum(), supervised_PS.sum())}
    for k in range(blocks.first_slot, blocks.layout.block_size):
        metrics[f"position_{k}_acc"] = ratio(correct_PS[:, k].sum(), supervised_PS[:, k].sum())
    return {**metrics, "eal": mean_length(correct_PS.float(), blocks)}


def mean_length(kept_PS: Tensor, blocks: Blocks) -> Ratio:
    """Mean over the blocks with a supervised slot of 1 + sum_k prod_{j <= k} kept_j; the bonus token is the 1."""
    drafts = slice(blocks.first_slot, None)
    return ratio(*compute_accepted_length_counts(kept_PS[:, drafts], blocks.supervised_PS[:, drafts]))


@dataclass(frozen=True)
class Blocks:
    """The blocks of one training forward."""

    layout: BlockLayout
    columns_PS: Tensor
    """Column of the packed row that each slot stands at."""
    supervised_PS: Tensor
    """bool: the slot is compared with the verifier."""
    first_slot: int
    place_N: Tensor
    """Which of the P * S slots are supervised."""
    target_index_N: Tensor
    """Column whose last state made the distribution that each of them is taught; on the host."""
    host_layout: BlockLayout

    @classmethod
    def at(
        cls, batch: PackedBatch, anchors_P: Tensor, supervised_PS: Tensor, block_size: int, first_slot: int
    ) -> Blocks:
        """`anchors_P`, `supervised_PS`: on the host, where all is chosen that takes values."""
        columns_PS, device = slot_columns(anchors_P, block_size), batch.token_ids_T.device
        place_N = supervised_PS.flatten().nonzero().squeeze(1)
        target_index_N = (columns_PS.flatten()[place_N] - first_slot).clamp_min(0)
        starts_P = document_starts(batch.host_document_ids_T)[anchors_P]
        host_layout = BlockLayout(anchors_P, starts_P, block_size)
        chosen = (anchors_P, starts_P, columns_PS, supervised_PS, place_N)
        anchors_P, starts_P, *others = (part.to(device, non_blocking=True) for part in chosen)
        columns_PS, supervised_PS, place_N = others
        layout = BlockLayout(anchors_P, starts_P, block_size)
        return cls(layout, columns_PS, supervised_PS, first_slot, place_N, target_index_N, host_layout)

    def supervised(self, values_PS: Tensor) -> Tensor:
        """[N, ...]: those of the supervised slots."""
        return values_PS.flatten(0, 1)[self.place_N]

    @property
    def anchors_P(self) -> Tensor:
        return self.layout.anchors_P

    @property
    def slot_index_PS(self) -> Tensor:
        return torch.arange(self.layout.block_size, device=self.columns_PS.device).expand_as(self.columns_PS)

    @property
    def target_index_PS(self) -> Tensor:
        """Column whose last state made the distribution a slot is taught. Means nothing where it is not supervised."""
        return (self.columns_PS - self.first_slot).clamp_min(0)

    def positions_PS(self, batch: PackedBatch) -> Tensor:
        return batch.position_ids_T[self.anchors_P, None] + self.slot_index_PS

    def previous_tokens_PS(self, batch: PackedBatch) -> Tensor:
        """The true token before the one a slot drafts."""
        return batch.token_ids_T[self.target_index_PS.clamp_max(len(batch.token_ids_T) - 1)]


def choose_blocks(
    batch: PackedBatch, block_size: int, first_slot: int, max_anchors: int, generator: torch.Generator | None
) -> Blocks:
    """Blocks of at most `max_anchors` supervised columns, drawn without replacement and sorted. A column whose block
    has nothing to teach is not drawn. The last `block_size` columns of the row, padding included, are no anchors."""
    may_anchor_T = batch.host_supervised_T.clone()
    may_anchor_T[max(0, batch.row_length - block_size) :] = False
    anchors_P = may_anchor_T.nonzero().squeeze(1)
    anchors_P = anchors_P[supervised_slots(batch, anchors_P, block_size, first_slot).any(1)]
    anchors_P = drawn(anchors_P, max_anchors, generator)
    if len(anchors_P) == 0:  # nothing is supervised: one block keeps the graph and gives loss 0
        anchors_P = anchors_P.new_zeros(1)
    supervised_PS = supervised_slots(batch, anchors_P, block_size, first_slot)
    return Blocks.at(batch, anchors_P, supervised_PS, block_size, first_slot)


def last_block(batch: PackedBatch, num_drafts: int, first_slot: int) -> Blocks:
    """The block whose slots draft the last K tokens of the row; as many slots as that takes."""
    anchors_P = torch.tensor([len(batch.token_ids_T) - num_drafts - 1])
    block_size = num_drafts + first_slot
    return Blocks.at(batch, anchors_P, torch.ones(1, block_size, dtype=torch.bool), block_size, first_slot)


def slot_columns(anchors_P: Tensor, block_size: int) -> Tensor:
    return anchors_P[:, None] + torch.arange(block_size, device=anchors_P.device)


def supervised_slots(batch: PackedBatch, anchors_P: Tensor, block_size: int, first_slot: int) -> Tensor:
    """bool [P, S], on the host"""
    documents_T, supervised_T = batch.host_document_ids_T, batch.host_supervised_T
    length = len(documents_T)
    columns_PS = slot_columns(anchors_P, block_size)
    drafted_PS = columns_PS + 1 - first_slot
    within = drafted_PS.clamp_max(length - 1)
    documents_P1 = documents_T[anchors_P, None]
    # the drafted column is never left of the slot, and documents are contiguous: one comparison guards both
    supervised_PS = supervised_T[columns_PS.clamp_max(length - 1)]
    supervised_PS &= documents_T[within] == documents_P1
    supervised_PS &= (drafted_PS < length) & (documents_P1 != -1)
    supervised_PS[:, :first_slot] = False
    return supervised_PS
