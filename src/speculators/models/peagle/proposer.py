"""Drafts with P-EAGLE: one forward reads what was committed and fills the masked slots behind it.

Shapes: B rows, T committed columns, C new entries, K draft tokens, W = C + K - 1 columns, V verifier vocabulary.

    sequence   x0   x1   x2   x3                    committed: token x[i] with the state g[i-1] that predicted it
    entry      (x1,g0) (x2,g1) (x3,g2)              positions 0 1 2
    slots                              m   m   m    positions 3 4 5: the mask token and the mask state
    drafts                     x4      x5  x6  x7   read at the last entry and at the slots

The slots' keys are scratch behind the entries: the next commit writes over them (see `nn.cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speculators.interfaces import CaptureSpec, Committed, DraftSampling
from speculators.models.eagle3.network import Eagle3Network
from speculators.models.feedback_proposer import FeedbackProposer
from speculators.nn.cache import ALONE_FROM, Span
from speculators.nn.device import read_on_host
from speculators.nn.draft_tokens import draft_slots
from speculators.nn.graphs import Drafts, Entries, entries_of


class PEagleProposer(FeedbackProposer):
    """Snapshot of a drafter, made to draft. `network` should be fused."""

    def __init__(
        self,
        network: Eagle3Network,
        mask_token_id: int,
        mask_hidden_11D: Tensor,
        target_layer_ids: Sequence[int],
        d2t: Tensor | None,
        verifier_vocab_size: int,
        **sizes: Any,
    ):
        capture = CaptureSpec(aux_layer_ids=tuple(target_layer_ids))
        super().__init__(network, capture, d2t, verifier_vocab_size, **sizes)
        self.mask_token_id = mask_token_id
        with torch.inference_mode():
            self.slot_11H = network.combine(mask_hidden_11D.to(self.dtype))

    def draft_as_shapes_come(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Drafts:
        known = read_on_host(committed)
        normed_BKH = self.fill(committed, known.num_new, known.num_committed, max(num_tokens, 1))[:, :num_tokens]
        return self.draft_all(normed_BKH, sampling)

    def draft_all(self, normed_BKH: Tensor, sampling: DraftSampling) -> Drafts:
        logits_BKV = self.network.lm_head(normed_BKH)
        return *draft_slots(logits_BKV, sampling, self.d2t, self.verifier_vocab_size), None

    @torch.inference_mode()
    def slot_log_probs(self, committed: Committed, num_tokens: int) -> Tensor:
        """Log-probabilities [B, K, V_draft] of each slot, which do not depend on the other drafts."""
        known = read_on_host(committed)
        num_new, num_committed = known.num_new, known.num_committed
        with self.prepacked:
            normed_BKH = self.fill(committed, num_new, num_committed, num_tokens)
            return self.network.lm_head(normed_BKH).float().log_softmax(-1)

    def fill(self, committed: Committed, num_new: list[int], num_committed: list[int], num_tokens: int) -> Tensor:
        """Writes the new entries and the slots behind them; returns the hidden states of last entry and slots."""
        starts, counts, skips = self.new_entries(num_new, num_committed)
        if len(set(counts)) > 1:
            # padding the other rows to these would cost more than forwards of their own
            long = [b for b, count in enumerate(counts) if count >= ALONE_FROM]
            self.read_all_but_last(committed, long, starts, counts, skips)
        span = self.span_of(starts, counts, num_tokens)
        entries = entries_of(committed, starts, counts, len(counts), max(1, *counts))
        tokens_BW, hidden_BWH = self.columns_of(entries, num_tokens)
        self.cache.reserve(span.end)
        self.cache.lengths[: len(starts)] = [start + count for start, count in zip(starts, counts, strict=True)]
        return self.step(tokens_BW, hidden_BWH, span).normed_BRH

    def span_of(self, starts: list[int], counts: list[int], num_tokens: int) -> Span:
        rows, width = slice(0, len(starts)), max(1, *counts) + num_tokens - 1
        if counts[0] > 0 and len(set(zip(starts, counts, strict=True))) == 1:
            return Span(rows, width, end=starts[0] + width, start=starts[0], num_queries=num_tokens)
        # Rows without new entries write past their end, where no query reads.
        span = Span(rows, width, end=max(starts) + width, starts_B=self.tensor(starts), num_queries=num_tokens)
        span.first_query_B = (self.tensor(counts) - 1).clamp_min(0)
        return span

    def columns_of(self, entries: Entries, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns tokens and states of the columns: each row's entries, then masked slots up to the common width."""
        B, num_entries = entries.tokens_RT.shape
        is_entry_BC = torch.arange(num_entries, device=self.device) < entries.count_R[:, None]
        tokens_BC = entries.tokens_RT.where(is_entry_BC, self.mask_token_id)
        true_BCH = self.network.combine(entries.states_RTD.to(self.dtype))
        hidden_BCH = true_BCH.where(is_entry_BC[..., None], self.slot_11H)
        num_slots = num_tokens - 1
        tokens_BS = tokens_BC.new_full((B, num_slots), self.mask_token_id)
        slots_BSH = self.slot_11H.expand(B, num_slots, -1)
        return torch.cat((tokens_BC, tokens_BS), 1), torch.cat((hidden_BCH, slots_BSH), 1)

    # -- at fixed shapes ---------------------------------------------------------------------------------------------

    def noise_shapes(self, num_rows: int, num_tokens: int) -> list[tuple[int, ...]]:
        return [(num_rows, num_tokens, self.network.lm_head.out_features)]

    def compute_drafts(self, entries: Entries, num_slots: int, num_tokens: int, sampling: DraftSampling) -> Drafts:
        R, num_columns = entries.tokens_RT.shape
        width = num_columns + num_tokens - 1
        span = Span(slice(0, R), width, end=num_slots, starts_B=entries.start_R, num_queries=num_tokens)
        span.first_query_B = (entries.count_R - 1).clamp_min(0)
        tokens_RW, hidden_RWH = self.columns_of(entries, num_tokens)
        return self.draft_all(self.step(tokens_RW, hidden_RWH, span).normed_BRH, sampling)
