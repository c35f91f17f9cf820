"""The rows of a batch: which request sits where, what it has emitted, and what the proposer has not been told yet.

Shapes: B rows 0 .. (highest used row), K draft slots, T tokens, D width of captured states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculators.decoding.request import FinishReason, RequestOutput, StreamEvent, TokenLogprobs
from speculators.decoding.sampling import BatchSampling, SamplingParams, SeenTokens
from speculators.decoding.text import IncrementalText
from speculators.interfaces import Committed


@dataclass
class ActiveRequest:
    """A request from its arrival to its end."""

    index: int
    params: SamplingParams
    seed: int
    end_ids: frozenset[int]
    """Tokens that end it: end-of-sequence unless ignored, and its own stop ids."""
    max_length: int
    output: RequestOutput
    text: IncrementalText | None
    num_prefilled: int = 0
    prompt_states: list[Tensor] = field(default_factory=list)
    """Captured states of the prefilled part of the prompt, [T, D] each; none when nobody reads them."""

    @property
    def prompt(self) -> list[int]:
        return self.output.prompt_token_ids

    @property
    def length(self) -> int:
        return len(self.output.prompt_token_ids) + len(self.output.token_ids)

    @property
    def last_token_id(self) -> int:
        return self.output.token_ids[-1]

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled == len(self.prompt)

    def take_prompt_states(self) -> Tensor:
        """[prompt + 1, D] aligned like `interfaces.Committed`: column 0 has no state, column i has that of i - 1."""
        states_TD = torch.cat(self.prompt_states)
        self.prompt_states = [states_TD]  # until the row is free: other prompts may begin alike
        return torch.cat([torch.zeros_like(states_TD[:1]), states_TD])

    def take_over(self, donor: ActiveRequest, num_tokens: int) -> None:
        """The start of the prompt is the donor's: so are its states, where a proposer reads them."""
        self.num_prefilled = num_tokens
        if donor.prompt_states:
            self.prompt_states = [torch.cat(donor.prompt_states)[:num_tokens]]

    def take(self, token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> StreamEvent:
        """Append an accepted run, cut after the first token that ends the request."""
        num_taken, finish_reason = 0, None
        for token_id in token_ids:
            self.output.token_ids.append(token_id)
            num_taken += 1
            finish_reason = self._ends_with(token_id)
            if finish_reason is not None:
                break
        self.output.stats.num_tokens += num_taken
        if logprobs is not None and self.output.logprobs is not None:
            self.output.logprobs += logprobs[:num_taken]
        if finish_reason is not None:
            self.finish(finish_reason)
        text = self.text.take(is_final=finish_reason is not None) if self.text is not None else ""
        kept_logprobs = logprobs[:num_taken] if logprobs is not None else None
        return StreamEvent(self.index, token_ids[:num_taken], text, finish_reason, kept_logprobs)

    def _ends_with(self, token_id: int) -> FinishReason | None:
        # the string first: a token may complete it and be the last one allowed
        if self.text is not None and self.text.add(token_id):
            return "stop"
        if token_id in self.end_ids:
            return "stop"
        if len(self.output.token_ids) >= self.params.max_tokens or self.length >= self.max_length:
            return "length"
        return None

    def finish(self, reason: FinishReason) -> None:
        if self.text is not None:
            self.text.finish()
            self.output.text = self.text.text
        self.output.finish_reason = reason

    def cancel(self) -> StreamEvent:
        """End it here, with the text that waited for what would follow."""
        self.finish("cancelled")
        return StreamEvent(self.index, [], self.text.take(is_final=True) if self.text is not None else "", "cancelled")


class Batch:
    """Requests in rows, and requests waiting for one."""

    def __init__(self, requests: Sequence[ActiveRequest], num_rows: int, vocab_size: int, device: torch.device):
        self.waiting = deque(requests)
        self.rows: list[ActiveRequest | None] = [None] * num_rows
        self.device = device
        self.seen: SeenTokens | None = None
        if any(request.params.has_penalties for request in requests):
            self.seen = SeenTokens(num_rows, vocab_size, device)
        self.last_length = [0] * num_rows
        self._untold: list[_Emitted] = []
        self._sampling: dict[tuple[int, int], BatchSampling] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or any(row is not None for row in self.rows)

    @property
    def width(self) -> int:
        """B: rows up to the highest used one."""
        return max((r + 1 for r, request in enumerate(self.rows) if request is not None), default=0)

    def decoding(self) -> dict[int, ActiveRequest]:
        return {r: request for r, request in enumerate(self.rows) if request is not None and request.is_prefilled}

    def prefilling(self) -> dict[int, ActiveRequest]:
        return {r: request for r, request in enumerate(self.rows) if request is not None and not request.is_prefilled}

    def admit(self) -> list[int]:
        """Put waiting requests into free rows; the rows they took."""
        taken = []
        for row, occupant in enumerate(self.rows):
            if occupant is None and self.waiting:
                request = self.rows[row] = self.waiting.popleft()
                taken.append(row)
                if self.seen is not None:
                    self.seen.start(row, request.prompt)
        if taken:
            self._sampling.clear()
        return taken

    def release(self, row: int) -> None:
        request = self.rows[row]
        assert request is not None
        request.prompt_states = []
        self.rows[row] = None
        self._untold = [emitted.without(row) for emitted in self._untold]
        self._sampling.clear()

    def sampling(self, first: int, last: int) -> BatchSampling:
        """Of rows first .. last - 1; free rows are greedy, which is cheapest."""
        if (first, last) not in self._sampling:
            rows = self.rows[first:last]
            self._sampling[first, last] = BatchSampling(
                [row.params if row is not None else SamplingParams() for row in rows],
                [row.seed if row is not None else 0 for row in rows],
                self.device,
            )
        return self._sampling[first, last]

    def lengths(self, first: int, last: int) -> Tensor:
        """int64 committed lengths of rows first .. last - 1 (0 = free)."""
        lengths = [row.length if row is not None else 0 for row in self.rows[first:last]]
        return torch.tensor(lengths, dtype=torch.int64, device=self.device)

    def tell(self, token_ids_by_row: dict[int, list[int]], states: dict[int, Tensor] | Tensor | None) -> None:
        """Remember for the proposer what each row gained and the states that predicted it."""
        self._untold.append(_Emitted(token_ids_by_row, states))

    def committed(self) -> Committed:
        """Everything emitted since the last call, as the proposer wants it."""
        B = self.width
        for r, request in enumerate(self.rows[:B]):
            if request is not None and request.is_prefilled:
                self.last_length[r] = request.length
        if not self._untold:
            self._untold = [_Emitted({}, None)]
        emitted = self._untold[0] if len(self._untold) == 1 else _merged(self._untold)
        self._untold = []
        num_new = [len(emitted.token_ids_by_row.get(r, ())) for r in range(B)]
        T = max(num_new, default=0)
        padded = [emitted.token_ids_by_row.get(r, []) + [0] * (T - num_new[r]) for r in range(B)]
        return Committed(
            token_ids_BT=torch.tensor(padded, dtype=torch.int64, device=self.device).view(B, T),
            states_BTD=_padded_states(emitted.states, B, T),
            num_new_B=torch.tensor(num_new, dtype=torch.int64, device=self.device),
            num_committed_B=torch.tensor(self.last_length[:B], dtype=torch.int64, device=self.device),
        )


@dataclass(frozen=True)
class _Emitted:
    """Tokens that rows gained, with states: one [B, >= T, D] tensor for all rows, or a [T, D] one for each."""

    token_ids_by_row: dict[int, list[int]]
    states: dict[int, Tensor] | Tensor | None

    def without(self, row: int) -> _Emitted:
        states = self.states
        if isinstance(states, dict):
            states = {r: states_TD for r, states_TD in states.items() if r != row} or None
        return _Emitted({r: ids for r, ids in self.token_ids_by_row.items() if r != row}, states)

    def states_of(self, row: int) -> Tensor:
        assert self.states is not None
        return self.states[row][: len(self.token_ids_by_row[row])]


def _merged(parts: list[_Emitted]) -> _Emitted:
    token_ids: dict[int, list[int]] = {}
    states: dict[int, list[Tensor]] = {}
    for part in parts:
        for row, ids in part.token_ids_by_row.items():
            token_ids.setdefault(row, []).extend(ids)
            if part.states is not None:
                states.setdefault(row, []).append(part.states_of(row))
    return _Emitted(token_ids, {row: torch.cat(chunks) for row, chunks in states.items()} if states else None)


def _padded_states(states: dict[int, Tensor] | Tensor | None, num_rows: int, num_tokens: int) -> Tensor | None:
    if states is None or isinstance(states, Tensor):
        return states if states is None else states[:num_rows, :num_tokens]
    sample = next(iter(states.values()))
    padded_BTD = sample.new_zeros(num_rows, num_tokens, sample.shape[-1])
    for row, states_TD in states.items():
        if row < num_rows:
            padded_BTD[row, : len(states_TD)] = states_TD
    return padded_BTD
