"""The rows of a batch: which request has which row, the tokens that the proposer has not received yet, and how prompts
get into the cache: chunk by chunk, and a start that several prompts share (a system prompt) only once.

Shapes: B rows 0 .. (highest used row), K draft slots, T tokens, D width of captured states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from speculators.decoding.request import ActiveRequest
from speculators.decoding.sampling import BatchSampling, SeenTokens, logprobs_of
from speculators.decoding.settings import SamplingParams
from speculators.interfaces import Committed, Proposal, Verifier, VerifierOutput
from speculators.nn.device import CommittedOnHost, read_on_host, to_device

MIN_SHARED_TOKENS = 16
"""Shorter common starts are computed twice: a copy saves less than the row waits for it."""


class Batch:
    """Requests in rows, and requests that wait for a row. `num_drafters`: how many methods draft for them."""

    def __init__(
        self,
        requests: Sequence[ActiveRequest],
        num_rows: int,
        vocab_size: int,
        device: torch.device,
        num_drafters: int = 1,
    ):
        self.waiting = deque(requests)
        self.rows: list[ActiveRequest | None] = [None] * num_rows
        self.vocab_size, self.device = vocab_size, device
        self.seen: SeenTokens | None = None
        """None until a request has penalties: those of the others are neutral, whatever was counted."""
        self._outboxes = [_Outbox([0] * num_rows) for _ in range(num_drafters)]
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
        """Put waiting requests into free rows; returns the rows they took."""
        taken = []
        for row, occupant in enumerate(self.rows):
            if occupant is None and self.waiting:
                request = self.rows[row] = self.waiting.popleft()
                taken.append(row)
                if self.seen is None and request.params.has_penalties:
                    self.seen = SeenTokens(len(self.rows), self.vocab_size, self.device)
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
        for outbox in self._outboxes:
            outbox.unreported = [rest for p in outbox.unreported if (rest := p.without(row)).token_ids_by_row]
        self._sampling.clear()

    def sampling(self, first: int, last: int) -> BatchSampling:
        """Sampling parameters of rows first .. last - 1; free rows are greedy, which is cheapest."""
        if (first, last) not in self._sampling:
            rows = self.rows[first:last]
            self._sampling[first, last] = BatchSampling(
                [row.params if row is not None else SamplingParams() for row in rows],
                [row.seed if row is not None else 0 for row in rows],
                self.device,
                [row.adjustments if row is not None else () for row in rows],
            )
        return self._sampling[first, last]

    def outputs(self, first: int, last: int) -> list[list[int]]:
        """What rows first .. last - 1 have generated."""
        return [row.output.token_ids if row is not None else [] for row in self.rows[first:last]]

    def lengths(self, first: int, last: int) -> Tensor:
        """int64 committed lengths of rows first .. last - 1 (0 = free), on the host."""
        lengths = [row.length if row is not None else 0 for row in self.rows[first:last]]
        return torch.tensor(lengths)

    def publish(self, token_ids_by_row: dict[int, list[int]], states: dict[int, Tensor] | Tensor | None) -> None:
        """Queue for each row's proposer the tokens the row gained and the states that predicted them."""
        decoding = self.decoding()
        for drafter, outbox in enumerate(self._outboxes):
            own = {row: ids for row, ids in token_ids_by_row.items() if decoding[row].drafter == drafter}
            if own:
                outbox.unreported.append(_Published(own, states).without_others())

    def committed(self, drafter: int = 0) -> Committed:
        """Everything published for a proposer since the last call, padded into one record. The rows of others are
        idle."""
        B, outbox = self.width, self._outboxes[drafter]
        for r, request in enumerate(self.rows[:B]):
            if request is not None and request.is_prefilled and request.drafter == drafter:
                outbox.last_length[r] = request.length
        published = _merged(outbox.unreported)
        outbox.unreported = []
        token_ids = [published.token_ids_by_row.get(r, []) for r in range(B)]
        known = CommittedOnHost(token_ids, [len(ids) for ids in token_ids], outbox.last_length[:B])
        T = max(known.num_new, default=0)
        padded = [ids + [0] * (T - len(ids)) for ids in token_ids]
        return Committed(
            token_ids_BT=to_device(padded, self.device).view(B, T),
            states_BTD=_padded_states(published.states, B, T),
            num_new_B=to_device(known.num_new, self.device),
            num_committed_B=to_device(known.num_committed, self.device),
            on_host=known,
        )


@dataclass
class _Outbox:
    """What one proposer has not received yet."""

    last_length: list[int]
    """Tokens of each row at the last call; 0: the proposer never had it."""
    unreported: list[_Published] = field(default_factory=list)


@dataclass(frozen=True)
class _Published:
    """Tokens that rows gained, with states: one [B, >= T, D] tensor for all rows, or one [T, D] per row."""

    token_ids_by_row: dict[int, list[int]]
    states: dict[int, Tensor] | Tensor | None

    def without(self, row: int) -> _Published:
        states = self.states
        if isinstance(states, dict):
            states = {r: states_TD for r, states_TD in states.items() if r != row} or None
        return _Published({r: ids for r, ids in self.token_ids_by_row.items() if r != row}, states)

    def without_others(self) -> _Published:
        """Without the states of rows that it has no tokens of."""
        if not isinstance(self.states, dict):
            return self
        return _Published(self.token_ids_by_row, {row: self.states[row] for row in self.token_ids_by_row})

    def states_of(self, row: int) -> Tensor:
        assert self.states is not None
        return self.states[row][: len(self.token_ids_by_row[row])]


