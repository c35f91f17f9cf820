"""Documents packed into one row: the `PackedBatch` made of the tensors a training forward receives, and attention
masks, also for a drafter unrolled over its own output.

Shapes: B rows, S columns of a row as it came, T columns of the packed row, without the padding at the end.
`document_ids_T` holds the document of each column, -1 = padding; columns of one document are contiguous. Masks are True
where attention is allowed.

Unrolling (EAGLE-3's training-time test): every step appends T keys. Query q at step s stands at position q + s and sees

    step-0 keys   c <= q of its own document (and c > q + s - window when the layer slides)
    later steps   only its own column: the drafts that lead from q to q + s (window: step m > s - window)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from speculators.interfaces import PackedBatch
from speculators.nn.routes import FlexMask, KeyRanges

SLIDING_BLOCK = 256
"""Queries per masked block of a sliding layer: small enough that little outside the window is computed."""


def pack_row(
    input_ids: Tensor,
    *,
    aux: Tensor | None,
    last_hidden: Tensor | None,
    document_ids: Tensor | None,
    loss_mask: Tensor | None,
    position_ids: Tensor | None,
    first_position: int,
) -> PackedBatch:
    """Of one row, tensors [1, S] and states [1, S, width]. What is None: one document, all of it supervised, positions
    from `first_position` on. Raises ValueError when there are several rows."""
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids has batch size {input_ids.shape[0]}; documents are packed into one row of size 1")
    return join_rows(
        input_ids,
        aux=aux,
        last_hidden=last_hidden,
        document_ids=document_ids,
        loss_mask=loss_mask,
        position_ids=position_ids,
        first_position=first_position,
    )


def join_rows(
    input_ids: Tensor,
    *,
    aux: Tensor | None,
    last_hidden: Tensor | None,
    document_ids: Tensor | None,
    loss_mask: Tensor | None,
    position_ids: Tensor | None,
    first_position: int,
) -> PackedBatch:
    """The same of B rows, end to end; documents of different rows get different ids. `document_ids` and `loss_mask` may
    be on the host when the others are on a device: nothing then waits for it."""
    num_rows, num_columns = input_ids.shape
    if document_ids is None:
        document_ids = torch.zeros(input_ids.shape, dtype=torch.int64)
    if loss_mask is None:
        loss_mask = torch.ones(input_ids.shape, dtype=torch.int64)
    if position_ids is None:
        positions = torch.arange(first_position, first_position + num_columns, device=input_ids.device)
        position_ids = positions.expand(num_rows, -1)
    device, document_ids, loss_mask = input_ids.device, document_ids.cpu(), loss_mask.cpu()
    rows_B1 = torch.arange(num_rows)[:, None]
    documents = torch.where(document_ids < 0, -1, document_ids + rows_B1 * (document_ids.max() + 1)).flatten()
    real = (documents != -1).nonzero()
    kept = slice(int(real[-1]) + 1 if len(real) else 1)
    supervised_T = loss_mask.flatten()[kept].bool() & (documents[kept] != -1)
    return PackedBatch(
        token_ids_T=input_ids.flatten()[kept],
        document_ids_T=documents[kept].to(device, non_blocking=True),
        position_ids_T=position_ids.flatten()[kept],
        supervised_T=supervised_T.to(device, non_blocking=True),
        aux_TD=None if aux is None else aux.flatten(0, 1)[kept],
        last_hidden_TH=None if last_hidden is None else last_hidden.flatten(0, 1)[kept],
        row_length=num_columns,
        host_document_ids_T=documents[kept],
        host_supervised_T=supervised_T,
    )


def padded_row(draft_ids_T: Tensor, row_length: int) -> Tensor:
    """[1, S] as the row came; -1 in its padding."""
    out = draft_ids_T.new_full((1, row_length), -1)
    out[0, : len(draft_ids_T)] = draft_ids_T
    return out


def document_starts(document_ids_T: Tensor) -> Tensor:
    """Returns the first column of each column's document."""
    index_T = torch.arange(len(document_ids_T), device=document_ids_T.device)
    is_first_T = torch.ones_like(document_ids_T, dtype=torch.bool)
    is_first_T[1:] = document_ids_T[1:] != document_ids_T[:-1]
    return index_T.where(is_first_T, 0).cummax(0).values


def drawn(columns: Tensor, most: int | None, generator: torch.Generator | None = None) -> Tensor:
    """Draws at most so many of the columns, ascending. On the host, so that every device trains on the same ones."""
    if most is None or len(columns) <= most:
        return columns
    return columns[torch.randperm(len(columns), generator=generator)[:most].sort().values]


def document_mask(document_ids_T: Tensor, window: int | None = None, shift: int = 0) -> Tensor:
    """[T, T]: causal within a document; `window` counts keys up to and including the query, which stands `shift`
    positions further right. Padding sees only itself, which keeps its softmax finite."""
    index_T = torch.arange(document_ids_T.shape[0], device=document_ids_T.device)
    query, key = index_T[:, None], index_T[None, :]
    visible = (key <= query) & (document_ids_T[:, None] == document_ids_T[None, :]) & (document_ids_T[:, None] != -1)
    if window is not None:
        visible &= key > query + shift - window
    return visible


