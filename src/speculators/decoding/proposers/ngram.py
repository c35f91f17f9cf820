"""Prompt lookup: the draft is what followed the last tokens when they occurred before.

Context c[0..n-1] = prompt and output. For sizes max_n down to min_n: find an earlier occurrence of the last `size`
tokens; the draft is what followed it. Each row keeps an index from n-gram to position, which grows by the new tokens
only, so a round costs the same at any context length.

    c      a b c d  x y  a b c        size 3: "a b c" ended at e = 2 before
    draft  d x y ...                  c[e+1 ...]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from speculators.decoding.rows import new_tokens_by_row, proposal_of
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal

Pick = Literal["earliest", "latest"]


@dataclass
class NgramIndex:
    """One sequence and, for each n-gram in it, where it ended: first (earliest) or last (latest)."""

    min_n: int
    max_n: int
    pick: Pick = "latest"
    tokens: list[int] = field(default_factory=list)
    _end_by_ngram: dict[tuple[int, ...], int] = field(default_factory=dict)
    _num_indexed: int = 0

    def extend(self, token_ids: list[int]) -> None:
        """Append tokens. N-grams that end at the very last token are not indexed: they are looked up next."""
        self.tokens += token_ids
        tokens, index, is_earliest = self.tokens, self._end_by_ngram, self.pick == "earliest"
        for end in range(self._num_indexed, len(tokens) - 1):
            for size in range(self.min_n, min(self.max_n, end + 1) + 1):
                ngram = tuple(tokens[end + 1 - size : end + 1])
                if is_earliest:
                    index.setdefault(ngram, end)
                else:
                    index[ngram] = end
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)

    def draft(self, num_tokens: int) -> list[int]:
        """At most `num_tokens` continuation tokens; empty if no n-gram of the suffix occurred before."""
        tokens = self.tokens
        for size in range(min(self.max_n, len(tokens)), self.min_n - 1, -1):
            end = self._end_by_ngram.get(tuple(tokens[-size:]))
            if end is not None:
                return self._continuation(end + 1, num_tokens)
        return []

    def _continuation(self, start: int, num_tokens: int) -> list[int]:
        draft = self.tokens[start : start + num_tokens]
        if self.pick == "latest":  # a recent match ends soon: continue by copying the draft itself, as LZ77 does
            period = len(self.tokens) - start
            while len(draft) < num_tokens:
                draft.append(draft[len(draft) - period])
        return draft


class NgramProposer:
    """Drafts from each row's own text. `earliest` gives vLLM's numba matcher's drafts token for token."""

    def __init__(self, min_n: int, max_n: int, *, pick: Pick = "latest", max_batch_size: int):
        if not 1 <= min_n <= max_n:
            raise ValueError(f"prompt_lookup_min={min_n} and prompt_lookup_max={max_n} must satisfy 1 <= min <= max")
        self.capture = CaptureSpec()
        self._new_index = lambda: NgramIndex(min_n, max_n, pick)
        self._index_by_row = [self._new_index() for _ in range(max_batch_size)]

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        drafts: list[list[int]] = []
        for row, (token_ids, is_new) in enumerate(new_tokens_by_row(committed)):
            if is_new:
                self._index_by_row[row] = self._new_index()
            if not token_ids:
                drafts.append([])
                continue
            self._index_by_row[row].extend(token_ids)
            drafts.append(self._index_by_row[row].draft(num_tokens))
        return proposal_of(drafts, committed.token_ids_BT.device)
