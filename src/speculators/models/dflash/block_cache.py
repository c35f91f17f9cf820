"""A draft cache whose true entries are context, and whose drafted entries are blocks that see each other.

Shapes: B rows, S slots of a block, N query heads, G key/value heads, L keys, d head size, M context entries.

    row 0   c0 c1 c2 c3 | s0 s1 s2          length 4; the block stands at 4, 5, 6 and is overwritten by what is
    row 1   c0 | s0 s1 s2 . . .             committed next: rejected drafts need no erasing
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.models.dflash.block_attention import LayerMask
from speculators.nn.cache import DraftCache, Span
from speculators.nn.masks import additive_mask


@dataclass
class BlockPass:
    """One forward of one block per row: the positions of the blocks and the masks of the layers."""

    lengths: list[int]
    """Context entries of each row = position of its slot 0."""
    num_slots: int
    device: torch.device
    masks: dict[LayerMask, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.is_even = len(set(self.lengths)) == 1
        self.end = max(self.lengths) + self.num_slots
        self.lengths_B = torch.tensor(self.lengths, device=self.device)
        self.positions_BS = self.lengths_B[:, None] + torch.arange(self.num_slots, device=self.device)

    def span(self) -> Span:
        rows = slice(len(self.lengths))
        if self.is_even:
            return Span(rows, self.num_slots, end=self.end, start=self.lengths[0])
        return Span(rows, self.num_slots, end=self.end, starts_B=self.lengths_B)

    def first_key(self, layer_mask: LayerMask) -> int:
        return 0 if layer_mask.window is None else max(0, min(self.lengths) - layer_mask.window + 1)

    def mask(self, layer_mask: LayerMask, dtype: torch.dtype) -> Tensor | None:
        """Additive [B, 1, S, L]; None = all keys are visible. Made once per pass and kind of layer."""
        if layer_mask not in self.masks:
            self.masks[layer_mask] = self.make_mask(layer_mask, dtype)
        return self.masks[layer_mask]

    def make_mask(self, layer_mask: LayerMask, dtype: torch.dtype) -> Tensor | None:
        if self.is_even and not layer_mask.causal and layer_mask.window is None:
            return None
        keys_L = torch.arange(self.first_key(layer_mask), self.end, device=self.device)
        slots_BS1 = self.positions_BS[..., None]
        seen = keys_L <= slots_BS1 if layer_mask.causal else (keys_L < self.lengths_B[:, None, None] + self.num_slots)
        if layer_mask.window is not None:
            seen = seen & ((keys_L - slots_BS1).abs() < layer_mask.window)
        seen_BSL = seen.expand(len(self.lengths), self.num_slots, -1)
        return additive_mask(seen_BSL, dtype)[:, None]


class BlockCache(DraftCache):
    """`running` describes the blocks of the running forward."""

    running: BlockPass | None = None

    def start(self, block_pass: BlockPass) -> None:
        self.reserve(block_pass.end)
        self.running, self.span = block_pass, block_pass.span()

    def write_context(self, row_M: Tensor, position_M: Tensor, kv_M: Tensor) -> None:
        """Writes true entries of any rows, all layers at once: kv [M, layers, 2, G, d]."""
        self.storage[:, :, row_M, :, position_M] = kv_M.to(self.storage.dtype)

    def block_attention(self, layer_masks: list[LayerMask]) -> list[BlockCacheAttention]:
        """One function per layer, valid as long as the cache."""
        return [BlockCacheAttention(self, i, layer_mask) for i, layer_mask in enumerate(layer_masks)]


class BlockCacheAttention:
    """Writes the block behind the context and attends to both."""

    def __init__(self, cache: BlockCache, layer: int, layer_mask: LayerMask):
        self.cache, self.layer, self.layer_mask = cache, layer, layer_mask

    def select_queries(self, hidden_BSH: Tensor) -> Tensor:
        return hidden_BSH

    def __call__(self, query_BSNd: Tensor, key_BSGd: Tensor, value_BSGd: Tensor) -> Tensor:
        running = self.cache.running
        assert running is not None
        self.cache.write(self.layer, key_BSGd, value_BSGd)
        first, num_rows = running.first_key(self.layer_mask), len(running.lengths)
        keys, values = self.cache.storage[self.layer, :, :num_rows, :, first : running.end]
        B, S, N, d = query_BSNd.shape
        G = keys.shape[1]
        # Query heads of a group ride as rows of one product: no copy of keys.
        grouped = query_BSNd.view(B, S, G, N // G, d).permute(0, 2, 3, 1, 4).reshape(B, G, -1, d)
        mask = running.mask(self.layer_mask, query_BSNd.dtype)
        if mask is not None:
            mask = mask.repeat(1, 1, N // G, 1)
        out = F.scaled_dot_product_attention(grouped, keys, values, mask)
        return out.view(B, G, N // G, S, d).permute(0, 3, 1, 2, 4).reshape(B, S, N, d)
