"""Drafts with DFlash: keeps the context's keys and values, and fills one block per row in one forward.

Shapes: B rows, T committed columns, K draft tokens, S slots of a block, M new context entries, N query heads,
G key/value heads, L keys, d head size, H hidden size, V vocabulary.

    sequence   x0   x1   x2   x3            committed: token x[i] with the state g[i-1] that predicted it
    context    c0   c1   c2                 entry i is made of g[i] and stands at position i
    block                     x3  m  m  m   positions 3, 4, 5, 6: the last token has no state yet, so it is slot 0
    drafts                    .   x4 x5 x6  (sample_from_anchor: slot k drafts x[4 + k])

The cache: its true entries are context, its drafted entries are blocks whose slots see each other.

    row 0   c0 c1 c2 c3 | s0 s1 s2          length 4; the block stands at 4, 5, 6 and is overwritten by what is
    row 1   c0 | s0 s1 s2 . . .             committed next: rejected drafts need no erasing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal
from speculators.models.dflash.block_attention import LayerMask
from speculators.models.dflash.network import DFlashNetwork
from speculators.nn.cache import ALONE_FROM, INITIAL_CAPACITY, DraftCache, Span
from speculators.nn.device import read_on_host, to_device
from speculators.nn.draft_tokens import draft_slots, without_idle
from speculators.nn.graphs import Drafts, Entries, FixedRounds, FixedShapes
from speculators.nn.packed_row import additive_mask
from speculators.nn.prepacked_linear import PrepackedLinears


@dataclass
class BlockPass:
    """One forward of one block per row: the positions of the blocks and the masks of the layers."""

    lengths_B: Tensor
    """Context entries of each row = position of its slot 0."""
    num_slots: int
    end: int
    """Keys are read up to here."""
    start: int | None = None
    """The length of all rows, where it is known and the same."""
    shortest: int = 0
    """No row is known to be shorter."""
    masks: dict[LayerMask, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions_BS = self.lengths_B[:, None] + torch.arange(self.num_slots, device=self.lengths_B.device)

    @classmethod
    def behind(cls, lengths: list[int], num_slots: int, device: torch.device) -> BlockPass:
        start = lengths[0] if len(set(lengths)) == 1 else None
        return cls(to_device(lengths, device), num_slots, max(lengths) + num_slots, start, min(lengths))

    def span(self) -> Span:
        rows = slice(len(self.lengths_B))
        if self.start is not None:
            return Span(rows, self.num_slots, end=self.end, start=self.start)
        return Span(rows, self.num_slots, end=self.end, starts_B=self.lengths_B)

    def first_key(self, layer_mask: LayerMask) -> int:
        return 0 if layer_mask.window is None else max(0, self.shortest - layer_mask.window + 1)

    def mask(self, layer_mask: LayerMask, dtype: torch.dtype) -> Tensor | None:
        """Additive [B, 1, S, L]; None = all keys are visible. Made once per pass and kind of layer."""
        if layer_mask not in self.masks:
            self.masks[layer_mask] = self.make_mask(layer_mask, dtype)
        return self.masks[layer_mask]

    def make_mask(self, layer_mask: LayerMask, dtype: torch.dtype) -> Tensor | None:
        if self.start is not None and not layer_mask.causal and layer_mask.window is None:
            return None
        keys_L = torch.arange(self.first_key(layer_mask), self.end, device=self.lengths_B.device)
        slots_BS1 = self.positions_BS[..., None]
        seen = keys_L <= slots_BS1 if layer_mask.causal else (keys_L < self.lengths_B[:, None, None] + self.num_slots)
        if layer_mask.window is not None:
            seen = seen & ((keys_L - slots_BS1).abs() < layer_mask.window)
        seen_BSL = seen.expand(len(self.lengths_B), self.num_slots, -1)
        return additive_mask(seen_BSL, dtype)[:, None]


class BlockCache(DraftCache):
    """`running` describes the blocks of the running forward."""

    running: BlockPass | None = None

    def start(self, block_pass: BlockPass) -> None:
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
        first, num_rows = running.first_key(self.layer_mask), len(running.lengths_B)
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


class DFlashProposer(FixedRounds):
    """Snapshot of a drafter, made to draft."""

    def __init__(
        self,
        network: DFlashNetwork,
        target_layer_ids: Sequence[int],
        d2t: Tensor | None,
        verifier_vocab_size: int,
        *,
        max_batch_size: int,
        max_length: int,
    ):
        """`network` as it trains: the constructor fuses it."""
        self.capture = CaptureSpec(aux_layer_ids=tuple(target_layer_ids))
        self.d2t, self.verifier_vocab_size = d2t, verifier_vocab_size
        self.context_kv = network.context_projection()
        self.network = network.fused()
        weight = self.network.fc.weight
        self.device, self.dtype = weight.device, weight.dtype
        num_layers, _, num_kv_heads, head_dim = self.context_kv.shape
        self.cache = BlockCache(
            num_layers, max_batch_size, num_kv_heads, head_dim, dtype=self.dtype, device=self.device
        )
        self.cache.reserve(min(max_length, INITIAL_CAPACITY))
        self.layer_attention = self.cache.block_attention(network.layer_masks)
        self.prepacked = PrepackedLinears(
            *self.network.layers, nn.ModuleList([self.network.fc, self.network.lm_head, self.context_kv])
        )

    @torch.inference_mode()
    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        known = read_on_host(committed)
        num_new, num_committed = known.num_new, known.num_committed
        with self.prepacked:
            if self.shapes is not None and num_tokens > 0:
                drafts = self.draft_at_fixed_shapes(self.shapes, committed, num_tokens, sampling)
            else:
                anchor_B = self.ingest(committed, num_new, num_committed)
                if num_tokens == 0:
                    return Proposal(anchor_B.new_empty(len(num_new), 0))
                drafts = self.draft(self.fill(anchor_B, self.blocks_behind(anchor_B, num_tokens)), anchor_B, sampling)
        draft_ids_BK, probs_BKV, confidence_BK = drafts
        draft_ids_BK = without_idle(draft_ids_BK, [new > 0 for new in num_new])
        return Proposal(draft_ids_BK, probs_BKV, confidence_BK=confidence_BK)

    @torch.inference_mode()
    def slots_after(self, committed: Committed, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns logits [B, K, V_draft] and hidden states [B, K, H] of the slots behind what was committed."""
        known = read_on_host(committed)
        num_new, num_committed = known.num_new, known.num_committed
        with self.prepacked:
            anchor_B = self.ingest(committed, num_new, num_committed)
            hidden_BKH = self.fill(anchor_B, self.blocks_behind(anchor_B, num_tokens))
            return self.network.lm_head(hidden_BKH), hidden_BKH

    def slot_log_probs(self, committed: Committed, num_tokens: int) -> Tensor:
        """Log-probabilities [B, K, V_draft] of each slot, which do not depend on the other drafts."""
        return self.slots_after(committed, num_tokens)[0].float().log_softmax(-1)

    def ingest(self, committed: Committed, num_new: list[int], num_committed: list[int]) -> Tensor:
        """Writes the context entries of what was committed; returns the last token of each row, [B]."""
        self.commit(committed, num_new, num_committed)
        return committed.token_ids_BT.gather(1, last_column(committed)[:, None])[:, 0]

    def commit(self, committed: Committed, num_new: list[int], num_committed: list[int]) -> None:
        """Writes the context entries of the new states, of all rows and layers at once."""
        assert committed.states_BTD is not None
        for row, (new, total) in enumerate(zip(num_new, num_committed, strict=True)):
            if new:
                self.cache.lengths[row] = total - 1
        self.cache.reserve(max(num_committed))
        # Column 0 of a new request has no state, hence no entry.
        entries = [
            (row, column, total - new + column - 1)
            for row, (new, total) in enumerate(zip(num_new, num_committed, strict=True))
            for column in range(int(new == total), new)
        ]
        row_M, column_M, position_M = to_device(entries, self.device).view(-1, 3).unbind(1)
        self.write_context(row_M, position_M, committed.states_BTD[row_M, column_M], max(num_committed))

    def write_context(self, row_M: Tensor, position_M: Tensor, states_MD: Tensor, end: int) -> None:
        """`end`: above all positions."""
        rope = self.network.rope.tables(end, self.device, self.dtype).at(position_M)
        context_MH = self.network.context(states_MD.to(self.dtype))
        self.cache.write_context(row_M, position_M, self.context_kv(context_MH, rope))

    def blocks_behind(self, anchor_B: Tensor, num_tokens: int) -> BlockPass:
        lengths = self.cache.lengths[: len(anchor_B)]
        self.cache.reserve(max(lengths) + num_tokens + self.network.first_slot)
        return BlockPass.behind(lengths, num_tokens + self.network.first_slot, self.device)

    def fill(self, anchor_B: Tensor, running: BlockPass) -> Tensor:
        """Runs the blocks; returns the hidden states of the slots that draft: [B, K, H]."""
        self.cache.start(running)
        rope = self.network.rope.tables(running.end, self.device, self.dtype).at(running.positions_BS)
        token_ids_BS = self.network.blocks(anchor_B, running.num_slots)
        return self.network.forward(token_ids_BS, rope, self.layer_attention)[:, self.network.first_slot :]

    def draft(self, hidden_BKH: Tensor, anchor_B: Tensor, sampling: DraftSampling) -> Drafts:
        """Drafts each slot independently of the others."""
        logits_BKV = self.network.lm_head(hidden_BKH)
        return *draft_slots(logits_BKV, sampling, self.d2t, self.verifier_vocab_size), None

    # -- at fixed shapes ---------------------------------------------------------------------------------------------

    def draft_at_fixed_shapes(
        self, shapes: FixedShapes, committed: Committed, num_tokens: int, sampling: DraftSampling
    ) -> Drafts:
        """Entries of prompts, and other long runs, are written as they come."""
        known = read_on_host(committed)
        num_new, num_committed = known.num_new, known.num_committed
        is_long = [0 < new == total or new >= ALONE_FROM for new, total in zip(num_new, num_committed, strict=True)]
        if any(is_long):
            long = [new if at_once else 0 for new, at_once in zip(num_new, is_long, strict=True)]
            self.commit(committed, long, num_committed)
        counts = [0 if at_once else new for new, at_once in zip(num_new, is_long, strict=True)]
        starts = [
            total - 1 - new if new else length
            for length, new, total in zip(self.cache.lengths, counts, num_committed, strict=False)
        ]
        return self.draft_round(shapes, committed, starts, counts, num_tokens, sampling)

    def noise_shapes(self, num_rows: int, num_tokens: int) -> list[tuple[int, ...]]:
        return [(num_rows, num_tokens, self.network.lm_head.out_features)]

    def compute_drafts(self, entries: Entries, num_slots: int, num_tokens: int, sampling: DraftSampling) -> Drafts:
        R, T = entries.tokens_RT.shape
        position_RT = entries.start_R[:, None] + torch.arange(T, device=self.device)
        row_RT = torch.arange(R, device=self.device)[:, None].expand(R, T)
        # what a row has no entries for is written behind its context, where its block comes next
        self.write_context(row_RT.flatten(), position_RT.flatten(), entries.states_RTD.flatten(0, 1), num_slots)
        running = BlockPass(entries.start_R + entries.count_R, num_tokens + self.network.first_slot, num_slots)
        return self.draft(self.fill(entries.last_R, running), entries.last_R, sampling)


def last_column(committed: Committed) -> Tensor:
    return (committed.num_new_B - 1).clamp_min(0)
