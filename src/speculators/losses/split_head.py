"""Losses of a head that is partly frozen: logits = hidden @ frozen.T + features @ trained.T, never [rows, V] at once.

Shapes: N draft rows, H hidden size, R features, X = H + R, V draft vocabulary.

The two heads are one head side by side, [V, X], of which the gradient of the trained columns alone is added up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.losses.chunked import RowLosses, SplitHead, head_losses, is_reference_config, reference_row_losses
from speculators.losses.registry import LossConfig
from speculators.losses.targets import Targets

__all__ = ["SplitHead", "split_row_losses"]


def split_row_losses(
    hidden_NH: Tensor,
    features_NR: Tensor,
    head: SplitHead,
    targets: Targets,
    target_index_N: Tensor,
    loss_config: LossConfig,
    *,
    expected_weight_N: Tensor | None = None,
    chunk_elements: int | None = None,
) -> RowLosses:
    """As `chunked.row_losses`, for two heads whose logits add up."""
    rows_NX = torch.cat((hidden_NH, features_NR), -1)
    if is_reference_config(loss_config):
        assert head.frozen_VH is not None and head.trained_VR is not None
        side_by_side_VX = torch.cat((head.frozen_VH, head.trained_VR), -1)
        return reference_row_losses(rows_NX, side_by_side_VX, targets, target_index_N, loss_config)
    return head_losses(rows_NX, head, targets, target_index_N, loss_config, expected_weight_N, chunk_elements)
