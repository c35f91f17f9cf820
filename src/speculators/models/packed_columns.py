"""The columns of a packed row as a training forward receives them: [1, T] each, what is not given filled in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedColumns(NamedTuple):
    """Shapes: T columns, padding included."""

    token_ids_T: Tensor
    document_ids_T: Tensor
    """-1 = padding."""
    loss_mask_T: Tensor
    position_ids_T: Tensor
    length: int
    """Columns before the padding, at least one."""

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        document_ids: Tensor | None,
        loss_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        first_position: int = 0,
    ) -> PackedColumns:
        """By default one document, all of it supervised."""
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"input_ids has batch size {input_ids.shape[0]}; documents are packed into one row of size 1"
            )
        num_columns, device = input_ids.shape[1], input_ids.device
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        if loss_mask is None:
            loss_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(first_position, first_position + num_columns, device=device)[None]
        real = (document_ids[0] != -1).nonzero()
        length = int(real[-1]) + 1 if len(real) else 1
        return cls(input_ids[0], document_ids[0], loss_mask[0], position_ids[0], length)

    def without_padding(self) -> PackedColumns:
        keep = slice(0, self.length)
        return PackedColumns(
            self.token_ids_T[keep],
            self.document_ids_T[keep],
            self.loss_mask_T[keep],
            self.position_ids_T[keep],
            self.length,
        )
