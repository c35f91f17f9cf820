"""Public names of earlier releases: building blocks by architecture, called as transformers' own modules are.

    rotary = components.rotary_emb_class(config)
    layer = components.decoder_layer_class(config, layer_idx)
    hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary(hidden, position_ids))

Shapes: B rows, T positions, H hidden size, N query heads, G key/value heads, d head size.
The layers are those of `speculators.nn`; here they are only called differently.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from speculators.models.attention import block_mask_to_dense_attention_mask
from speculators.nn.decoder import DecoderLayer
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope, RopeTables
from speculators.utils.names import did_you_mean

__all__ = ["ModelComponents", "model_classes", "override_components"]


class ModelComponents(NamedTuple):
    first_layer_class: type[nn.Module]
    decoder_layer_class: type[nn.Module]
    norm_class: type[nn.Module]
    rotary_emb_class: type[nn.Module]


class RotaryEmbedding(nn.Module):
    """Position embeddings of given positions, to hand to the layers as they are."""

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__()
        self.rope = Rope(config)

    @torch.no_grad()
    def forward(self, hidden_BTH: Tensor, position_ids: Tensor) -> RopeTables:
        return self.rope.at(position_ids.to(hidden_BTH.device), hidden_BTH.dtype)


class BaseDecoderLayer(DecoderLayer):
    """A pre-norm decoder layer. `attention_mask` is None (causal), a bool (True = attend) or float [B, 1, T, T], or a
    BlockMask."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: RopeTables | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if position_embeddings is None:
            raise ValueError("position_embeddings are needed: call the rotary_emb_class with the position ids")
        return super().forward(hidden_states, position_embeddings, _MaskedAttention(attention_mask))


class _MaskedAttention:
    """Attention over the keys of one call, under a given mask."""

    def __init__(self, mask: Tensor | BlockMask | None) -> None:
        self.mask = block_mask_to_dense_attention_mask(mask) if isinstance(mask, BlockMask) else mask

    def __call__(self, query_BTNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor) -> Tensor:
        query, key, value = (states.transpose(1, 2) for states in (query_BTNd, key_BTGd, value_BTGd))
        out_BNTd = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, is_causal=self.mask is None, enable_gqa=True
        )
        return out_BNTd.transpose(1, 2)

    def select_queries(self, hidden_BTH: Tensor) -> Tensor:
        return hidden_BTH


# The decoder layer reads from its config what tells the two apart (q/k norms, biases).
_SHARED = ModelComponents(BaseDecoderLayer, BaseDecoderLayer, RMSNorm, RotaryEmbedding)
model_classes: dict[str, ModelComponents] = {"llama": _SHARED, "qwen3": _SHARED}


def override_components(model_type: str, **overrides: Any) -> ModelComponents:
    """The components of an architecture with some of them replaced."""
    if model_type not in model_classes:
        hint = did_you_mean(model_type, model_classes)
        raise ValueError(f"no components for model_type={model_type!r}; there are {sorted(model_classes)}.{hint}")
    unknown = sorted(set(overrides) - set(ModelComponents._fields))
    if unknown:
        raise ValueError(f"{unknown} are no components; they are {list(ModelComponents._fields)}")
    return model_classes[model_type]._replace(**overrides)
