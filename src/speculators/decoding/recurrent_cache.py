"""The cache of a recurrent or hybrid model: keys and values in rows, and states that are set up before each forward.

Shapes: [1, ...] a row's state, [B, ...] those of the rows of a forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from speculators.decoding.cache import RowCache


@dataclass(frozen=True)
class RowState:
    """The states of one layer for one row: the last inputs of its convolutions and its recurrent memory, [1, ...]."""

    conv: tuple[Tensor | None, ...]
    recurrent: tuple[Tensor | None, ...]


States = dict[int, RowState]
"""By layer."""


class HybridCache(RowCache):
    """Keys and values of attention layers in rows; states of the others in `layers`, set up before each forward."""

    def __init__(self, num_rows: int, kinds: list[Any]):
        super().__init__(num_rows)
        self.num_states = {
            i: kind.number_of_states for i, kind in enumerate(kinds) if isinstance(kind, LinearAttentionCacheLayerMixin)
        }
        self.layers = [DynamicLayer() for _ in kinds]

    def load(self, states_by_row: list[States | None]) -> None:
        """Start the next forward from these; None: from nothing."""
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
        """What the forward left for its row `index`."""

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
