"""The forward of any Hugging Face causal LM, through its own modules, on a preallocated cache, and its attention masks:
which slots each scored token may attend to.

Shapes: B rows, T scored tokens, S slots, N key/value heads, G query heads each, D head size or width of captured
states, V vocabulary, C columns.

A row of length L has its committed tokens in slots 0..L-1 and the scored tokens in L..L+T-1:

    slot          0 .. L-1   L   L+1  L+2           chain of 3           tree, parents (-1, -1): columns 1 and 2
    column 0         1       1    0    0            position L           position L
    column 1         1       1    1    0            position L + 1       L + 1
    column 2         1       1    1    1            position L + 2       L + 1, does not attend to column 1

Masks are additive: 0 or the least number. Transformers' sdpa path repeats keys and values G times whenever there is a
mask. For decoding (few queries over a long cache) [B, N * G, T, D] queries seen as [B, N, G * T, D] need no copy of the
cache; the mask comes with its rows already repeated (`MaskBuilder`).
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from speculators.decoding.trees.token_tree import ancestor_mask, depths
from speculators.decoding.verifiers.cache import RowCache, WriteSpan
from speculators.interfaces import CaptureSpec
from speculators.nn.device import to_device
from speculators.nn.prepacked_linear import PrepackedLinears
from speculators.utils.util import NestedContext
from speculators.verifier import CapturedStates, VerifierParts, capture_states

Masks = Literal["grouped", "plain", "own"]
"""What attention gets: our masks with heads that share a key grouped, our masks as they are, or the model's own."""
IMPLEMENTATION = "speculators_grouped_sdpa"
"""Registered without a mask function, so models build no masks: attention gets ours, or None."""


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
            is_ancestor_TT = to_device(shape.is_ancestor_TT, self.device, torch.bool)
            self.trees[key] = TreeShape(to_device(shape.depth_T, self.device), is_ancestor_TT)
        return self.trees[key]

    def _grouped(self, visible_BTS: Tensor, num_groups: int) -> Tensor:
        return self._additive(visible_BTS).repeat(1, num_groups, 1)[:, None]

    def _additive(self, visible: Tensor) -> Tensor:
        hidden = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        return torch.where(visible, torch.zeros((), dtype=self.dtype, device=self.device), hidden)


def _visible(slot_S: Tensor, position: Tensor, window: int | None) -> Tensor:
    visible = slot_S <= position
    return visible if window is None else visible & (slot_S > position - window)


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    B, num_heads, T, D = query.shape
    num_key_heads = key.shape[1]
    num_rows = num_heads // num_key_heads * T
    if T > 1 and (attention_mask is None or attention_mask.shape[2] != num_rows):  # prefill: many queries
        return sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scaling, **kwargs)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(B, num_key_heads, num_rows, D), key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(B, num_heads, T, value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, grouped_sdpa)


class HFForward(NestedContext):
    """Inside, the model is set up for decoding: attention, prepacked linears, hooks. Restored after the last exit."""

    def __init__(
        self,
        model: PreTrainedModel,
        parts: VerifierParts,
        num_rows: int,
        capture: CaptureSpec,
        *,
        masks: Masks = "grouped",
    ):
        self.model, self.config, self.capture = model, parts.config, capture
        self.cache = RowCache(num_rows)
        self.is_grouped = masks == "grouped" and _can_replace_attention(model, parts.config)
        self.num_groups = _uniform_groups(parts.config) if self.is_grouped else 1
        self.max_position: int | None = getattr(parts.config, "max_position_embeddings", None)
        self._prepacked = PrepackedLinears(model)
        self._states: CapturedStates | None = None
        self._cache_name = cache_argument(model)
        takes = inspect.signature(model.forward).parameters
        self._has_logits_to_keep, self._has_positions = "logits_to_keep" in takes, "position_ids" in takes

    def set_up(self, stack: ExitStack) -> None:
        stack.enter_context(self._prepacked)
        if self.capture != CaptureSpec():
            self._states = stack.enter_context(capture_states(self.model, self.capture))
        if self.is_grouped:
            before = self.config._attn_implementation_internal
            stack.callback(setattr, self.config, "_attn_implementation_internal", before)
            self.config._attn_implementation_internal = IMPLEMENTATION

    def __call__(
        self,
        token_ids_BT: Tensor,
        position_BT: Tensor,
        masks: Tensor | dict[str, Tensor] | None,
        span: WriteSpan,
        columns_B: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the states a drafter reads. `columns_B`: logits of this column of each row alone, [B, 1, V]; best
        on the host."""
        self.cache.span = span
        kwargs: dict[str, Any] = {self._cache_name: self.cache}
        if columns_B is not None and self._has_logits_to_keep:
            columns_C, columns_B = columns_B.unique(return_inverse=True)
            kwargs["logits_to_keep"] = to_device(columns_C, token_ids_BT.device)
        if self.max_position is not None and span.num_slots_read > self.max_position:
            position_BT = position_BT.clamp(max=self.max_position - 1)  # drafts past the last position are never kept
        if self._has_positions:
            kwargs["position_ids"] = position_BT
        if masks is not None:
            kwargs["attention_mask"] = masks
        logits = self.model(input_ids=token_ids_BT, use_cache=True, **kwargs).logits
        if columns_B is not None:
            columns_B = to_device(columns_B, logits.device)
            logits = logits[torch.arange(len(columns_B), device=logits.device), columns_B][:, None]
        return logits, self._states.drafter_input if self._states is not None else None


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model's forward takes its cache: one for all models since transformers 5.24."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "cache_params") if name in takes), "past_key_values")


def _can_replace_attention(model: PreTrainedModel, config: Any) -> bool:
    return bool(getattr(model, "_supports_attention_backend", False)) and config._attn_implementation == "sdpa"


def _uniform_groups(config: Any) -> int:
    """Query heads per key/value head; 1 (plain masks, repeated keys) where layers differ."""
    differs = any("global" in key and "head" in key for key in config.to_dict())
    num_key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 1 if differs else config.num_attention_heads // num_key_heads
