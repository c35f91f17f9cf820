"""The P-EAGLE network: EAGLE-3's, what stands in masked slots, and what they attend to. Chains of masked slots hang on
the columns of a packed row; all slots of all chains are computed in one pass.

Shapes: T columns, M slots, E = T + M elements, R query elements, N query heads, G key/value heads, d head size,
D = aux layers * H.

    column            0   1   2   3   4              element = (anchor, depth), at position anchor + depth
    document          a   a   b   b   b              depth 0 is the column itself: its true token and state
    chain of column 2         .   1   2  (depths)    depth d >= 1 is a masked slot

An element (a, d) sees, within its document and its window (distance of positions < W),

    columns           c <= a
    its own chain     (a, d') with 1 <= d' <= d

Depth-0 elements see what a packed causal row sees. Chains may have any length; the elements are the columns in order,
then the slots by anchor and depth, so that the slots of neighbouring anchors share the columns they read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from speculators.models.eagle3.network import Eagle3Network
from speculators.nn.attention import GROUP_ROWS, Group, GroupedAttention, dense_attention, sdpa_attention
from speculators.nn.packed_row import PackedRow, document_starts
from speculators.nn.routes import DENSE, SDPA, FlexMask, Kernel, KeyRanges, Route, flex
from speculators.nn.unrolled import TailAttention


@dataclass(frozen=True)
class PEagleNetwork(Eagle3Network):
    mask_token_id: int
    mask_hidden: Tensor
    """[1, 1, D] in place of verifier states."""


@dataclass(frozen=True)
class ChainLayout:
    """The chains of a packed row and the columns they are anchored at."""

    document_ids_T: Tensor
    anchors_M: Tensor
    """Ascending columns."""
    depths_M: Tensor
    """1, 2, .. within an anchor, without gaps."""
    columns_C: Tensor
    """Query columns of the last layer, ascending; every slot is a query too."""
    flex_masks: dict[tuple[int | None, bool], FlexMask] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def query_elements_R(self) -> Tensor:
        """Query elements of the last layer."""
        num_columns, num_slots = len(self.document_ids_T), len(self.anchors_M)
        slots_M = torch.arange(num_columns, num_columns + num_slots, device=self.columns_C.device)
        return torch.cat((self.columns_C, slots_M))

    @cached_property
    def elements(self) -> tuple[Tensor, Tensor]:
        """(anchor, depth) of every element."""
        columns_T = torch.arange(len(self.document_ids_T), device=self.anchors_M.device)
        return torch.cat((columns_T, self.anchors_M)), torch.cat((torch.zeros_like(columns_T), self.depths_M))

    def sees(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Whether element `query` sees element `key`; the two broadcast. Padding sees only itself: finite."""
        anchors_E, depths_E = self.elements
        anchor_q, anchor_k, depth_q, depth_k = anchors_E[query], anchors_E[key], depths_E[query], depths_E[key]
        document_q, document_k = self.document_ids_T[anchor_q], self.document_ids_T[anchor_k]
        context = (depth_k == 0) & (anchor_k <= anchor_q)
        own_chain = (anchor_k == anchor_q) & (depth_k <= depth_q)
        seen = (document_q == document_k) & (document_q != -1) & (context | own_chain)
        if window is not None:
            seen = seen & (anchor_q + depth_q - anchor_k - depth_k < window)
        return seen | (query == key)

    def flex_mask(self, window: int | None, last_layer: bool) -> FlexMask:
        """Made once per row for all layers of a kind."""
        key = (window, last_layer)
        if key not in self.flex_masks:
            ranges = self.ranges(window)
            if last_layer:
                ranges = KeyRanges(*(part[:, self.query_elements_R] for part in ranges))
            self.flex_masks[key] = FlexMask.of(ranges, len(self.elements[0]))
        return self.flex_masks[key]

    def ranges(self, window: int | None) -> KeyRanges:
        """What `sees` says, as two ranges of keys: columns, then slots of the own chain, which lie side by side."""
        anchors_E, depths_E = self.elements
        index_E = torch.arange(len(anchors_E), device=anchors_E.device)
        low_E, own_low_E = document_starts(self.document_ids_T)[anchors_E], index_E - depths_E + 1
        if window is not None:
            low_E = low_E.maximum(anchors_E + depths_E + (1 - window))
            own_low_E = own_low_E.maximum(index_E + (1 - window))
        in_padding_E = self.document_ids_T[anchors_E] == -1
        low_E = torch.where(in_padding_E, anchors_E + (depths_E > 0), low_E)  # a column sees itself, a slot none
        own_low_E = torch.where(in_padding_E | (depths_E == 0), index_E, own_low_E)
        return KeyRanges(torch.stack((low_E, own_low_E)), torch.stack((anchors_E + 1, index_E + 1)))

    def groups(self, window: int | None) -> list[Group]:
        """Groups neighbouring whole chains of one document; the rows of a group are slots."""
        starts_M = document_starts(self.document_ids_T)[self.anchors_M]
        anchors, starts = torch.stack((self.anchors_M, starts_M)).tolist()
        groups: list[Group] = []
        first = chain = 0
        for i in range(1, len(anchors) + 1):
            if i < len(anchors) and anchors[i] == anchors[i - 1]:
                continue
            # slots [chain, i) are one chain: they join the group, or the group ends before them
            if starts[chain] != starts[first] or (i - first > GROUP_ROWS and chain > first):
                groups.append(self._group(first, chain, anchors, starts, window))
                first = chain
            chain = i
        if anchors:
            groups.append(self._group(first, len(anchors), anchors, starts, window))
        return groups

    @staticmethod
    def _group(first: int, last: int, anchors: list[int], starts: list[int], window: int | None) -> Group:
        high = anchors[last - 1] + 1
        # the nearest slot of the first chain stands one right of its anchor
        low = starts[first] if window is None else max(starts[first], anchors[first] + 2 - window)
        return Group(first, last, min(low, high), high)

    def visible(self, group: Group, window: int | None) -> Tensor:
        """bool [slots, columns + slots] of a group."""
        num_columns = len(self.document_ids_T)
        slots = torch.arange(num_columns + group.first, num_columns + group.last, device=self.anchors_M.device)
        columns = torch.arange(group.low, group.high, device=slots.device)
        return self.sees(slots[:, None], torch.cat((columns, slots))[None], window)


