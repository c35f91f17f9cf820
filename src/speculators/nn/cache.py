"""Keys and values of a drafter while it decodes: preallocated, rows of different lengths, crop by moving a number.

Shapes: B rows, G key/value heads, M capacity, d head size, T new columns, R answered columns, L keys looked at.

    row 0   e0 e1 e2 e3 e4 | x x . .        length 5; x = drafted entries, overwritten by the next commit
    row 1   e0 e1 | x x . . . . .           length 2

Entries past a row's length are never erased, only out of sight: every query sees positions up to its own, and a
position is written before it is first looked at. So a rejected draft costs nothing, and padded columns of a ragged
batch may be written like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_CAPACITY = 256


@dataclass
class Span:
    """Columns about to be appended: where they go, and which of them the last layer must answer for."""

    rows: slice
    """Batch rows that the tensors cover, start and stop given."""
    num_columns: int
    end: int
    """Keys to look at: one past the last position any row writes."""
    start: int | None = None
    """Position of column 0 when all rows agree; else `starts_B` on the device."""
    starts_B: Tensor | None = None
    answered_B: Tensor | None = None
    """Column of each row that the last layer answers for; None = the final column."""
    masks: dict[tuple[int | None, bool], Tensor] = field(default_factory=dict)

    def positions(self, device: torch.device) -> Tensor:
        """[B or 1, T]"""
        columns = torch.arange(self.num_columns, device=device)
        return (
            columns[None] + self.starts_B[:, None]
            if self.starts_B is not None
            else (columns + self.end - len(columns))[None]
        )

    def answered_positions(self, device: torch.device) -> Tensor:
        """[B or 1, 1]"""
        if self.answered_B is not None and self.starts_B is not None:
            return (self.starts_B + self.answered_B)[:, None]
        return self.positions(device)[:, -1:]

    def mask(self, window: int | None, last_layer: bool, like: Tensor) -> Tensor:
        """Additive [B or 1, R, L]; made once a span for each kind of layer."""
        key = (window, last_layer)
        if key not in self.masks:
            query = (self.answered_positions(like.device) if last_layer else self.positions(like.device))[..., None]
            keys_L = torch.arange(self.end, device=like.device)
            visible = keys_L <= query
            if window is not None:
                visible &= keys_L > query - window
            self.masks[key] = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~visible, float("-inf")
            )
        return self.masks[key]


class DraftCache:
    """Keys and values of all layers. `span` says what the running forward appends; see `CacheAttend`."""

    def __init__(self, num_layers: int, num_rows: int, num_kv_heads: int, head_dim: int, *, dtype, device):
        self.shape = (num_layers, 2, num_rows, num_kv_heads, 0, head_dim)
        self.storage = torch.zeros(self.shape, dtype=dtype, device=device)
        self.keys_values: list[tuple[Tensor, Tensor]] = []
        """Views of the storage, a layer: keys and values, each [B, G, M, d]."""
        self.lengths = [0] * num_rows
        """Entries of each row that are true; everything past them may be overwritten."""
        self.span: Span | None = None
        self.reserve(MIN_CAPACITY)

    @property
    def capacity(self) -> int:
        return self.storage.shape[4]

    def reserve(self, num_positions: int) -> None:
        """Grows by doubling: a long context is paid for when it is there, not when the cache is made."""
        if num_positions <= self.capacity:
            return
        capacity = max(MIN_CAPACITY, 1 << (num_positions - 1).bit_length())
        grown = self.storage.new_zeros((*self.shape[:4], capacity, self.shape[5]))
        grown[..., : self.capacity, :] = self.storage
        self.storage = grown
        self.keys_values = [(layer[0], layer[1]) for layer in grown]

    def rows_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the span's rows."""
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

    def attends(self, windows: list[int | None]) -> list[CacheAttend]:
        """One for each layer, for as long as the cache lives."""
        last = len(windows) - 1
        return [CacheAttend(self, i, window, last_layer=i == last) for i, window in enumerate(windows)]


class CacheAttend:
    """Appends to the cache and looks at everything up to each query. The last layer answers one column a row: drafting
    needs no more, and its output projection and MLP then run on one row instead of the whole prompt."""

    def __init__(self, cache: DraftCache, layer: int, window: int | None, *, last_layer: bool):
        self.cache, self.layer, self.window, self.last_layer = cache, layer, window, last_layer

    def rows(self, hidden: Tensor) -> Tensor:
        span = self.cache.span
        assert span is not None
        if not self.last_layer or span.num_columns == 1:
            return hidden
        if span.answered_B is None:
            return hidden[:, -1:]
        return hidden[torch.arange(len(hidden), device=hidden.device), span.answered_B].unsqueeze(1)

    def __call__(self, query_BTNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor) -> Tensor:
        self.cache.write(self.layer, key_BTGd, value_BTGd)
        query = self.rows(query_BTNd)
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