def unrolled_mask(document_ids_T: Tensor, step: int, window: int | None = None) -> Tensor:
    """[T, (step + 1) T]: the dense mask of unroll step `step`, the reference of every faster route."""
    own_column = torch.eye(document_ids_T.shape[0], dtype=torch.bool, device=document_ids_T.device)
    padding = own_column & (document_ids_T[:, None] == -1)
    first = document_mask(document_ids_T, window, shift=step) | padding
    later = [own_column if window is None or m > step - window else padding for m in range(1, step + 1)]
    return torch.cat([first, *later], dim=1)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 0 where `visible`, -inf elsewhere, to add to attention scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


@dataclass(frozen=True)
class Block:
    """A rectangle of attention: queries [query_start, query_end) against keys [key_start, key_end)."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    causal: bool
    """True: query i of the block sees its keys up to i."""
    visible_QK: Tensor | None = None


@dataclass(frozen=True)
class PackedRow:
    """A packed row and the query positions that are needed. Computes the rectangles of attention that cover them."""

    document_ids_T: Tensor
    query_positions_R: Tensor | None = None
    """Ascending columns; None = every column (padding then attends to itself: finite, and without effect)."""
    flex_masks: dict[tuple[int | None, int], FlexMask] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def every_column(self) -> PackedRow:
        """The same row, all of it queries; itself when it is so already."""
        return PackedRow(self.document_ids_T) if self.query_positions_R is not None else self

    @cached_property
    def queries_R(self) -> Tensor:
        if self.query_positions_R is not None:
            return self.query_positions_R
        return torch.arange(self.document_ids_T.shape[0], device=self.document_ids_T.device)

    @cached_property
    def runs(self) -> list[tuple[int, int, int, int]]:
        """(index among the queries, first column, one past the last, first column of the document) of each maximal run
        of neighbouring query positions in one document. One transfer to the host per packed row."""
        rows = self.queries_R
        if rows.numel() == 0:
            return []
        starts_R = document_starts(self.document_ids_T)[rows]
        breaks_R = torch.ones_like(rows, dtype=torch.bool)
        breaks_R[1:] = (rows[1:] != rows[:-1] + 1) | (starts_R[1:] != starts_R[:-1])
        places = breaks_R.nonzero().squeeze(-1)
        table = torch.stack((places, rows[places], starts_R[places])).tolist()
        ends = [*table[0][1:], rows.numel()]
        return [(p, a, a + end - p, d) for p, a, d, end in zip(*table, ends, strict=True)]

    def flex_mask(self, window: int | None, shift: int) -> FlexMask:
        """Of the step-0 keys that queries see, made once per row: layers and steps with the same view share it."""
        key = (window, 0 if window is None else shift)
        if key not in self.flex_masks:
            queries_R = self.queries_R
            low_R = document_starts(self.document_ids_T)[queries_R]
            if window is not None:
                low_R = low_R.maximum(queries_R + (shift + 1 - window))
            nothing_R = torch.zeros_like(low_R)
            ranges = KeyRanges(torch.stack((low_R, nothing_R)), torch.stack((queries_R + 1, nothing_R)))
            self.flex_masks[key] = FlexMask.of(ranges, len(self.document_ids_T))
        return self.flex_masks[key]

    def blocks(self, window: int | None, shift: int) -> list[list[Block]]:
        """Returns, for each run of queries, the rectangles that cover the step-0 keys it sees."""
        covers: list[list[Block]] = []
        if window is not None and shift >= window:
            return covers  # every step-0 key is outside the window
        for place, first, last, document in self.runs:
            if window is None or last - 1 + shift - window < document:
                covers.append(self._full_blocks(place, first, last, document))
            else:
                covers.extend(self._sliding_blocks(place, first, last, document, window, shift))
        return covers

    @staticmethod
    def _full_blocks(place: int, first: int, last: int, document: int) -> list[Block]:
        queries = (place, place + last - first)
        triangle = Block(*queries, first, last, causal=True)
        if document == first:
            return [triangle]
        return [Block(*queries, document, first, causal=False), triangle]

    def _sliding_blocks(self, place: int, first: int, last: int, document: int, window: int, shift: int):
        for start in range(first, last, SLIDING_BLOCK):
            end = min(start + SLIDING_BLOCK, last)
            low = max(document, start + shift - window + 1)
            query = torch.arange(start, end, device=self.document_ids_T.device)[:, None]
            key = torch.arange(low, end, device=self.document_ids_T.device)[None, :]
            visible = (key <= query) & (key > query + shift - window)
            offset = place + start - first
            yield [Block(offset, offset + end - start, low, end, causal=False, visible_QK=visible)]
