"""Making a `PackedBatch` of the tensors a training forward receives, and giving columns back in their shape.

Shapes: B rows, S columns of a row as it came, T columns without the padding at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.interfaces import PackedBatch


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
    """The same of B rows, end to end; documents of different rows get different ids."""
    num_rows, num_columns = input_ids.shape
    if document_ids is None:
        document_ids = torch.zeros_like(input_ids)
    if loss_mask is None:
        loss_mask = torch.ones_like(input_ids)
    if position_ids is None:
        positions = torch.arange(first_position, first_position + num_columns, device=input_ids.device)
        position_ids = positions.expand(num_rows, -1)
    rows_B1 = torch.arange(num_rows, device=input_ids.device)[:, None]
    documents = torch.where(document_ids < 0, -1, document_ids + rows_B1 * (document_ids.max() + 1)).flatten()
    real = (documents != -1).nonzero()
    kept = slice(int(real[-1]) + 1 if len(real) else 1)
    return PackedBatch(
        token_ids_T=input_ids.flatten()[kept],
        document_ids_T=documents[kept],
        position_ids_T=position_ids.flatten()[kept],
        supervised_T=loss_mask.flatten()[kept].bool() & (documents[kept] != -1),
        aux_TD=None if aux is None else aux.flatten(0, 1)[kept],
        last_hidden_TH=None if last_hidden is None else last_hidden.flatten(0, 1)[kept],
        row_length=num_columns,
    )


def padded_row(draft_ids_T: Tensor, row_length: int) -> Tensor:
    """[1, S] as the row came; -1 in its padding."""
    out = draft_ids_T.new_full((1, row_length), -1)
    out[0, : len(draft_ids_T)] = draft_ids_T
    return out
