"""The forward of Llama-shaped verifiers without transformers' wrappers: few products per layer, straight on the cache.

Shapes: B rows, T tokens, N query heads, G key/value heads, d head size, H hidden size, V vocabulary, S slots.

A decode step of a small model spends most of its time between the products. Here q, k, v come from one product and
gate, up from another, rope tables are sliced once per forward, and attention reads the preallocated cache in place.
Models qualify by their parts (`lean_weights`) and then by their numbers: `hf_verifier` compares with the model's own
forward. On entering it also notices hooks and modules that were put into the model later.

`StaticForward` is the same at fixed shapes, which a GPU can record: rows (R), slots and many columns are rounded up to
powers of two, and lengths are numbers on the device: all rounds of one shape are the same launches on the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from speculators.decoding.verifiers.cache import Move, WriteSpan, grown_capacity
from speculators.decoding.verifiers.hf_forward import MaskBuilder
from speculators.decoding.verifiers.lean_weights import LeanLayer, LeanWeights, Rotary
from speculators.interfaces import CaptureSpec
from speculators.nn.device import to_device
from speculators.nn.graphs import FixedShapes, Outputs, Record, rounded_up, rows_for, slots_for
from speculators.verifier import CapturedStates

Masks = Tensor | dict[str, Tensor] | None


class LeanForward:
    """The forward on a cache of its own; weights may be shared with other forwards."""

    is_grouped = True

    def __init__(self, weights: LeanWeights, config: PretrainedConfig, num_rows: int, capture: CaptureSpec):
        self.weights, self.capture = weights, capture
        self.num_layers = len(weights.layers)
        self.layer_types: list[str | None] = list(getattr(config, "layer_types", None) or [None] * self.num_layers)
        shape, like = weights.shape, weights.embedding.weight
        self.num_groups = shape.num_heads // shape.num_kv_heads
        self.cache = LeanCache(self.num_layers, num_rows, shape.num_kv_heads, shape.head_dim, like)
        self._rope = RopeTable(weights.rotary, like)

    @property
    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """They are made anew when they grow."""
        return self._rope.cos, self._rope.sin

    def __enter__(self) -> LeanForward:
        self.weights.refresh()
        return self

    def __exit__(self, *exc: object) -> None: ...

    def __call__(
        self, token_ids_BT: Tensor, position_BT: Tensor, masks: Masks, span: WriteSpan, columns_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the states a drafter reads. `columns_B`: logits of this column of each row alone, [B, 1, V]."""
        states = CapturedStates(self.capture)
        slots = self.cache.open(span)
        rope = self._rope.slice(position_BT, span)
        hidden_BTH = self.hidden(token_ids_BT, rope, masks, slots, states)
        if columns_B is not None:
            row_B = torch.arange(len(columns_B), device=hidden_BTH.device)
            hidden_BTH = hidden_BTH[row_B, to_device(columns_B, hidden_BTH.device)][:, None]
        logits = self.weights.head(self.weights.final_norm(hidden_BTH))
        return logits, states.drafter_input if self.capture != CaptureSpec() else None

    def hidden(
        self, token_ids_BT: Tensor, rope: Rotation, masks: Masks, slots: LayerSlots, states: CapturedStates
    ) -> Tensor:
        """The residual stream before the final norm; records the states to capture on the way."""
        wanted, act = states.spec.aux_layer_ids, self.weights.act
        hidden = F.embedding(token_ids_BT, self.weights.embedding.weight)
        for i, layer in enumerate(self.weights.layers):
            if i in wanted:
                states.stream_by_id[i] = hidden
            mask = masks[self.layer_types[i]] if isinstance(masks, dict) else masks  # type: ignore[index]
            hidden = hidden + layer.output(self.attention(layer, i, hidden, rope, mask, slots))
            gate, up = layer.gate_up(layer.norm_mlp(hidden)).chunk(2, -1)
            hidden = hidden + layer.down(act(gate).mul_(up))
        states.stream_by_id[self.num_layers] = hidden
        states.last_hidden = hidden
        return hidden

    def attention(
        self, layer: LeanLayer, index: int, hidden: Tensor, rope: Rotation, mask: Tensor | None, slots: LayerSlots
    ) -> Tensor:
        """Attention output [B, T, N * d]; stores the keys and values."""
        N, G, d, scaling = self.weights.shape
        B, T, _ = hidden.shape
        heads_BTNd = layer.qkv(layer.norm_input(hidden)).view(B, T, N + 2 * G, d)
        qk_BTNd = heads_BTNd.narrow(2, 0, N + G)
        if layer.norm_heads is not None:
            layer.norm_heads(qk_BTNd)
        rope.rotate_(qk_BTNd)
        slots.write(index, heads_BTNd.narrow(2, N, 2 * G))
        keys, values = slots.keys_BGSd[index], slots.values_BGSd[index]
        query_BTNd = heads_BTNd.narrow(2, 0, N)
        if T == 1:  # heads that share a key are its query rows: no copy of the cache
            out = F.scaled_dot_product_attention(
                query_BTNd.view(B, G, N // G, d), keys, values, attn_mask=mask, scale=scaling
            )
            return out.reshape(B, 1, N * d)
        if mask is not None and mask.shape[2] == N // G * T:
            query = query_BTNd.unflatten(2, (G, N // G)).permute(0, 2, 3, 1, 4).reshape(B, G, N // G * T, d)
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
            return out.view(B, N, T, d).transpose(1, 2).reshape(B, T, N * d)
        if N != G:  # a prompt: with many queries the copy is cheap
            keys, values = (x.repeat_interleave(N // G, dim=1) for x in (keys, values))
        out = F.scaled_dot_product_attention(
            query_BTNd.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        return out.transpose(1, 2).reshape(B, T, N * d)


class Rotation:
    """cos and sign-folded sin of the tokens of one forward, [B or 1, T, 1, r]."""

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin
        self.num_rotated = cos.shape[-1]

    def rotate_(self, x_BTNd: Tensor) -> None:
        """In place; features past r pass unrotated."""
        if self.num_rotated < x_BTNd.shape[-1]:
            x_BTNd = x_BTNd[..., : self.num_rotated]
        rolled = x_BTNd.roll(self.num_rotated // 2, -1)
        x_BTNd.mul_(self.cos).addcmul_(rolled, self.sin)


class RopeTable:
    """The model's own rotary embedding, computed once per position and grown on demand."""

    def __init__(self, rotary: Rotary, like: Tensor):
        self.rotary, self.like = rotary, like
        self.cos = self.sin = like.new_empty(0, 1, 0)

    def slice(self, position_BT: Tensor, span: WriteSpan) -> Rotation:
        self._reserve(span.num_slots_read)
        if span.start is not None and span.is_chain:
            end = span.start + span.num_tokens
            return Rotation(self.cos[span.start : end], self.sin[span.start : end])
        return Rotation(self.cos[position_BT], self.sin[position_BT])

    def _reserve(self, num_positions: int) -> None:
        if num_positions <= len(self.cos):
            return
        positions_1P = torch.arange(max(256, 2 * num_positions), device=self.like.device)[None]
        cos, sin = self.rotary(self.like, positions_1P)
        half = sin.shape[-1] // 2
        self.cos = cos[0, :, None]
        self.sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)[0, :, None]


class LayerSlots:
    """The slots that one forward reads and writes, by layer."""

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
    """Preallocated keys and values of all layers in one tensor, [L, R, S, 2 G, d].

    L layers, R rows, S slots. A token's keys and values lie side by side, so a layer stores both with one copy, and the
    slots of a forward are sliced for all layers at once. Slots and lengths are those of `RowCache`."""

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

    def move(self, moves: Sequence[Move]) -> None:
        """Copy slots, all at once (kept tree paths)."""
        row_M, from_M, to_M = to_device(moves, self.storage.device).T
        self.storage[:, row_M, to_M] = self.storage[:, row_M, from_M]

    def clear(self, row: int, from_slot: int) -> None:
        """Write zeros from a slot on."""
        self.storage[:, row, from_slot:] = 0

    def copy_prefix(self, from_row: int, to_row: int, num_slots: int) -> None:
        self.storage[:, to_row, :num_slots] = self.storage[:, from_row, :num_slots]

    def by_layer(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """All keys and all values, [R, S, G, d] per layer, as `RowCache` stores them."""
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


# -- fixed shapes

EXACT_COLUMNS = 8
"""Up to here a shape has the columns that are scored, beyond a power of two."""


class StaticForward:
    """Forwards of fixed shapes (R, T, S). Rows and columns that nobody asked for score a known token behind a row's own
    tokens, where nothing is kept."""

    def __init__(self, forward: LeanForward, masks: MaskBuilder, num_rows: int, record: Record):
        self.forward, self.masks, self.num_rows = forward, masks, num_rows
        self.shapes = FixedShapes(record)

    def __call__(self, token_ids_BT: Tensor, length_by_row: list[int]) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, V] and states of a chain behind each row's tokens."""
        B, num_columns = token_ids_BT.shape
        R = rows_for(B, self.num_rows)
        T = num_columns if num_columns <= EXACT_COLUMNS else rounded_up(num_columns)
        S = slots_for(max(length_by_row[:R]) + T)
        self.forward.cache.reserve(S)
        tokens_RT = token_ids_BT.new_empty(R, T)
        tokens_RT.copy_(token_ids_BT[:1, :1].expand(R, T))
        tokens_RT[:B, :num_columns].copy_(token_ids_BT)
        logits_RTV, states_RTD = self.shapes.run(
            (R, T, S),
            (tokens_RT, to_device(length_by_row[:R], tokens_RT.device)),
            lambda tokens_RT, length_R: self.compute(tokens_RT, length_R, S),
            memory=(self.forward.cache.storage, self.forward.weights.layers),
            tables=lambda: (*self.forward.rope_tables, *self.masks.edges.values()),
        )
        assert logits_RTV is not None
        return logits_RTV[:B, :num_columns], None if states_RTD is None else states_RTD[:B, :num_columns]

    def compute(self, tokens_RT: Tensor, length_R: Tensor, num_slots: int) -> Outputs:
        """The forward on fixed memory: no size and no number of it comes from the host."""
        R, T = tokens_RT.shape
        position_RT = length_R[:, None] + torch.arange(T, device=tokens_RT.device)
        row_R1 = torch.arange(R, device=tokens_RT.device)[:, None]
        slots_M = (row_R1 * self.forward.cache.capacity + position_RT).flatten()
        masks = self.masks.chain(position_RT, num_slots, self.forward.num_groups)
        span = WriteSpan(0, R, T, num_slots, None, slots_M)
        return self.forward(tokens_RT, position_RT, masks if len(masks) > 1 else next(iter(masks.values())), span, None)
