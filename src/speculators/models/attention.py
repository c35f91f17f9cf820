"""Public names of earlier releases: "simple_flex_attention" for transformers' modules, block masks as tensors.

Shapes: B rows, N query heads, G key/value heads, T queries, L keys, d head size.
Our own layers do not pass here (see `speculators.nn`); layers taken from transformers do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "block_mask_to_dense_attention_mask",
    "create_float_mask",
    "flex_attention_forward",
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


ALL_ATTENTION_FUNCTIONS.register("simple_flex_attention", flex_attention_forward)
