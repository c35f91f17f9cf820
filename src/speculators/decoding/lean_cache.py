"""The preallocated cache of the lean forward: keys and values of all layers in one tensor.

Shapes: L layers, R rows, B rows of this forward, S slots, T new tokens, G key/value heads, d head size.

A token's keys and values lie side by side, so a layer stores both with one copy, and what a forward reads and writes is
cut out for all layers at once. Slots and lengths are those of `cache.RowCache`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.decoding.cache import WriteSpan, grown_capacity


class LayerSlots:
    """What one forward reads and writes, a layer."""

    def __init__(self, storage_LRSGd: Tensor, span: WriteSpan):
        G = storage_LRSGd.shape[3] // 2
        rows = slice(span.first_row, span.first_row + span.num_rows)
        read = storage_LRSGd[:, rows, : span.num_slots_read].transpose(2, 3)
        self.keys_BGSd = read[:, :, :G].unbind(0)
        self.values_BGSd = read[:, :, G:].unbind(0)
        self.slots_M = span.slots_M
        if span.start is not None:
            self._written = storage_LRSGd[:, rows, span.start : span.start + span.num_tokens].unbind(0)
        else:
            self._written = storage_LRSGd.flatten(1, 2).unbind(0)

    def write(self, layer: int, keys_values_BTGd: Tensor) -> None:
        """Keys, then values, along the heads."""
        if self.slots_M is None:
            self._written[layer].copy_(keys_values_BTGd)
        else:
            self._written[layer].index_copy_(0, self.slots_M, keys_values_BTGd.flatten(0, 1))


class LeanCache:
    """Storage [L, R, S, 2 G, d]."""

    def __init__(self, num_layers: int, num_rows: int, num_kv_heads: int, head_dim: int, like: Tensor):
        self.storage = like.new_zeros(num_layers, num_rows, 0, 2 * num_kv_heads, head_dim)

    @property
    def capacity(self) -> int:
        return self.storage.shape[2]

    def reserve(self, num_slots: int) -> None:
        """Make room for positions below `num_slots`."""
        if num_slots <= self.capacity:
            return
        L, R, S, *rest = self.storage.shape
        # zeros: slots beyond a short row's length are read (with weight 0), so they must not hold NaN
        grown = self.storage.new_zeros(L, R, grown_capacity(S, num_slots), *rest)
        grown[:, :, :S] = self.storage
        self.storage = grown

    def open(self, span: WriteSpan) -> LayerSlots:
        return LayerSlots(self.storage, span)

    def move(self, row: int, from_slots: list[int], to_slot: int) -> None:
        """Copy the given slots of a row to consecutive ones (a kept tree path)."""
        slots = torch.tensor(from_slots, device=self.storage.device)
        self.storage[:, row, to_slot : to_slot + len(from_slots)] = self.storage[:, row, slots]

    def copy_prefix(self, from_row: int, to_row: int, num_slots: int) -> None:
        self.storage[:, to_row, :num_slots] = self.storage[:, from_row, :num_slots]

    def by_layer(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """All keys and all values, [R, S, G, d] a layer: what `cache.RowCache` keeps."""
        keys_LRSGd, values_LRSGd = self.storage.chunk(2, dim=3)
        # clones: each has a storage of its own, from its start
        dense = torch.contiguous_format
        return (
            {layer: keys_RSGd.clone(memory_format=dense) for layer, keys_RSGd in enumerate(keys_LRSGd)},
            {layer: values_RSGd.clone(memory_format=dense) for layer, values_RSGd in enumerate(values_LRSGd)},
        )

    def layer_states(self, layer_idx: int, row: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one row's first slots, both [G, S, d]."""
        keys, values = self.storage[layer_idx, row, :num_slots].transpose(0, 1).chunk(2)
        return keys, values