class DenseChainAttention:
    """Reference: all elements side by side under a dense mask."""

    def __init__(self, layout: ChainLayout, window: int | None, *, last_layer: bool):
        self.layout, self.window, self.last_layer = layout, window, last_layer

    def select_queries(self, hidden_1EH: Tensor) -> Tensor:
        return hidden_1EH[:, self.layout.query_elements_R] if self.last_layer else hidden_1EH

    def __call__(self, query_1ENd: Tensor, key_1EGd: Tensor, value_1EGd: Tensor) -> Tensor:
        every_E = torch.arange(query_1ENd.shape[1], device=query_1ENd.device)
        queries_R = self.layout.query_elements_R if self.last_layer else every_E
        visible = self.layout.sees(queries_R[:, None], every_E[None], self.window)
        return self.attention(self.select_queries(query_1ENd), key_1EGd, value_1EGd, visible)

    attention = staticmethod(dense_attention)


class SdpaChainAttention(DenseChainAttention):
    """The same mask through `scaled_dot_product_attention`: any device, memory of the mask only."""

    attention = staticmethod(sdpa_attention)


class GroupedChainAttention(DenseChainAttention):
    """The fast route on a CPU: packed causal attention for the columns, one flash call per group of chains."""

    def __call__(self, query_1ENd: Tensor, key_1EGd: Tensor, value_1EGd: Tensor) -> Tensor:
        layout, num_columns = self.layout, len(self.layout.document_ids_T)
        keys_1TGd, values_1TGd = key_1EGd[:, :num_columns], value_1EGd[:, :num_columns]
        queries_1TNd = query_1ENd[:, :num_columns]
        packed = PackedRow(layout.document_ids_T, layout.columns_C if self.last_layer else None)
        if self.last_layer:
            queries_1TNd = queries_1TNd[:, layout.columns_C]
        columns = TailAttention.apply(packed.blocks(self.window, 0), queries_1TNd, keys_1TGd, values_1TGd)
        if len(layout.anchors_M) == 0:
            return columns
        slots = (x[0, num_columns:] for x in (query_1ENd, key_1EGd, value_1EGd))
        visible = partial(layout.visible, window=self.window)
        chains = GroupedAttention.apply(layout.groups(self.window), visible, *slots, keys_1TGd[0], values_1TGd[0])
        return torch.cat((columns, chains[None]), dim=1)


class FlexChainAttention(DenseChainAttention):
    """The fast route on a GPU: block-sparse flex attention."""

    def __init__(self, layout: ChainLayout, window: int | None, *, last_layer: bool, kernel: Kernel):
        super().__init__(layout, window, last_layer=last_layer)
        self.kernel = kernel

    def __call__(self, query_1ENd: Tensor, key_1EGd: Tensor, value_1EGd: Tensor) -> Tensor:
        mask = self.layout.flex_mask(self.window, self.last_layer)
        out, _ = flex(self.kernel, self.select_queries(query_1ENd), key_1EGd, value_1EGd, mask)
        return out.transpose(1, 2)


def chain_attention(route: Route, layout: ChainLayout, windows: list[int | None]) -> list[DenseChainAttention]:
    """One function per layer."""
    layers = [(window, i == len(windows) - 1) for i, window in enumerate(windows)]
    if route.kernel is not None:
        return [FlexChainAttention(layout, window, last_layer=last, kernel=route.kernel) for window, last in layers]
    kind: type[DenseChainAttention] = GroupedChainAttention
    if route in (DENSE, SDPA):
        kind = DenseChainAttention if route is DENSE else SdpaChainAttention
    return [kind(layout, window, last_layer=last) for window, last in layers]
