"""Nodes of a draft tree behind the entries of a draft cache: they see the prefix and their ancestors.

Shapes: B rows, F nodes of the frontier, N nodes so far (F a depth), L keys, T = F new columns.

    row     e0 e1 e2 | a b c | aa ab ba ..      nodes of one depth stand at one position, in neighbouring slots
    slot    0  1  2    3 4 5   6  7  8          position of a node: length + depth - 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.nn.slot_cache import SlotSpan


@dataclass
class TreeSpan(SlotSpan):
    """The frontier of one depth; `starts_B` are its slots."""

    lengths_B: Tensor | None = None
    """Entries of each row before the tree."""
    visible_BFN: Tensor | None = None

    def mask(self, window: int | None, last_layer: bool, like: Tensor) -> Tensor:
        """Additive [B, F, L]."""
        key = (window, False)
        if key not in self.masks:
            visible = self.visible(window)
            zeros = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
            self.masks[key] = zeros.masked_fill_(~visible, float("-inf"))
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
