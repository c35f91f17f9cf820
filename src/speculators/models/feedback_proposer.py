"""Drafts chains with drafters that are fed their own states: all rows of the batch at once, on the drafter's own cache.

Shapes: B rows, T committed columns, R query columns, K draft tokens, D width of verifier states, V verifier
vocabulary.

    sequence   x0   x1   x2   x3            committed: token x[i] with the state g[i-1] that predicted it
    entry      (x1,g0) (x2,g1) (x3,g2)      position  0  1  2 in the draft cache; the last one drafts x4
    drafts     (x4', h2) (x5', h3) ...      positions 3, 4, ...: fed back states; overwritten by the next commit

Rejected drafts are never erased: the next commit writes true entries over them (see `nn.cache`).

At fixed shapes (`nn.graphs`) long runs of entries, as those of a prompt, are read as they come, all but the last one;
what is left of all rows, and the drafts, are one computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal
from speculators.nn.attention import AttentionFunction
from speculators.nn.cache import ALONE_FROM, INITIAL_CAPACITY, DraftCache, Span
from speculators.nn.device import read_on_host, to_device
from speculators.nn.draft_tokens import draft_from, scatter_to_verifier, verifier_ids, without_idle
from speculators.nn.graphs import Drafts, Entries, FixedRounds, FixedShapes
from speculators.nn.prepacked_linear import PrepackedLinears
from speculators.nn.rope import Rope, RopeTables


class StepOutput(NamedTuple):
    normed_BRH: Tensor
    """Input of the head."""
    fed_back_BRH: Tensor
    """The hidden state of the next step."""


class FeedbackNetwork(Protocol):
    """A drafter's network as the proposer uses it."""

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def windows(self) -> list[int | None]: ...

    @property
    def lm_head(self) -> nn.Linear: ...

    @property
    def rope(self) -> Rope: ...

    @property
    def linears(self) -> Sequence[nn.Linear]:
        """Linears outside the layers that every step uses."""
        ...

    def combine(self, features_BTD: Tensor, /) -> Tensor:
        """Maps verifier states to the hidden states of true entries: [B, T, H]."""
        ...

    def step(
        self,
        token_ids_BT: Tensor,
        hidden_BTH: Tensor,
        rope: RopeTables,
        layer_attention: Sequence[AttentionFunction],
        /,
    ) -> StepOutput: ...


