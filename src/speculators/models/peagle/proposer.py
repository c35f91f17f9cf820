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

from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal
from speculators.models.eagle3.network import Eagle3Network
from speculators.models.feedback_proposer import ALONE_FROM, FeedbackProposer
from speculators.nn.cache import Span
from speculators.nn.device import read_on_host, to_device
from speculators.nn.draft_tokens import NO_DRAFT, draft_slots


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

    @torch.inference_mode()
    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        known = read_on_host(committed)
        num_new, num_committed = known.num_new, known.num_committed
        with self.prepacked:
            normed_BKH = self.fill(committed, num_new, num_committed, max(num_tokens, 1))[:, :num_tokens]
            logits_BKV = self.network.lm_head(normed_BKH)
            draft_ids_BK, probs_BKV = draft_slots(logits_BKV, sampling, self.d2t, self.verifier_vocab_size)
        drafts_B = [new > 0 and total > 1 for new, total in zip(num_new, num_committed, strict=True)]
        if not all(drafts_B):
            idle_B1 = ~to_device(drafts_B, self.device, torch.bool)[:, None]
            draft_ids_BK = draft_ids_BK.masked_fill(idle_B1, NO_DRAFT)
        return Proposal(draft_ids_BK, probs_BKV)

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
            for b in [b for b, count in enumerate(counts) if count >= ALONE_FROM]:
                # padding the other rows to this one would cost more than a forward of its own
                num_alone = counts[b] - 1
                end = starts[b] + num_alone
                self.cache.reserve(end)
                self.read(committed, Span(slice(b, b + 1), num_alone, end=end, start=starts[b]), skips[b])
                starts[b], skips[b], counts[b] = end, skips[b] + num_alone, 1
        span = self.span_of(starts, counts, num_tokens)
        tokens_BW, hidden_BWH = self.columns_of(committed, counts, skips, num_tokens)
        self.cache.reserve(span.end)
        self.cache.lengths[: len(starts)] = [start + count for start, count in zip(starts, counts, strict=True)]
        return self.step(tokens_BW, hidden_BWH, span).normed_BRH

    def new_entries(self, num_new: list[int], num_committed: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Returns, per row: position of its first new entry, number of new entries, and columns before them."""
        starts, counts, skips = [], [], []
        for length, new, total in zip(self.cache.lengths, num_new, num_committed, strict=False):
            is_new = 0 < new == total
            starts.append(length if new == 0 else max(total - new - 1, 0))
            counts.append(new - int(is_new))  # column 0 of a new request has no state, hence no entry
            skips.append(int(is_new))
        return starts, counts, skips

    def span_of(self, starts: list[int], counts: list[int], num_tokens: int) -> Span:
        rows, width = slice(0, len(starts)), max(1, *counts) + num_tokens - 1
        if counts[0] > 0 and len(set(zip(starts, counts, strict=True))) == 1:
            return Span(rows, width, end=starts[0] + width, start=starts[0], num_queries=num_tokens)
        # Rows without new entries write past their end, where no query reads.
        span = Span(rows, width, end=max(starts) + width, starts_B=self.tensor(starts), num_queries=num_tokens)
        span.first_query_B = (self.tensor(counts) - 1).clamp_min(0)
        return span

    def columns_of(
        self, committed: Committed, counts: list[int], skips: list[int], num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Returns tokens and states of the columns: each row's entries, then masked slots up to the common width."""
        assert committed.states_BTD is not None
        num_entries = max(1, *counts)
        column_C = torch.arange(num_entries, device=self.device)
        source_BC = (self.tensor(skips)[:, None] + column_C).clamp_max(committed.token_ids_BT.shape[1] - 1)
        is_entry_BC = column_C < self.tensor(counts)[:, None]
        row_B1 = torch.arange(len(counts), device=self.device)[:, None]
        tokens_BC = committed.token_ids_BT[row_B1, source_BC].where(is_entry_BC, self.mask_token_id)
        true_BCH = self.network.combine(committed.states_BTD[row_B1, source_BC].to(self.dtype))
        hidden_BCH = true_BCH.where(is_entry_BC[..., None], self.slot_11H)
        num_slots = num_tokens - 1
        tokens_BS = tokens_BC.new_full((len(counts), num_slots), self.mask_token_id)
        slots_BSH = self.slot_11H.expand(len(counts), num_slots, -1)
        return torch.cat((tokens_BC, tokens_BS), 1), torch.cat((hidden_BCH, slots_BSH), 1)
