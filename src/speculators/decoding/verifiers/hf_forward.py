"""The forward of any Hugging Face causal LM, through its own modules, on a preallocated cache.

Shapes: B rows, T tokens, S slots, N key/value heads, G query heads each, D head size or width of captured states,
V vocabulary, C columns.

Attention: transformers' sdpa path repeats keys and values G times whenever there is a mask. For decoding (few queries
over a long cache) [B, N * G, T, D] queries seen as [B, N, G * T, D] need no copy of the cache; the mask comes with its
rows already repeated (`MaskBuilder`).
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from speculators.decoding.verifiers.cache import RowCache, WriteSpan
from speculators.interfaces import CaptureSpec
from speculators.nn.prepacked_linear import PrepackedLinears
from speculators.utils.nested_context import NestedContext
from speculators.verifier import CapturedStates, VerifierParts, capture_states

IMPLEMENTATION = "speculators_grouped_sdpa"
"""Registered without a mask function, so models build no masks: attention gets ours, or None."""


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

    def __init__(self, model: PreTrainedModel, parts: VerifierParts, num_rows: int, capture: CaptureSpec):
        self.model, self.config, self.capture = model, parts.config, capture
        self.cache = RowCache(num_rows)
        self.is_grouped = _can_replace_attention(model, parts.config)
        self.num_groups = _uniform_groups(parts.config) if self.is_grouped else 1
        self.max_position: int | None = getattr(parts.config, "max_position_embeddings", None)
        self._prepacked = PrepackedLinears(model)
        self._states: CapturedStates | None = None
        self._cache_name = cache_argument(model)
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

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
        """Logits, and the states a drafter reads. `columns_B`: logits of this column of each row alone, [B, 1, V]."""
        self.cache.span = span
        kwargs: dict[str, Any] = {self._cache_name: self.cache}
        if columns_B is not None and self._has_logits_to_keep:
            columns_C, columns_B = columns_B.unique(return_inverse=True)
            kwargs["logits_to_keep"] = columns_C
        if self.max_position is not None and span.num_slots_read > self.max_position:
            position_BT = position_BT.clamp(max=self.max_position - 1)  # drafts past the last position are never kept
        logits = self.model(
            input_ids=token_ids_BT, attention_mask=masks, position_ids=position_BT, use_cache=True, **kwargs
        ).logits
        if columns_B is not None:
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
