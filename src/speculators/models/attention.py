"""Public names of earlier releases: "simple_flex_attention" for transformers' modules, block masks as tensors, and
building blocks by architecture, called as transformers' own modules are.

    rotary = components.rotary_emb_class(config)
    layer = components.decoder_layer_class(config, layer_idx)
    hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary(hidden, position_ids))

Shapes: B rows, N query heads, G key/value heads, T queries or positions, L keys, d head size, H hidden size.
The layers are those of `speculators.nn`; here they are only called differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speculators.nn.decoder import DecoderLayer
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope, RopeTables
from speculators.utils.names import did_you_mean

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ModelComponents",
    "block_mask_to_dense_attention_mask",
    "conditional_torch_compile",
    "create_combined_mask_mod",
    "create_float_mask",
    "extend_mask_for_draft_tokens",
    "flex_attention_forward",
    "model_classes",
    "override_components",
]

_compiled_flex_attention = None


def flex_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Flex attention of [B, N, T, d] queries on [B, G, L, d] keys; returns [B, T, N, d], as transformers expects."""
    block_mask = attention_mask if isinstance(attention_mask, BlockMask) else None
    score_mod = None
    if isinstance(attention_mask, Tensor):
        dense = attention_mask if attention_mask.dtype != torch.bool else create_float_mask(attention_mask, query.dtype)

        def score_mod(score: Tensor, batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            return score + dense[batch % dense.shape[0], 0, q_index, kv_index]

    attend = _flex_for(query.device)
    grouped = query.shape[1] != key.shape[1]
    out_BNTd = attend(query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped, scale=scaling)
    return out_BNTd.transpose(1, 2).contiguous(), None


def _flex_for(device: torch.device) -> Any:
    """Compiled once, and only where it compiles to something: on a CPU the plain function answers."""
    global _compiled_flex_attention
    if device.type != "cuda":
        return flex_attention
    if _compiled_flex_attention is None:
        _compiled_flex_attention = torch.compile(flex_attention)
    return _compiled_flex_attention


def create_float_mask(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 where `mask` allows attention, the dtype's most negative number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask.bool(), torch.finfo(dtype).min)


def block_mask_to_dense_attention_mask(
    block_mask: BlockMask, device: torch.device | str | None = None, dtype: torch.dtype = torch.bool
) -> Tensor:
    """[B, heads, T, L] of a block mask: bool (True = attend), or a float mask to add to the scores."""
    num_queries, num_keys = block_mask.seq_lengths
    device = torch.device(device) if device is not None else block_mask.kv_num_blocks.device
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    sizes = (batch, heads, num_queries, num_keys)
    grids = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
    dense = block_mask.mask_mod(*grids).expand(sizes)
    return dense if dtype == torch.bool else create_float_mask(dense, dtype)


def create_combined_mask_mod(document_ids: Tensor, total_seq_len: int) -> Callable[..., Tensor]:
    """Returns the mask_mod of a drafter unrolled over its own output, the keys of all steps side by side: what
    `nn.packed_row.unrolled_mask` writes out. `document_ids` [T]: document of each column, -1 = padding.

    Raises `ValueError` when there are not `total_seq_len` of them.
    """
    documents_T = document_ids.flatten()
    if len(documents_T) != total_seq_len:
        raise ValueError(f"document_ids has {len(documents_T)} columns and total_seq_len={total_seq_len}: one for each")

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        column = key % total_seq_len
        same_document = (documents_T[query] == documents_T[column]) & (documents_T[query] != -1)
        return ((key <= query) & same_document) | (column == query)

    return mask_mod


def extend_mask_for_draft_tokens(block_mask: BlockMask) -> BlockMask:
    """Returns the mask with the keys of one step more: as many as there are queries, by the same mask_mod."""
    num_queries, num_keys = block_mask.seq_lengths
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    device, size = block_mask.kv_num_blocks.device, block_mask.BLOCK_SIZE
    return create_block_mask(block_mask.mask_mod, batch, heads, num_queries, num_keys + num_queries, device, size)


ALL_ATTENTION_FUNCTIONS.register("simple_flex_attention", flex_attention_forward)


def conditional_torch_compile(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile` where it pays (an accelerator); the function itself elsewhere. Also `@...(dynamic=True)`."""
    if function is None:
        return lambda decorated: conditional_torch_compile(decorated, **options)
    return torch.compile(function, **options) if torch.cuda.is_available() else function


# -- building blocks


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
