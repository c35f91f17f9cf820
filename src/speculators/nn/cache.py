"""Keys and values of a drafter while it decodes: preallocated, rows of different lengths, crop by moving a number.

Shapes: B rows, G key/value heads, M capacity, d head size, T new columns, Q query columns, L keys, F nodes of one depth
of a draft tree, N nodes so far.

    row 0   e0 e1 e2 e3 e4 | x x . .        length 5; x = drafted entries, overwritten by the next commit
    row 1   e0 e1 | x x . . . . .           length 2

Entries past a row's length are never erased, only masked: every query sees positions up to its own, and a position is
written before it is first read. So a rejected draft costs nothing, and padded columns of a ragged batch may be written
like any other.

Masked slots run behind the entries, in the same forward (parallel drafting: the slots are queries too):

    row 0   e0 e1 e2 | e3 s s s             queries: entry e3 and three slots
    row 1   e0 | e1 e2 s s s                slots are scratch: the next commit writes over them

Nodes of a draft tree see the prefix and their ancestors:

    row     e0 e1 e2 | a b c | aa ab ba ..  nodes of one depth stand at one position, in neighbouring slots
    slot    0  1  2    3 4 5   6  7  8      position of a node: length + depth - 1
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.nn.packed_row import additive_mask

MIN_CAPACITY = 256
INITIAL_CAPACITY = 1024
"""Positions per row that a proposer reserves before the cache first grows."""
ALONE_FROM = 32
"""A row with this many new entries is read alone when others have other counts: padding those would cost more."""


@dataclass
class Span:
    """Columns about to be appended: where they go, and which of them are queries of the last layer."""

    rows: slice
    """Batch rows that the tensors cover, start and stop given."""
    num_columns: int
    end: int
    """One past the last position that any row writes: keys are read up to here."""
    start: int | None = None
    """Position of column 0 when all rows agree; else `starts_B` on the device."""
    starts_B: Tensor | None = None
    num_queries: int = 1
    """Query columns per row of the last layer. Drafting reads no others, so that its output projection and MLP run on
    one row instead of the whole prompt."""
    first_query_B: Tensor | None = None
    """Column of each row's first query; None = the queries are the final columns."""
    masks: dict[tuple[int | None, bool], Tensor] = field(default_factory=dict)

    def positions(self, device: torch.device) -> Tensor:
        """[B or 1, T]"""
        return self.positions_of(torch.arange(self.num_columns, device=device)[None])

    def query_columns(self, device: torch.device) -> Tensor:
        """[B or 1, Q]"""
        if self.first_query_B is None:
            return torch.arange(self.num_columns - self.num_queries, self.num_columns, device=device)[None]
        first_B1 = self.first_query_B[:, None]
        return first_B1 if self.num_queries == 1 else first_B1 + torch.arange(self.num_queries, device=device)

    def query_positions(self, device: torch.device) -> Tensor:
        """[B or 1, Q]"""
        return self.positions_of(self.query_columns(device))

    def positions_of(self, columns: Tensor) -> Tensor:
        """Positions of columns [B or 1, ..]."""
        return columns + (self.end - self.num_columns if self.starts_B is None else self.starts_B[:, None])

    def select_queries(self, hidden: Tensor) -> Tensor:
        """The query columns of [B, T, ..]."""
        if self.num_columns == self.num_queries:
            return hidden
        if self.first_query_B is None:
            return hidden[:, -self.num_queries :]
        return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], self.query_columns(hidden.device)]

    def mask(self, window: int | None, last_layer: bool, like: Tensor) -> Tensor:
        """Additive [B or 1, Q or T, L]; made once per span and kind of layer."""
        key = (window, last_layer)
        if key not in self.masks:
            query = (self.query_positions(like.device) if last_layer else self.positions(like.device))[..., None]
            keys_L = torch.arange(self.end, device=like.device)
            visible = keys_L <= query
            if window is not None:
                visible &= keys_L > query - window
            self.masks[key] = additive_mask(visible, like.dtype)
        return self.masks[key]


