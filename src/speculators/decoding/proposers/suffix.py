"""Drafting by looking text up.

Prompt lookup: the draft is what followed the last tokens when they occurred before.

Context c[0..n-1] = prompt and output. For sizes max_n down to min_n: find an earlier occurrence of the last `size`
tokens; the draft is what followed it. Each row keeps an index from n-gram to position, which grows by the new tokens
only, so a round costs the same at any context length.

    c      a b c d  x y  a b c        size 3: "a b c" ended at e = 2 before
    draft  d x y ...                  c[e+1 ...]

Suffix decoding (arXiv:2411.04975): drafts from the request's own text and from past responses.

Each active request has a local index of its prompt and response; one global index holds the latest responses. The draft
is the better-scoring of the two. The package `arctic-inference` is used if it is installed, else the reference index
here; both give the same drafts.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from speculators.decoding.proposers.suffix_index import Limits, SuffixDraft, SuffixIndex
from speculators.decoding.rows import new_tokens_by_row, proposal_of
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal

if TYPE_CHECKING:
    from speculators.decoding.config import SpeculativeConfig

UNKNOWN = -1
"""An id that no sequence has."""
Backend = Literal["auto", "reference", "arctic"]


class DraftTokens(Protocol):
    """The part of a cache's draft that is used."""

    @property
    def token_ids(self) -> Sequence[int]: ...


class SuffixCache(Protocol):
    """The part of arctic-inference's cache interface that is used."""

    def start_request(self, req_id: Hashable, prompt_token_ids: Sequence[int]) -> None: ...
    def stop_request(self, req_id: Hashable) -> None: ...
    def add_active_response(self, req_id: Hashable, token_ids: Sequence[int]) -> None: ...
    def speculate(
        self,
        req_id: Hashable,
        context: Sequence[int],
        *,
        max_spec_tokens: int,
        max_spec_factor: float,
        min_token_prob: float,
    ) -> DraftTokens: ...


class ReferenceSuffixCache:
    """Local indexes of active requests and a global one, oldest dropped first. Negative `max_cached_requests`: all."""

    def __init__(self, max_tree_depth: int, max_cached_requests: int):
        self.max_tree_depth, self.max_cached_requests = max_tree_depth, max_cached_requests
        self._local: dict[Hashable, SuffixIndex] = {}
        self._global = SuffixIndex(max_tree_depth)
        self._sequence_of: dict[Hashable, int] = {}  # in order of arrival
        self._next_sequence = itertools.count()

    @property
    def active_requests(self) -> list[Hashable]:
        return list(self._local)

    @property
    def cached_requests(self) -> list[Hashable]:
        return list(self._sequence_of)

    def start_request(self, req_id: Hashable, prompt_token_ids: Sequence[int]) -> None:
        if req_id in self._local:
            raise ValueError(f"Request '{req_id}' is already active")
        self._local[req_id] = SuffixIndex(self.max_tree_depth)
        self._local[req_id].extend(0, prompt_token_ids)
        if self.max_cached_requests == 0:
            return
        if req_id in self._sequence_of:
            self.evict_cached_response(req_id)
        self._sequence_of[req_id] = next(self._next_sequence)
        while 0 < self.max_cached_requests < len(self._sequence_of):
            self.evict_cached_response(next(iter(self._sequence_of)))

    def stop_request(self, req_id: Hashable) -> None:
        """End a request. Its response stays in the global index until it is evicted."""
        self._check_active(req_id)
        del self._local[req_id]

    def add_active_response(self, req_id: Hashable, token_ids: Sequence[int]) -> None:
        self._check_active(req_id)
        self._local[req_id].extend(0, token_ids)
        if req_id in self._sequence_of:
            self._global.extend(self._sequence_of[req_id], token_ids)

    def evict_cached_response(self, req_id: Hashable) -> None:
        if req_id not in self._sequence_of:
            raise ValueError(f"Request '{req_id}' is not cached")
        sequence = self._sequence_of.pop(req_id)
        if sequence in self._global.sequences:
            self._global.remove(sequence)

    def speculate(
        self,
        req_id: Hashable,
        context: Sequence[int],
        *,
        max_spec_tokens: int,
        max_spec_factor: float,
        min_token_prob: float,
        max_spec_offset: float = 0.0,
        use_tree_spec: bool = False,
    ) -> SuffixDraft:
        self._check_active(req_id)
        limits = Limits(max_spec_factor, min_token_prob, max_spec_offset, use_tree_spec)
        own, past = (
            index.speculate_at_end(sequence, len(context), max_spec_tokens, limits)
            if index.ends_with(sequence, context)
            else index.speculate(context, max_spec_tokens, limits)
            for index, sequence in ((self._local[req_id], 0), (self._global, self._sequence_of.get(req_id, UNKNOWN)))
        )
        return own if own.score >= past.score else past

    def _check_active(self, req_id: Hashable) -> None:
        if req_id not in self._local:
            raise ValueError(f"Request '{req_id}' is not active")


def make_cache(max_tree_depth: int, max_cached_requests: int, backend: Backend = "auto") -> SuffixCache:
    """The installed package's cache, else the reference. Raises ImportError for 'arctic' without the package."""
    is_installed = importlib.util.find_spec("arctic_inference") is not None
    if backend == "reference" or (backend == "auto" and not is_installed):
        return ReferenceSuffixCache(max_tree_depth, max_cached_requests)
    if not is_installed:
        raise ImportError("suffix backend 'arctic' needs the package arctic-inference; or use backend='reference'")
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    return SuffixDecodingCache(max_tree_depth, max_cached_requests)


class SuffixProposer:
    """Drafts of varying length from the suffix cache, one request per row."""

    def __init__(self, config: SpeculativeConfig, *, max_batch_size: int, backend: Backend = "auto"):
        self.capture = CaptureSpec()
        self._depth = config.suffix_decoding_max_tree_depth
        self._limits = {
            "max_spec_factor": config.suffix_decoding_max_spec_factor,
            "min_token_prob": config.suffix_decoding_min_token_prob,
        }
        self._new_cache = lambda: make_cache(self._depth, config.suffix_decoding_max_cached_requests, backend)
        self._num_rows = max_batch_size
        self.reset()

    def reset(self) -> None:
        """Forget all requests and past responses."""
        self.cache = self._new_cache()
        self._request_of_row: list[int | None] = [None] * self._num_rows
        self._context_of_row: list[list[int]] = [[] for _ in range(self._num_rows)]
        self._next_request = itertools.count()

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        drafts: list[list[int]] = []
        for row, (token_ids, is_new) in enumerate(new_tokens_by_row(committed)):
            if not token_ids:
                drafts.append([])
                continue
            if is_new:
                self._start(row, token_ids[:-1])
                token_ids = token_ids[-1:]  # the first sampled token
            request, context = self._request_of_row[row], self._context_of_row[row]
            self.cache.add_active_response(request, token_ids)
            context += token_ids
            del context[: -self._depth]
            draft = self.cache.speculate(request, context, max_spec_tokens=num_tokens, **self._limits)
            drafts.append(list(draft.token_ids))
        return proposal_of(drafts, committed.token_ids_BT.device)

    def _start(self, row: int, prompt: list[int]) -> None:
        previous = self._request_of_row[row]
        if previous is not None:
            self.cache.stop_request(previous)
        self._request_of_row[row] = next(self._next_request)
        self._context_of_row[row] = prompt[-self._depth :]
        self.cache.start_request(self._request_of_row[row], prompt)


# -- prompt lookup

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