def _merged(parts: list[_Published]) -> _Published:
    if len(parts) == 1:
        return parts[0]
    token_ids: dict[int, list[int]] = {}
    states: dict[int, list[Tensor]] = {}
    for part in parts:
        for row, ids in part.token_ids_by_row.items():
            token_ids.setdefault(row, []).extend(ids)
            if part.states is not None:
                states.setdefault(row, []).append(part.states_of(row))
    return _Published(token_ids, {row: torch.cat(chunks) for row, chunks in states.items()} if states else None)


def _padded_states(states: dict[int, Tensor] | Tensor | None, num_rows: int, num_tokens: int) -> Tensor | None:
    if states is None:
        return None
    if isinstance(states, Tensor):
        states_BTD = states[:num_rows, :num_tokens]
        return (
            pad(states_BTD, (0, 0, 0, 0, 0, num_rows - len(states_BTD))) if len(states_BTD) < num_rows else states_BTD
        )
    sample = next(iter(states.values()))
    padded_BTD = sample.new_zeros(num_rows, num_tokens, sample.shape[-1])
    for row, states_TD in states.items():
        if row < num_rows:
            padded_BTD[row, : len(states_TD)] = states_TD
    return padded_BTD


# -- for proposers that work row by row


def new_tokens_by_row(committed: Committed) -> list[tuple[list[int], bool]]:
    """Per row: the tokens committed since the last call (empty: the row is idle), and whether a request begins."""
    known = read_on_host(committed)
    return [
        (token_ids, 0 < len(token_ids) == total)
        for token_ids, total in zip(known.token_ids_by_row, known.num_committed, strict=True)
    ]


def proposal_of(drafts: list[list[int]], device: torch.device) -> Proposal:
    """Chains of different lengths, padded to the longest of them: no slot is empty in every row."""
    K = max((len(draft) for draft in drafts), default=0)
    padded = [draft + [-1] * (K - len(draft)) for draft in drafts]
    return Proposal(to_device(padded, device).view(len(drafts), K))


# -- prompts into the cache


def score_chunk(verifier: Verifier, requests: dict[int, ActiveRequest], num_tokens: int) -> VerifierOutput:
    """Score the next `num_tokens` of each prompt in one forward over neighbouring rows, with one row of logits each;
    those of all tokens are computed where a request reports them.

    Padding repeats a row's own token: another's could have a NaN embedding, and its slots may be read with weight 0."""
    chunks = [q.prompt[q.num_prefilled : q.num_prefilled + num_tokens] for q in requests.values()]
    num_valid_B = torch.tensor([len(chunk) for chunk in chunks])
    T = max(len(chunk) for chunk in chunks)
    token_ids_BT = to_device([chunk + chunk[-1:] * (T - len(chunk)) for chunk in chunks], verifier.device)
    reports = any(request.params.prompt_logprobs is not None for request in requests.values())
    output = verifier.score(token_ids_BT, num_valid_B, first_row=next(iter(requests)), last_only=not reports)
    verifier.keep(torch.arange(T).expand(len(chunks), T), num_valid_B)
    if reports:
        report_prompt(requests, output.logits_BTV)
        row_B = torch.arange(len(chunks), device=verifier.device)
        last_B = to_device(num_valid_B - 1, verifier.device)
        output = replace(output, logits_BTV=output.logits_BTV[row_B, last_B][:, None])
    for i, request in enumerate(requests.values()):
        request.num_prefilled += len(chunks[i])
        if output.states_BTD is not None:
            request.prompt_states.append(output.states_BTD[i, : len(chunks[i])])
    return output


def report_prompt(requests: dict[int, ActiveRequest], logits_BTV: Tensor) -> None:
    """Add the log-probabilities of the prompts' next tokens: column j scores the token after the j-th of the chunk."""
    for request, logits_TV in zip(requests.values(), logits_BTV, strict=True):
        if request.params.prompt_logprobs is not None:
            start = request.num_prefilled + 1
            token_ids = request.prompt[start : start + len(logits_TV)]
            scores_TV = logits_TV[: len(token_ids)]
            request.add_prompt_logprobs(logprobs_of(request.params.prompt_logprobs, scores_TV, token_ids))


@dataclass(frozen=True)
class SharedPrefix:
    """The row that has the start of another row's prompt."""

    from_row: int
    num_tokens: int
    is_ready: bool
    """The other row has computed it; if not, it will, and waiting is cheaper than computing it twice."""


def share_prompt_prefix(verifier: Verifier, row: int, rows: list[ActiveRequest | None]) -> bool:
    """Copy the start of a new row's prompt from a row that has computed it; True: wait, one is about to compute it."""
    shared = shared_prefix(row, rows)
    if shared is None:
        return False
    if shared.is_ready:
        request, donor = rows[row], rows[shared.from_row]
        assert request is not None and donor is not None
        verifier.share_prefix(shared.from_row, row, shared.num_tokens)
        request.copy_prefix(donor, shared.num_tokens)
    return not shared.is_ready


def shared_prefix(row: int, rows: list[ActiveRequest | None]) -> SharedPrefix | None:
    """The longest start of a new row's prompt that another row has, or (a row before it) is about to have."""
    request = rows[row]
    assert request is not None
    if request.params.prompt_logprobs is not None:
        return None  # its scores are to be seen
    best: SharedPrefix | None = None
    for other_row, other in enumerate(rows):
        if other is None or other_row == row or (other.num_prefilled == 0 and other_row > row):
            continue
        # the last prompt token is always scored: its logits give the first output token
        common = min(num_common(request.prompt, other.prompt), len(request.prompt) - 1)
        num_ready = min(common, other.num_prefilled)
        is_ready = num_ready == common
        if common >= MIN_SHARED_TOKENS and (best is None or (common, is_ready) > (best.num_tokens, best.is_ready)):
            best = SharedPrefix(other_row, common, is_ready)
    return best


def num_common(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
