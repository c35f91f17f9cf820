"""Any Hugging Face causal LM as a `Verifier`: scores tokens for rows of different lengths against a preallocated cache.

Shapes: B rows of the forward (first_row .. first_row + B - 1), T tokens, V vocabulary, D width of captured states.

Lengths are host integers. `score` writes behind a row's length, `keep` moves the length: rollback is free.
Use it as a context manager around a run of forwards; that is where the model is set up for decoding and restored.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculators.decoding.attention import IMPLEMENTATION
from speculators.decoding.cache import RowCache, WriteSpan
from speculators.decoding.masks import MaskBuilder
from speculators.interfaces import CaptureSpec, VerifierOutput
from speculators.packed_linear import PackedLinears
from speculators.verifier import CapturedStates, capture_states, verifier_parts

MAX_GROUPED_TOKENS = 32
"""Up to here a forward is decoding (heads grouped, masks sliced from a strip); beyond, it is prefill."""


class HFVerifier:
    """Keys and values of `num_rows` sequences under one model."""

    def __init__(self, model: PreTrainedModel, num_rows: int, capture: CaptureSpec | None = None):
        self.model = model
        self.parts = verifier_parts(model)
        self.capture = capture or CaptureSpec()
        self.num_rows = num_rows
        self.length_by_row = [0] * num_rows
        self.vocab_size: int = self.parts.config.vocab_size
        self.max_position: int | None = getattr(self.parts.config, "max_position_embeddings", None)
        parameter = self.parts.head.weight
        self.device: torch.device = parameter.device  # type: ignore[assignment]
        self._cache = RowCache(num_rows)
        self._is_grouped = _can_replace_attention(model, self.parts.config)
        self._masks = MaskBuilder(_attention_windows(model, self.parts.config), parameter.dtype, self.device)  # type: ignore[arg-type]
        self._num_groups = _uniform_groups(self.parts.config) if self._is_grouped else 1
        self._position_S = torch.arange(0, device=self.device)
        self._packed = PackedLinears(model)
        self._exit = ExitStack()
        self._depth = 0
        self._states: CapturedStates | None = None
        self._last_rows: tuple[int, bool] = (0, False)
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    # -- setting the model up

    def __enter__(self) -> HFVerifier:
        self._depth += 1
        if self._depth == 1:
            self._exit.enter_context(torch.inference_mode())
            self._exit.enter_context(self._packed)
            if self.capture != CaptureSpec():
                self._states = self._exit.enter_context(capture_states(self.model, self.capture))
            if self._is_grouped:
                config, before = self.parts.config, self.parts.config._attn_implementation_internal
                self._exit.callback(setattr, config, "_attn_implementation_internal", before)
                config._attn_implementation_internal = IMPLEMENTATION
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._exit.close()

    # -- scoring

    def score(
        self,
        token_ids_BT: Tensor,
        num_valid_B: Tensor,
        parents_K: Tensor | None = None,
        *,
        first_row: int = 0,
        last_only: bool = False,
    ) -> VerifierOutput:
        """See `interfaces.Verifier`. `last_only` computes logits of each row's last valid token alone: [B, 1, V]."""
        B, T = token_ids_BT.shape
        lengths = self.length_by_row[first_row : first_row + B]
        self._cache.reserve(max(lengths) + T)
        positions_BT, masks = self._positions_and_masks(lengths, T, parents_K)
        self._cache.span = self._span(lengths, first_row, T, positions_BT)
        self._last_rows = (first_row, parents_K is not None)
        kwargs: dict[str, Any] = {}
        if last_only and self._has_logits_to_keep:
            last_B = (num_valid_B - 1).clamp(min=0)
            columns_C = last_B.unique()
            kwargs["logits_to_keep"] = columns_C.to(self.device)
        if self.max_position is not None and max(lengths) + T > self.max_position:
            positions_BT = positions_BT.clamp(max=self.max_position - 1)  # drafts past the end are never kept
        output = self.model(
            input_ids=token_ids_BT,
            attention_mask=masks,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            **kwargs,
        )
        logits = output.logits
        if last_only:
            row_B = torch.arange(B)
            column_B = torch.searchsorted(columns_C, last_B) if kwargs else (num_valid_B - 1).clamp(min=0)
            logits = logits[row_B, column_B.cpu()][:, None]
        return VerifierOutput(logits, self._states.drafter_input if self._states is not None else None)

    def keep(self, columns_BT: Tensor, num_kept_B: Tensor) -> None:
        """See `interfaces.Verifier`. Give host tensors: lengths live on the host."""
        first_row, is_tree = self._last_rows
        for i, num_kept in enumerate(num_kept_B.tolist()):
            row = first_row + i
            if is_tree and num_kept:
                length, columns = self.length_by_row[row], columns_BT[i, :num_kept].tolist()
                if columns != list(range(num_kept)):
                    self._cache.move(row, [length + column for column in columns], length)
            self.length_by_row[row] += num_kept

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on (0 = the row is free)."""
        assert length <= self.length_by_row[row]
        self.length_by_row[row] = length

    def share_prefix(self, from_row: int, to_row: int, length: int) -> None:
        """Give `to_row` the first `length` tokens of `from_row` without computing them."""
        assert length <= self.length_by_row[from_row]
        self._cache.copy_prefix(from_row, to_row, length)
        self.length_by_row[to_row] = length

    def cached_states(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N, S, D] that the cache holds for a row."""
        return self._cache.layer_states(layer, row, self.length_by_row[row])

    # -- what one forward needs

    def _positions_and_masks(
        self, lengths: list[int], num_tokens: int, parents_K: Tensor | None
    ) -> tuple[Tensor, Tensor | dict[str, Tensor] | None]:
        num_slots = max(lengths) + num_tokens
        groups = self._num_groups if num_tokens <= MAX_GROUPED_TOKENS else 1
        if parents_K is not None:
            tree = self._masks.tree_shape(parents_K)
            length_B = torch.tensor(lengths, device=self.device)
            position_BT = length_B[:, None] + tree.depth_T
            return position_BT, self._as_given(self._masks.tree(tree, length_B, num_slots, groups))
        if len(set(lengths)) == 1:
            position_BT = self._positions(num_slots)[lengths[0] :].expand(len(lengths), -1)
        else:
            length_B1 = torch.tensor(lengths, device=self.device)[:, None]
            position_BT = length_B1 + self._positions(num_tokens)
        if self._is_grouped and self._nothing_to_hide(lengths, num_tokens):
            return position_BT, None
        if len(lengths) == 1 and num_tokens <= MAX_GROUPED_TOKENS:
            masks = self._masks.chain_single_row(lengths[0], num_tokens, self._cache.capacity, groups)
        else:
            masks = self._masks.chain(position_BT, num_slots, groups)
        return position_BT, self._as_given(masks)

    def _positions(self, end: int) -> Tensor:
        """0 .. end - 1: a view of one table."""
        if len(self._position_S) < end:
            self._position_S = torch.arange(2 * end, device=self.device)
        return self._position_S[:end]

    def _nothing_to_hide(self, lengths: list[int], num_tokens: int) -> bool:
        """One new token that sees everything, or a prompt from its start (plain causal)."""
        num_slots = max(lengths) + num_tokens
        if any(window is not None and num_slots > window for window in self._masks.windows.values()):
            return False
        return max(lengths) == 0 or (num_tokens == 1 and len(set(lengths)) == 1)

    def _as_given(self, masks: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _span(self, lengths: list[int], first_row: int, num_tokens: int, position_BT: Tensor) -> WriteSpan:
        B, num_slots = len(lengths), max(lengths) + num_tokens
        if len(set(lengths)) == 1:
            return WriteSpan(first_row, B, num_tokens, num_slots, lengths[0], None)
        row_B1 = torch.arange(first_row, first_row + B, device=self.device)[:, None]
        slot_BT = position_BT[:, :1] + self._positions(num_tokens)  # a tree lies flat
        slots_M = (row_B1 * self._cache.capacity + slot_BT).flatten()
        return WriteSpan(first_row, B, num_tokens, num_slots, None, slots_M)


def _can_replace_attention(model: PreTrainedModel, config: Any) -> bool:
    return bool(getattr(model, "_supports_attention_backend", False)) and config._attn_implementation == "sdpa"


def _uniform_groups(config: Any) -> int:
    """Query heads a key/value head; 1 (masks stay plain, keys are repeated) where layers differ."""
    differs = any("global" in key and "head" in key for key in config.to_dict())
    num_key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 1 if differs else config.num_attention_heads // num_key_heads


def _attention_windows(model: PreTrainedModel, config: Any) -> dict[str, int | None]:
    """Layer types of the model, each with its sliding window."""
    layer_types = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    unknown = [name for name in layer_types if name not in ("full_attention", "sliding_attention")]
    if unknown or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{type(model).__name__} has layers of type {unknown or ['recurrent']}: they fold the past into one state, "
            "which cannot be rolled back when drafts are rejected; decode it with transformers' generate"
        )
    window = getattr(config, "sliding_window", None)
    if not layer_types:
        return {"all": window if getattr(config, "use_sliding_window", True) else None}
    return {name: window if name == "sliding_attention" else None for name in layer_types}
