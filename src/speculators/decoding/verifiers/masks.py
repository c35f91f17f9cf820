"""Attention masks of the decode loop: which slots each scored token may attend to.

Shapes: B rows, T scored tokens, S slots, G query heads per key/value head. Masks are additive: 0 or the least number.

A row of length L has its committed tokens in slots 0..L-1 and the scored tokens in L..L+T-1:

    slot          0 .. L-1   L   L+1  L+2           chain of 3           tree, parents (-1, -1): columns 1 and 2
    column 0         1       1    0    0            position L           position L
    column 1         1       1    1    0            position L + 1       L + 1
    column 2         1       1    1    1            position L + 2       L + 1, does not attend to column 1
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculators.decoding.trees.token_tree import ancestor_mask, depths


@dataclass(frozen=True)
class TreeShape:
    """A draft tree below the last committed token (column 0)."""

    depth_T: Tensor
    """int64; 0 for column 0."""
    is_ancestor_TT: Tensor
    """bool; [i, j]: column i attends to column j (itself included)."""

    @classmethod
    def of(cls, parents_K: Tensor) -> TreeShape:
        parents = parents_K.tolist()
        return cls(torch.tensor([0, *depths(parents)]), ancestor_mask(parents))


@dataclass
class MaskBuilder:
    """Masks for one model: its attention windows, dtype and device.

    G query heads share a key/value head: each mask row is repeated for them; G = 1 gives the plain [B, 1, T, S]."""

    windows: dict[str, int | None]
    """Sliding window by layer type (None = full attention)."""
    dtype: torch.dtype
    device: torch.device
    edges: dict[int | None, Tensor] = field(default_factory=dict)
    """By window: a mask's values by slot - position, -C .. C - 1."""
    trees: dict[tuple[int, ...], TreeShape] = field(default_factory=dict)

    def chain(self, position_BT: Tensor, num_slots: int, num_groups: int) -> dict[str, Tensor]:
        """[B, 1, G * T, S]. A mask row depends on slot - position alone, so all rows are slices of one vector."""
        position_BR = position_BT.repeat(1, num_groups)
        masks = {}
        for layer_type, window in self.windows.items():
            edge = self._edge(window, num_slots)
            most = len(edge) // 2
            pieces_PS = edge.as_strided((most + 1, num_slots), (1, 1))
            masks[layer_type] = pieces_PS[most - position_BR][:, None]
        return masks

    def _edge(self, window: int | None, num_slots: int) -> Tensor:
        edge = self.edges.get(window)
        if edge is None or len(edge) < 2 * num_slots:
            ahead_E = torch.arange(-2 * num_slots, 2 * num_slots, device=self.device)
            edge = self.edges[window] = self._additive(_visible(ahead_E, torch.zeros_like(ahead_E), window))
        return edge

    def tree(self, tree: TreeShape, length_B: Tensor, num_slots: int, num_groups: int) -> dict[str, Tensor]:
        slot_S = torch.arange(num_slots, device=self.device)
        B, T = len(length_B), len(tree.depth_T)
        column_BS = slot_S - length_B[:, None]
        is_committed_BS = column_BS < 0
        column_BS = column_BS.clamp(0, T - 1)
        sees_BTS = tree.is_ancestor_TT[:, column_BS].permute(1, 0, 2) & ~is_committed_BS[:, None]
        sees_BTS &= (slot_S < length_B[:, None] + T)[:, None]
        sees_BTS |= is_committed_BS[:, None]
        key_position_BS = torch.where(is_committed_BS, slot_S, length_B[:, None] + tree.depth_T[column_BS])
        position_BT = length_B[:, None] + tree.depth_T
        masks = {}
        for layer_type, window in self.windows.items():
            visible_BTS = sees_BTS
            if window is not None:
                visible_BTS = visible_BTS & (key_position_BS[:, None] > position_BT[..., None] - window)
            masks[layer_type] = self._grouped(visible_BTS, num_groups)
        assert all(mask.shape[0] == B for mask in masks.values())
        return masks

    def tree_shape(self, parents_K: Tensor) -> TreeShape:
        key = tuple(parents_K.tolist())
        if key not in self.trees:
            shape = TreeShape.of(parents_K)
            if len(self.trees) > 64:  # dynamic trees differ every round
                self.trees.clear()
            self.trees[key] = TreeShape(shape.depth_T.to(self.device), shape.is_ancestor_TT.to(self.device))
        return self.trees[key]

    def _grouped(self, visible_BTS: Tensor, num_groups: int) -> Tensor:
        return self._additive(visible_BTS).repeat(1, num_groups, 1)[:, None]

    def _additive(self, visible: Tensor) -> Tensor:
        hidden = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        return torch.where(visible, torch.zeros((), dtype=self.dtype, device=self.device), hidden)


def _visible(slot_S: Tensor, position: Tensor, window: int | None) -> Tensor:
    visible = slot_S <= position
    return visible if window is None else visible & (slot_S > position - window)