class FeedbackProposer(FixedRounds):
    """Snapshot of a drafter, made to draft. `network` should be fused."""

    def __init__(
        self,
        network: FeedbackNetwork,
        capture: CaptureSpec,
        d2t: Tensor | None,
        verifier_vocab_size: int,
        *,
        max_batch_size: int,
        max_length: int,
        input_tokens: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        """`input_tokens`: (token ids, positions) -> the ids that the network embeds; None = the ids themselves."""
        self.network: Any = network
        self.input_tokens = input_tokens
        self.capture, self.d2t, self.verifier_vocab_size = capture, d2t, verifier_vocab_size
        self.verifier_id_D = verifier_ids(d2t) if d2t is not None else None
        attention = network.layers[0].self_attn
        weight = network.linears[0].weight
        self.device, self.dtype = weight.device, weight.dtype
        self.cache = DraftCache(
            len(network.layers),
            max_batch_size,
            attention.num_kv_heads,
            attention.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self.cache.reserve(min(max_length, INITIAL_CAPACITY))
        self.layer_attention = self.cache.layer_attention(network.windows)
        self.prepacked = PrepackedLinears(*network.layers, nn.ModuleList(network.linears))

    @torch.inference_mode()
    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        known = read_on_host(committed)
        num_new, num_committed = known.num_new, known.num_committed
        with self.prepacked:
            if self.shapes is not None and num_tokens > 0:
                drafts = self.draft_at_fixed_shapes(self.shapes, committed, num_tokens, sampling)
            else:
                drafts = self.draft_as_shapes_come(committed, num_tokens, sampling)
        draft_ids_BK, probs_BKV, confidence_BK = drafts
        drafts_B = [new > 0 and total > 1 for new, total in zip(num_new, num_committed, strict=True)]
        return Proposal(without_idle(draft_ids_BK, drafts_B), probs_BKV, confidence_BK=confidence_BK)

    def draft_as_shapes_come(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Drafts:
        known = read_on_host(committed)
        output = self.commit(committed, known.num_new, known.num_committed)
        return self.draft(output, self.spans_behind(len(known.num_new), num_tokens), num_tokens, sampling)

    # -- reading what was committed ----------------------------------------------------------------------------------

    def commit(self, committed: Committed, num_new: list[int], num_committed: list[int]) -> StepOutput:
        """Writes true entries over the drafted ones; returns the output at each row's last token, [B, 1, H]."""
        starts, counts, skips = self.new_entries(num_new, num_committed)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self.cache.reserve(max(ends) + 1)
        if counts[0] > 0 and len(set(zip(starts, counts, skips, strict=True))) == 1:
            span = Span(slice(0, len(counts)), counts[0], end=ends[0], start=starts[0])
            output = self.read(committed, span, skips[0])
        else:
            output = self.commit_ragged(committed, starts, counts, skips)
        self.cache.lengths[: len(ends)] = ends
        return output

    def new_entries(self, num_new: list[int], num_committed: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Returns, per row: position of its first new entry, number of new entries, and columns before them."""
        starts, counts, skips = [], [], []
        for length, new, total in zip(self.cache.lengths, num_new, num_committed, strict=False):
            is_new = 0 < new == total
            starts.append(length if new == 0 else max(total - new - 1, 0))
            counts.append(new - int(is_new))  # column 0 of a new request has no state, hence no entry
            skips.append(int(is_new))
        return starts, counts, skips

    def commit_ragged(self, committed: Committed, starts: list[int], counts: list[int], skips: list[int]) -> StepOutput:
        alone = {b for b, count in enumerate(counts) if count and (skips[b] or count >= ALONE_FROM)}
        together = [0 if b in alone else count for b, count in enumerate(counts)]
        outputs: list[StepOutput] = []
        if any(together):
            # Rows without new entries write past their end, where no query reads.
            begins = [start + counts[b] if b in alone else start for b, start in enumerate(starts)]
            width = max(together)
            self.cache.reserve(max(begins) + width)
            span = Span(slice(0, len(counts)), width, end=max(begins) + width, starts_B=self.tensor(begins))
            span.first_query_B = (self.tensor(together) - 1).clamp_min(0)
            outputs = [self.read(committed, span, 0)]
        blank = torch.zeros(len(counts), 1, self.network.lm_head.in_features, dtype=self.dtype, device=self.device)
        normed, fed_back = outputs[0] if outputs else (blank, blank.clone())
        normed, fed_back = normed.clone(), fed_back.clone()
        for b in alone:
            span = Span(slice(b, b + 1), counts[b], end=starts[b] + counts[b], start=starts[b])
            normed[b : b + 1], fed_back[b : b + 1] = self.read(committed, span, skips[b])
        return StepOutput(normed, fed_back)

    def read(self, committed: Committed, span: Span, skip: int) -> StepOutput:
        """Runs one step over true states: the span's rows from column `skip` on."""
        assert committed.states_BTD is not None
        columns = slice(skip, skip + span.num_columns)
        states_BTD = committed.states_BTD[span.rows, columns].to(self.dtype)
        return self.step(committed.token_ids_BT[span.rows, columns], self.network.combine(states_BTD), span)

    def step(self, token_ids_BT: Tensor, hidden_BTH: Tensor, span: Span) -> StepOutput:
        tables = self.network.rope.tables(span.end, self.device, self.dtype)
        if span.starts_B is None:
            rope = tables.slice(span.end - span.num_columns, span.end)
        else:
            rope = tables.at(span.positions(self.device))
        if self.input_tokens is not None:
            token_ids_BT = self.input_tokens(token_ids_BT, span.positions(self.device))
        self.cache.span = span
        return self.network.step(token_ids_BT, hidden_BTH, rope, self.layer_attention)

    def tensor(self, values: list[int]) -> Tensor:
        return to_device(values, self.device)

    # -- drafting ----------------------------------------------------------------------------------------------------

    def spans_behind(self, num_rows: int, num_tokens: int) -> list[Span]:
        """Where the tokens go that are fed back: one column behind each row's entries, then one behind that, ..."""
        lengths = self.cache.lengths[:num_rows]
        longest, rows = max(lengths), slice(0, num_rows)
        self.cache.reserve(longest + num_tokens)
        if len(set(lengths)) == 1:
            return [Span(rows, 1, end=longest + k + 1, start=longest + k) for k in range(num_tokens - 1)]
        lengths_B = self.tensor(lengths)
        return [Span(rows, 1, end=longest + k + 1, starts_B=lengths_B + k) for k in range(num_tokens - 1)]

    def draft(self, output: StepOutput, spans: Sequence[Span], num_tokens: int, sampling: DraftSampling) -> Drafts:
        """Returns drafts [B, K], the distributions they were drawn from, and the largest probability of each."""
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        confidence: list[Tensor] = []
        for k in range(num_tokens):
            logits_BV = self.network.lm_head(output.normed_BRH[:, -1])
            if sampling.wants_confidence:
                confidence.append(logits_BV.float().softmax(-1).amax(-1))
            draft_ids_B, probs_BV = draft_from(logits_BV, sampling)
            if probs_BV is not None:
                probs.append(scatter_to_verifier(probs_BV, self.d2t, self.verifier_vocab_size))
            tokens.append(draft_ids_B if self.verifier_id_D is None else self.verifier_id_D[draft_ids_B])
            if k < num_tokens - 1:
                output = self.step(tokens[-1][:, None], output.fed_back_BRH, spans[k])
        if not tokens:
            return torch.empty(len(output.normed_BRH), 0, dtype=torch.int64, device=self.device), None, None
        probs_BKV = torch.stack(probs, 1) if probs else None
        return torch.stack(tokens, 1), probs_BKV, torch.stack(confidence, 1) if confidence else None

    # -- at fixed shapes ---------------------------------------------------------------------------------------------

    def draft_at_fixed_shapes(
        self, shapes: FixedShapes, committed: Committed, num_tokens: int, sampling: DraftSampling
    ) -> Drafts:
        known = read_on_host(committed)
        starts, counts, skips = self.new_entries(known.num_new, known.num_committed)
        long = [b for b, count in enumerate(counts) if count and (skips[b] or count >= ALONE_FROM)]
        self.read_all_but_last(committed, long, starts, counts, skips)
        return self.draft_round(shapes, committed, starts, counts, num_tokens, sampling)

    def read_all_but_last(
        self, committed: Committed, rows: list[int], starts: list[int], counts: list[int], skips: list[int]
    ) -> None:
        """Reads new entries of these rows, each by itself, and leaves the last one of each."""
        for b in rows:
            num_read = counts[b] - 1
            end = starts[b] + num_read
            if num_read:
                self.cache.reserve(end)
                self.read(committed, Span(slice(b, b + 1), num_read, end=end, start=starts[b]), skips[b])
            starts[b], skips[b], counts[b] = end, skips[b] + num_read, 1

    def noise_shapes(self, num_rows: int, num_tokens: int) -> list[tuple[int, ...]]:
        return [(num_rows, self.network.lm_head.out_features)] * num_tokens

    def compute_drafts(self, entries: Entries, num_slots: int, num_tokens: int, sampling: DraftSampling) -> Drafts:
        rows, num_columns = slice(0, len(entries.count_R)), entries.tokens_RT.shape[1]
        span = Span(rows, num_columns, end=num_slots, starts_B=entries.start_R)
        span.first_query_B = (entries.count_R - 1).clamp_min(0)
        hidden_RTH = self.network.combine(entries.states_RTD.to(self.dtype))
        output = self.step(entries.tokens_RT, hidden_RTH, span)
        ends_R = entries.start_R + entries.count_R
        spans = [Span(rows, 1, end=num_slots, starts_B=ends_R + k) for k in range(num_tokens - 1)]
        return self.draft(output, spans, num_tokens, sampling)