@dataclass
class TreeSpan(Span):
    """The nodes of one depth; `starts_B` are their slots."""

    lengths_B: Tensor | None = None
    """Entries of each row before the tree."""
    visible_BFN: Tensor | None = None

    def mask(self, window: int | None, last_layer: bool, like: Tensor) -> Tensor:
        """Additive [B, F, L]."""
        key = (window, False)
        if key not in self.masks:
            self.masks[key] = additive_mask(self.visible(window), like.dtype)
        return self.masks[key]

    def visible(self, window: int | None) -> Tensor:
        assert self.lengths_B is not None and self.visible_BFN is not None
        num_rows, num_frontier, num_nodes = self.visible_BFN.shape
        lengths_B1 = self.lengths_B[:, None]
        keys_L = torch.arange(self.end, device=self.lengths_B.device)
        node_BL = keys_L - lengths_B1  # negative: an entry of the prefix
        is_node_BL = (node_BL >= 0) & (node_BL < num_nodes)
        index_BFL = node_BL.clamp(0, num_nodes - 1)[:, None].expand(num_rows, num_frontier, -1)
        seen_BFL = (node_BL < 0)[:, None] | (self.visible_BFN.gather(2, index_BFL) & is_node_BL[:, None])
        if window is None:
            return seen_BFL
        position_BL = torch.where(node_BL < 0, keys_L, lengths_B1 + node_BL // num_frontier)
        own_B1 = lengths_B1 + num_nodes // num_frontier - 1
        return seen_BFL & (position_BL > own_B1 - window)[:, None]


class DraftCache:
    """Keys and values of all layers. `span` says what the running forward appends."""

    def __init__(self, num_layers: int, num_rows: int, num_kv_heads: int, head_dim: int, *, dtype, device):
        self.shape = (num_layers, 2, num_rows, num_kv_heads, 0, head_dim)
        self.storage = torch.zeros(self.shape, dtype=dtype, device=device)
        self.keys_values: list[tuple[Tensor, Tensor]] = []
        """Views of the storage per layer: keys and values, each [B, G, M, d]."""
        self.lengths = [0] * num_rows
        """True entries of each row; positions past them may be overwritten."""
        self.span: Span | None = None
        self.reserve(MIN_CAPACITY)

    @property
    def capacity(self) -> int:
        return self.storage.shape[4]

    def reserve(self, num_positions: int) -> None:
        """Grows by doubling: memory for a long context is taken when it arrives, not when the cache is made."""
        if num_positions <= self.capacity:
            return
        capacity = max(MIN_CAPACITY, 1 << (num_positions - 1).bit_length())
        grown = self.storage.new_zeros((*self.shape[:4], capacity, self.shape[5]))
        grown[..., : self.capacity, :] = self.storage
        self.storage = grown
        self.keys_values = [(layer[0], layer[1]) for layer in grown]

    def rows_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the span's rows."""
        assert self.span is not None
        keys, values = self.keys_values[layer]
        rows = self.span.rows
        return (keys, values) if rows.start == 0 and rows.stop == len(keys) else (keys[rows], values[rows])

    def write(self, layer: int, key_BTGd: Tensor, value_BTGd: Tensor) -> None:
        span = self.span
        assert span is not None
        keys, values = self.rows_of(layer)
        if span.start is not None:
            keys.narrow(2, span.start, span.num_columns).copy_(key_BTGd.transpose(1, 2))
            values.narrow(2, span.start, span.num_columns).copy_(value_BTGd.transpose(1, 2))
        else:
            positions_BT = span.positions(key_BTGd.device)
            row_index_B1 = torch.arange(len(positions_BT), device=positions_BT.device)[:, None]
            keys[row_index_B1, :, positions_BT] = key_BTGd
            values[row_index_B1, :, positions_BT] = value_BTGd

    def layer_attention(self, windows: list[int | None]) -> list[CacheAttention]:
        """One function per layer, valid as long as the cache."""
        last = len(windows) - 1
        return [CacheAttention(self, i, window, last_layer=i == last) for i, window in enumerate(windows)]


class CacheAttention:
    """Appends to the cache and reads everything up to each query."""

    def __init__(self, cache: DraftCache, layer: int, window: int | None, *, last_layer: bool):
        self.cache, self.layer, self.window, self.last_layer = cache, layer, window, last_layer

    def select_queries(self, hidden: Tensor) -> Tensor:
        span = self.cache.span
        assert span is not None
        return span.select_queries(hidden) if self.last_layer else hidden

    def __call__(self, query_BTNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor) -> Tensor:
        self.cache.write(self.layer, key_BTGd, value_BTGd)
        query = self.select_queries(query_BTNd)
        span = self.cache.span
        assert span is not None
        first, mask = 0, None
        if span.start is not None and query.shape[1] == 1:
            if self.window is not None:
                first = max(0, span.end - self.window)
        else:
            mask = span.mask(self.window, self.last_layer, query)
        keys, values = (x.narrow(2, first, span.end - first) for x in self.cache.rows_of(self.layer))
        if query.shape[1] == 1 and query.device.type == "cpu":
            return single_query_attention(query, keys, values, mask)
        heads_first = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, None if mask is None else mask[:, None], enable_gqa=True
        )
        return heads_first.transpose(1, 2)


def single_query_attention(query_B1Nd: Tensor, key_BGLd: Tensor, value_BGLd: Tensor, mask_B1L: Tensor | None) -> Tensor:
    """Query heads of a group share its keys, so they ride as rows of one product: no copy of keys, four operations."""
    B, G, _, d = key_BGLd.shape
    query = (query_B1Nd * d**-0.5).view(B * G, -1, d)
    scores = torch.bmm(query, key_BGLd.flatten(0, 1).transpose(1, 2))
    if mask_B1L is not None:
        scores = (scores.unflatten(0, (B, G)) + mask_B1L[:, None]).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), value_BGLd.flatten(0, 1)).view(B, 1, -1, d)
