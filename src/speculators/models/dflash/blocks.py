"""Choosing what to train on in a packed row: anchors, the blocks that hang on them, the slots that are supervised.

Shapes: T columns of the packed row, P blocks, S slots a block.

    column     0   1   2   3   4   5   6   7          anchor p = 3, S = 4
    token      x0  x1  x2  x3  x4  x5  x6  x7
    slot                   0   1   2   3              tokens [x3, mask, mask, mask], positions 3 4 5 6
    drafts                 .   x4  x5  x6             slot k is taught P(x[p+k]), made of state y[p+k-1]
    sample_from_anchor     x4  x5  x6  x7             slot k is taught P(x[p+k+1]), made of state y[p+k]

A slot is supervised if column p + k is and neither it nor its target is of another document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.interfaces import PackedBatch
from speculators.models.dflash.block_attention import BlockLayout
from speculators.nn.masks import document_starts


@dataclass(frozen=True)
class Blocks:
    """The blocks of one training forward."""

    layout: BlockLayout
    columns_PS: Tensor
    """Column of the packed row that each slot stands at."""
    supervised_PS: Tensor
    """bool: the slot is compared with the verifier."""
    first_slot: int

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

    @property
    def target_index_N(self) -> Tensor:
        return self.target_index_PS[self.supervised_PS]

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
    may_anchor_T = batch.supervised_T.clone()
    may_anchor_T[max(0, batch.row_length - block_size) :] = False
    anchors_P = may_anchor_T.nonzero().squeeze(1)
    anchors_P = anchors_P[supervised_slots(batch, anchors_P, block_size, first_slot).any(1)]
    if len(anchors_P) > max_anchors:  # drawn on the host, so that every device trains on the same anchors
        drawn = torch.randperm(len(anchors_P), generator=generator)[:max_anchors].sort().values
        anchors_P = anchors_P[drawn.to(anchors_P.device)]
    if len(anchors_P) == 0:  # nothing is supervised: one block keeps the graph and gives loss 0
        anchors_P = anchors_P.new_zeros(1)
    layout = BlockLayout(anchors_P, document_starts(batch.document_ids_T)[anchors_P], block_size)
    supervised_PS = supervised_slots(batch, anchors_P, block_size, first_slot)
    return Blocks(layout, slot_columns(anchors_P, block_size), supervised_PS, first_slot)


def last_block(batch: PackedBatch, num_drafts: int, first_slot: int) -> Blocks:
    """The block whose slots draft the last K tokens of the row; as many slots as that takes."""
    anchors_P = batch.token_ids_T.new_tensor([len(batch.token_ids_T) - num_drafts - 1])
    block_size = num_drafts + first_slot
    layout = BlockLayout(anchors_P, document_starts(batch.document_ids_T)[anchors_P], block_size)
    columns_PS = slot_columns(anchors_P, block_size)
    return Blocks(layout, columns_PS, torch.ones_like(columns_PS, dtype=torch.bool), first_slot)


def slot_columns(anchors_P: Tensor, block_size: int) -> Tensor:
    return anchors_P[:, None] + torch.arange(block_size, device=anchors_P.device)


def supervised_slots(batch: PackedBatch, anchors_P: Tensor, block_size: int, first_slot: int) -> Tensor:
    length = len(batch.token_ids_T)
    columns_PS = slot_columns(anchors_P, block_size)
    drafted_PS = columns_PS + 1 - first_slot
    within = drafted_PS.clamp_max(length - 1)
    documents_P1 = batch.document_ids_T[anchors_P, None]
    # the drafted column is never left of the slot, and documents are contiguous: one comparison guards both
    supervised_PS = batch.supervised_T[columns_PS.clamp_max(length - 1)]
    supervised_PS &= batch.document_ids_T[within] == documents_P1
    supervised_PS &= (drafted_PS < length) & (documents_P1 != -1)
    supervised_PS[:, :first_slot] = False
    return supervised_PS
