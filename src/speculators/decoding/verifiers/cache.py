"""Preallocated caches with rows of different lengths, behind transformers' `Cache` interface.

`RowCache` holds keys and values; `HybridCache` also loads the states of recurrent layers before each forward.
Shapes: R rows, B rows of this forward, S slots, T new tokens, N key/value heads, D head size.

Slot s of a row holds its token at position s (the nodes of a draft tree fill consecutive slots behind the committed
tokens). The verifier keeps the lengths, so rolling back a chain changes a number and touches no memory.
Storage is token-major, [R, S, N, D]: a row's new tokens are one block, and keeping a tree path copies whole slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from speculators.nn.device import to_device

Move = tuple[int, int, int]
"""(row, from slot, to slot)"""
GROWTH_SLOTS = 256
"""Capacity is a multiple of this: growing copies, so it must be rare."""
MAX_GROWTH_SLOTS = 4096
"""It doubles, but by no more than this."""


@dataclass(frozen=True)
class WriteSpan:
    """Says where one forward writes its keys and how far it reads."""

    first_row: int
    num_rows: int
    num_tokens: int
    num_slots_read: int
    start: int | None
    """The slot of the first new token when it is the same for all rows of the forward."""
    slots_M: Tensor | None
    """Otherwise int64 [num_rows * num_tokens]: flat slots, row * capacity + position."""
    is_chain: bool = True
    """False: a tree, whose slots are not positions."""


def path_moves(row: int, length: int, columns: Sequence[int]) -> list[Move]:
    """What brings a kept tree path behind the `length` committed tokens, where the tree begins."""
    return [(row, length + column, length + slot) for slot, column in enumerate(columns) if column != slot]


def neighbours(rows: list[int]) -> list[list[int]]:
    """Split ascending rows into runs without gaps: one forward works on neighbouring rows."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][-1] == row - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def grown_capacity(old_capacity: int, num_slots: int) -> int:
    rounded_up = -(-num_slots // GROWTH_SLOTS) * GROWTH_SLOTS
    return max(rounded_up, min(2 * old_capacity, old_capacity + MAX_GROWTH_SLOTS))


class RowCache(Cache):
    """Keys and values. Set `span` before a forward: `update` stores there and returns the slots to attend to."""

    def __init__(self, num_rows: int):
        super().__init__(layers=[])
        self.num_rows = num_rows
        self.capacity = 0
        self.span: WriteSpan | None = None
        self.keys_by_layer: dict[int, Tensor] = {}
        self.values_by_layer: dict[int, Tensor] = {}

    def reserve(self, num_slots: int) -> None:
        """Make room for positions below `num_slots`."""
        if num_slots <= self.capacity:
            return
        old_capacity = self.capacity
        self.capacity = grown_capacity(old_capacity, num_slots)
        for store in (self.keys_by_layer, self.values_by_layer):
            for layer, old_RSND in store.items():
                R, _, N, D = old_RSND.shape
                store[layer] = old_RSND.new_zeros(R, self.capacity, N, D)
                store[layer][:, :old_capacity] = old_RSND

    def adopt(self, keys_by_layer: dict[int, Tensor], values_by_layer: dict[int, Tensor]) -> None:
        """Take over the contents of another cache, [R, S, N, D] per layer, each from the start of its own storage."""
        self.keys_by_layer, self.values_by_layer = keys_by_layer, values_by_layer
        self.capacity = keys_by_layer[0].shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, both [B, N, T, D], and return all that may be attended to."""
        assert self.span is not None, "a forward ran on this cache without a span"
        if layer_idx not in self.keys_by_layer:
            # zeros: slots beyond a short row's length are read (with weight 0), so they must not hold NaN
            self.keys_by_layer[layer_idx] = self._new_store(key_states)
            self.values_by_layer[layer_idx] = self._new_store(value_states)
        return (
            _store(self.keys_by_layer[layer_idx], key_states, self.span),
            _store(self.values_by_layer[layer_idx], value_states, self.span),
        )

    def _new_store(self, states_BNTD: Tensor) -> Tensor:
        _, N, _, D = states_BNTD.shape
        return states_BNTD.new_zeros(self.num_rows, self.capacity, N, D)

    def move(self, moves: Sequence[Move]) -> None:
        """Copy slots, all at once (kept tree paths)."""
        index_3M = to_device(moves, next(iter(self.keys_by_layer.values())).device).T
        for store in (self.keys_by_layer, self.values_by_layer):
            for states_RSND in store.values():
                row_M, from_M, to_M = index_3M.to(states_RSND.device)
                states_RSND[row_M, to_M] = states_RSND[row_M, from_M]

    def clear(self, row: int, from_slot: int) -> None:
        """Write zeros from a slot on."""
        for store in (self.keys_by_layer, self.values_by_layer):
            for states_RSND in store.values():
                states_RSND[row, from_slot:] = 0

    def copy_prefix(self, from_row: int, to_row: int, num_slots: int) -> None:
        for store in (self.keys_by_layer, self.values_by_layer):
            for states_RSND in store.values():
                states_RSND[to_row, :num_slots] = states_RSND[from_row, :num_slots]

    def layer_states(self, layer_idx: int, row: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one row's first slots, both [N, S, D]."""
        keys_SND = self.keys_by_layer[layer_idx][row, :num_slots]
        values_SND = self.values_by_layer[layer_idx][row, :num_slots]
        return keys_SND.transpose(0, 1), values_SND.transpose(0, 1)

    # -- methods of transformers' `Cache` that models call besides `update`

    def __len__(self) -> int:
        return len(self.keys_by_layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.span.num_slots_read - self.span.num_tokens if self.span is not None else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        return []

    @property
    def is_initialized(self) -> bool:
        return bool(self.keys_by_layer)


def _store(store_RSND: Tensor, states_BNTD: Tensor, span: WriteSpan) -> Tensor:
    """Write one forward's keys or values and return the [B, N, S, D] view to attend to, by one as_strided, uncopied."""
    row_stride, slot_stride, head_stride, _ = store_RSND.stride()
    B, N, T, D = states_BNTD.shape
    first = span.first_row * row_stride
    strides = (row_stride, head_stride, slot_stride, 1)
    if span.start is not None:
        store_RSND.as_strided((B, N, T, D), strides, first + span.start * slot_stride).copy_(states_BNTD)
    else:
        assert span.slots_M is not None
        store_RSND.view(-1, N, D).index_copy_(0, span.slots_M, states_BNTD.transpose(1, 2).reshape(-1, N, D))
    return store_RSND.as_strided((B, N, span.num_slots_read, D), strides, first)


# -- recurrent layers


@dataclass(frozen=True)
class RowState:
    """The states of one layer for one row: the last inputs of its convolutions and its recurrent memory, [1, ...]."""

    conv: tuple[Tensor | None, ...]
    recurrent: tuple[Tensor | None, ...]


STATELESS = ("moe", "mlp")
"""Types of layers that transformers gives a state's place in the cache but that keep nothing there."""
States = dict[int, RowState]
"""By layer."""


class HybridCache(RowCache):
    """Keys and values of attention layers in rows; states of the others in `layers`, set up before each forward."""

    def __init__(self, num_rows: int, kinds: list[Any], names: list[str]):
        """`kinds`: transformers' cache layers. `names`: the types of the layers, or none."""
        super().__init__(num_rows)
        self.num_states = {
            i: kind.number_of_states
            for i, kind in enumerate(kinds)
            if isinstance(kind, LinearAttentionCacheLayerMixin) and not (names and names[i] in STATELESS)
        }
        self.layers = [DynamicLayer() for _ in kinds]

    def __len__(self) -> int:
        return len(self.layers)

    def load(self, states_by_row: list[States | None]) -> None:
        """Start the next forward from these states; None: from the initial ones."""
        known = next((states for states in states_by_row if states is not None), None)
        for i, num_states in self.num_states.items():
            layer: Any = LinearAttentionLayer(number_of_states=num_states)
            self.layers[i] = layer
            if known is None:
                continue
            rows: list[Any] = [states[i] if states is not None else zeros_like(known[i]) for states in states_by_row]
            for k in range(num_states):
                conv, recurrent = known[i].conv[k], known[i].recurrent[k]
                layer.has_previous_state[k] = True
                if conv is not None:
                    layer.conv_states[k] = torch.cat([row.conv[k] for row in rows])
                    layer.conv_kernel_size[k], layer.is_conv_states_initialized[k] = conv.shape[-1], True
                    layer.dtype, layer.device = conv.dtype, conv.device
                if recurrent is not None:
                    layer.recurrent_states[k] = torch.cat([row.recurrent[k] for row in rows])
                    layer.is_recurrent_states_initialized[k] = True

    def states_of(self, index: int) -> States:
        """States of row `index` after the forward."""

        def of_row(states: dict[int, Tensor | None]) -> tuple[Tensor | None, ...]:
            return tuple(None if state is None else state[index : index + 1] for state in states.values())

        layers: Any = self.layers
        return {i: RowState(of_row(layers[i].conv_states), of_row(layers[i].recurrent_states)) for i in self.num_states}


def zeros_like(state: RowState) -> RowState:
    def zeros(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in tensors)

    return RowState(zeros(state.conv), zeros(state.recurrent))


def tensors_of(states: States) -> list[Tensor]:
    every = [tensor for state in states.values() for tensor in (*state.conv, *state.recurrent)]
    return [tensor for tensor in every if tensor is not None]
