"""Attention of blocks of slots over a packed context, where each block sees its own piece of it.

Shapes: T context columns (packed documents), P blocks, S slots per block, N query heads, G key/value heads, d head
size.

    column          0  1  2  3  4  5  6         block of anchor 4: slots stand at 4, 5, 6, ..
    document        a  a  b  b  b  b  b         and see columns 2, 3 (before the anchor, same document) and each other
    anchor                      ^

Slot s of the block anchored at column p, at position p + s, sees

    context column t     first column of the document <= t < p     (window: t > p + s - W)
    slot s' of its block any s', or s' <= s in a causal layer      (window: |s - s'| < W)

The window is counted from the slot itself, as serving engines count it. A block sees itself, so no row is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from speculators.nn.attention import GROUP_ROWS, Group, GroupedAttention, dense_attention, sdpa_attention
from speculators.nn.packed_row import document_starts
from speculators.nn.routes import DENSE, SDPA, FlexMask, Kernel, KeyRanges, Route, flex


class LayerMask(NamedTuple):
    """The attention mask of one layer."""

    window: int | None
    """Number of keys that a slot sees, itself included; None = all."""
    causal: bool
    """A slot sees no later slot of its block."""


class ContextKV(NamedTuple):
    """Keys and values of the context in one layer."""

    key_TGd: Tensor
    value_TGd: Tensor


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of a packed row and the columns they are anchored at."""

    anchors_P: Tensor
    """Ascending columns."""
    starts_P: Tensor
    """First column of each anchor's document."""
    block_size: int
    flex_masks: dict[tuple[LayerMask, int], FlexMask] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def on_host(self) -> tuple[list[int], list[int]]:
        anchors, starts = torch.stack((self.anchors_P, self.starts_P)).tolist()
        return anchors, starts

    def flex_mask(self, layer_mask: LayerMask, num_columns: int) -> FlexMask:
        """Of [columns | slots of all blocks], made once per row for all layers of a kind."""
        key = (layer_mask, num_columns)
        if key not in self.flex_masks:
            ranges = self.ranges(layer_mask, num_columns)
            num_slots = ranges.low_2R.shape[1]
            self.flex_masks[key] = FlexMask.of(ranges, num_columns + num_slots)
        return self.flex_masks[key]

    def ranges(self, layer_mask: LayerMask, num_columns: int) -> KeyRanges:
        """What each slot sees: context columns, then slots of its block."""
        anchors_P1, starts_P1, size = self.anchors_P[:, None], self.starts_P[:, None], self.block_size
        slots_S = torch.arange(size, device=anchors_P1.device)
        first_P1 = num_columns + size * torch.arange(len(anchors_P1), device=anchors_P1.device)[:, None]
        low_PS, high_PS = starts_P1.expand(-1, size), anchors_P1.expand(-1, size)
        own_low_S = torch.zeros_like(slots_S)
        own_high_S = slots_S + 1 if layer_mask.causal else torch.full_like(slots_S, size)
        if layer_mask.window is not None:
            low_PS = low_PS.maximum(anchors_P1 + slots_S + (1 - layer_mask.window))
            own_low_S = (slots_S + (1 - layer_mask.window)).clamp_min(0)
            own_high_S = own_high_S.minimum(slots_S + layer_mask.window)
        low = torch.stack((low_PS, first_P1 + own_low_S))
        return KeyRanges(low.flatten(1), torch.stack((high_PS, first_P1 + own_high_S)).flatten(1))

    def groups(self, window: int | None) -> list[Group]:
        """Groups neighbouring whole blocks of one document; the rows of a group are slots."""
        anchors, starts = self.on_host
        most = max(1, GROUP_ROWS // self.block_size)
        groups: list[Group] = []
        first = 0
        for i in range(1, len(anchors) + 1):
            if i < len(anchors) and starts[i] == starts[first] and i - first < most:
                continue
            low = starts[first] if window is None else max(starts[first], anchors[first] - window + 1)
            high = anchors[i - 1]
            groups.append(Group(first * self.block_size, i * self.block_size, min(low, high), high))
            first = i
        return groups

    def sees_context(self, blocks: slice, low: int, high: int, window: int | None) -> Tensor:
        """Visibility of context columns, bool [P', S, high - low], for some of the blocks."""
        anchors_P11 = self.anchors_P[blocks, None, None]
        columns = torch.arange(low, high, device=self.anchors_P.device)
        seen = (columns >= self.starts_P[blocks, None, None]) & (columns < anchors_P11)
        if window is not None:
            slots_S1 = torch.arange(self.block_size, device=columns.device)[:, None]
            return seen & (columns > anchors_P11 + slots_S1 - window)
        return seen.expand(-1, self.block_size, -1)

    def sees_slots(self, layer_mask: LayerMask) -> Tensor:
        """Visibility of slots, bool [S, S], the same for every block."""
        slots = torch.arange(self.block_size, device=self.anchors_P.device)
        ahead_SS = slots[None, :] - slots[:, None]
        seen = ahead_SS <= 0 if layer_mask.causal else torch.ones_like(ahead_SS, dtype=torch.bool)
        return seen if layer_mask.window is None else seen & (ahead_SS.abs() < layer_mask.window)

    def visible(self, group: Group, layer_mask: LayerMask) -> Tensor:
        """bool [rows, columns + rows] of a group's slots over its context columns and its own slots."""
        blocks = slice(group.first // self.block_size, group.last // self.block_size)
        context = self.sees_context(blocks, group.low, group.high, layer_mask.window)
        own_block = torch.eye(len(context), dtype=torch.bool, device=context.device)
        slots = torch.kron(own_block, self.sees_slots(layer_mask))
        return torch.cat((context.flatten(0, 1), slots), dim=1)


def create_anchor_block_mask_mod(
    document_ids: Tensor,
    total_seq_len: int,
    anchor_positions: Tensor,
    block_size: int,
    sliding_window: int | None = None,
    sliding_window_non_causal: bool | None = None,
) -> tuple[Callable[..., Tensor], int, int]:
    """Returns (mask_mod, number of queries, number of keys) of blocks at `anchor_positions` [P] over [columns | slots].

    `document_ids` [T]: document of each column, -1 = padding. The window is counted from the slot, as above: upstream
    counts that of the context from the anchor, `sliding_window` columns for every slot. Raises `ValueError` for
    anchors of another shape, or as many documents as there are no columns.
    """
    documents_T = document_ids.flatten()
    if anchor_positions.ndim != 1 or len(documents_T) != total_seq_len:
        raise ValueError(
            f"anchor_positions {tuple(anchor_positions.shape)} must be [P], document_ids {tuple(document_ids.shape)} "
            f"have total_seq_len={total_seq_len} columns"
        )
    anchors_P = anchor_positions.to(document_ids.device, torch.int64)
    starts_P = document_starts(documents_T)[anchors_P].where(documents_T[anchors_P] != -1, anchors_P)
    is_causal = sliding_window is not None and not sliding_window_non_causal
    layout = BlockLayout(anchors_P, starts_P, block_size)
    low_2R, high_2R = layout.ranges(LayerMask(sliding_window, is_causal), total_seq_len)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_context = (key >= low_2R[0][query]) & (key < high_2R[0][query])
        return in_context | ((key >= low_2R[1][query]) & (key < high_2R[1][query]))

    num_slots = low_2R.shape[1]
    return mask_mod, num_slots, total_seq_len + num_slots


class DenseBlockAttention:
    """Reference: all context columns and all slots of all blocks side by side under a dense mask."""

    def __init__(self, layout: BlockLayout, layer_mask: LayerMask, context: ContextKV):
        self.layout, self.layer_mask, self.context = layout, layer_mask, context

    def __call__(self, query_PSNd: Tensor, key_PSGd: Tensor, value_PSGd: Tensor) -> Tensor:
        layout, (context_key, context_value) = self.layout, self.context
        everything = Group(0, len(layout.anchors_P) * layout.block_size, 0, len(context_key))
        keys = torch.cat((context_key, key_PSGd.flatten(0, 1)))[None]
        values = torch.cat((context_value, value_PSGd.flatten(0, 1)))[None]
        out = self.attention(query_PSNd.flatten(0, 1)[None], keys, values, layout.visible(everything, self.layer_mask))
        return out.view_as(query_PSNd)

    def select_queries(self, hidden_PSH: Tensor) -> Tensor:
        return hidden_PSH

    attention = staticmethod(dense_attention)


class SdpaBlockAttention(DenseBlockAttention):
    """The same mask through `scaled_dot_product_attention`: any device, memory of the mask only."""

    attention = staticmethod(sdpa_attention)


class GroupedBlockAttention(DenseBlockAttention):
    """The fast route on a CPU: one flash call per group of neighbouring blocks, over the columns they see."""

    def __call__(self, query_PSNd: Tensor, key_PSGd: Tensor, value_PSGd: Tensor) -> Tensor:
        slots = (x.flatten(0, 1) for x in (query_PSNd, key_PSGd, value_PSGd))
        visible = partial(self.layout.visible, layer_mask=self.layer_mask)
        out = GroupedAttention.apply(self.layout.groups(self.layer_mask.window), visible, *slots, *self.context)
        return out.view(query_PSNd.shape)


class FlexBlockAttention(DenseBlockAttention):
    """The fast route on a GPU: block-sparse flex attention."""

    def __init__(self, layout: BlockLayout, layer_mask: LayerMask, context: ContextKV, *, kernel: Kernel):
        super().__init__(layout, layer_mask, context)
        self.kernel = kernel

    def __call__(self, query_PSNd: Tensor, key_PSGd: Tensor, value_PSGd: Tensor) -> Tensor:
        keys, values = (
            torch.cat((context, blocks.flatten(0, 1)))[None]
            for context, blocks in zip(self.context, (key_PSGd, value_PSGd), strict=True)
        )
        mask = self.layout.flex_mask(self.layer_mask, len(self.context.key_TGd))
        out, _ = flex(self.kernel, query_PSNd.flatten(0, 1)[None], keys, values, mask)
        return out[0].transpose(0, 1).reshape(query_PSNd.shape)


def block_attention(
    route: Route, layout: BlockLayout, layer_mask: LayerMask, context: ContextKV
) -> DenseBlockAttention:
    """The function of one layer."""
    if route.kernel is not None:
        return FlexBlockAttention(layout, layer_mask, context, kernel=route.kernel)
    kind: type[DenseBlockAttention] = GroupedBlockAttention
    if route in (DENSE, SDPA):
        kind = DenseBlockAttention if route is DENSE else SdpaBlockAttention
    return kind(layout, layer_mask, context)
