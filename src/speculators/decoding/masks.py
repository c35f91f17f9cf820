"""Attention masks of the decode loop: which slots each scored token may attend to.

Shapes: B rows, T scored tokens, S slots, G query heads a key/value head. Masks are additive: 0 or the least number.

A row of length L has its committed tokens in slots 0..L-1 and the scored tokens in L..L+T-1:

    slot          0 .. L-1   L   L+1  L+2           chain of 3           tree, parents (-1, -1): columns 1 and 2
    column 0         1       1    0    0            position L           position L
    column 1         1       1    1    0            position L + 1       L + 1
    column 2         1       1    1    1            position L + 2       L + 1, and does not see column 1
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculators.decoding.tree import ancestor_mask, depths


@dataclass(frozen=True)
class TreeShape:
    """A draft tree below the last committed token (column 0)."""

    depth_T: Tensor
    """int64; 0 for column 0."""
    is_ancestor_TT: Tensor
    """bool; [i, j]: column i sees column j (itself included)."""

    @classmethod
    def of(cls, parents_K: Tensor) -> TreeShape:
        parents = parents_K.tolist()
        return cls(torch.tensor([0, *depths(parents)]), ancestor_mask(parents))


@dataclass
class MaskBuilder:
    """Masks for one model: its attention windows, dtype, device and head grouping."""

    windows: dict[str, int | None]
    """Sliding window by layer type (None = full attention)."""
    dtype: torch.dtype
    device: torch.device
    num_groups: int = 1
    """G: each mask row is repeated for the G query heads that share a key/value head; 1 = the plain [B, 1, T, S]."""
    strips: dict[tuple[int, int | None, int], Tensor] = field(default_factory=dict)
    trees: dict[tuple[int, ...], TreeShape] = field(default_factory=dict)

    def chain_single_row(self, length: int, num_tokens: int, capacity: int, num_groups: int) -> dict[str, Tensor]:
        """For one row the mask depends on slot - position alone: a slice of a strip that is made once."""
        num_slots = length + num_tokens
        masks = {}
        for layer_type, window in self.windows.items():
            key = (num_tokens, window, num_groups)
            strip = self.strips.get(key)
            if strip is None or strip.shape[-1] < capacity + num_tokens:
                strip = self.strips[key] = self._strip(num_tokens, window, capacity + num_tokens).repeat(num_groups, 1)
            last = strip.shape[-1]
            masks[layer_type] = strip[None, None, :, last - num_slots :]
        return masks

    def _strip(self, num_tokens: int, window: int | None, num_slots: int) -> Tensor:
        # right-aligned: the last T columns are the scored tokens themselves
        slot_S = torch.arange(num_slots, device=self.device)
        position_T1 = torch.arange(num_slots - num_tokens, num_slots, device=self.device)[:, None]
        return self._additive(_visible(slot_S, position_T1, window))

    def chain(self, position_BT: Tensor, num_slots: int, num_groups: int) -> dict[str, Tensor]:
        slot_S = torch.arange(num_slots, device=self.device)
        return {
            layer_type: self._grouped(_visible(slot_S, position_BT[..., None], window), num_groups)
            for layer_type, window in self.windows.items()
        }

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
