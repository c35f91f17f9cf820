"""Sources over another source: they keep what it computes on disk or in memory, or prefer what is on disk.

CachedSource              computes each row once, by any source, and reads it from disk afterwards
MemoryCachedSource        keeps rows in memory, so that later epochs of a small dataset cost no verifier forwards
StoredOrComputedSource    reads the rows that are stored, computes the others, writes nothing
BalancedSource            shares rows out among servers, and asks another one where one fails
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speculators.data_generation.offline import CorruptHiddenStatesError
from speculators.data_generation.sources.sharded import ShardedStore
from speculators.data_generation.sources.store import HiddenStateStore
from speculators.data_generation.sources.vllm import VllmSource
from speculators.data_generation.vllm_client import ServedModel, ServerUnavailableError, retry_wait_s
from speculators.interfaces import CaptureSpec, HiddenStateSource, VerifierStates

logger = logging.getLogger(__name__)

MAX_GROUP_TOKENS = 4096
"""Most tokens computed together. More saves little, and the first batch waits for its groups."""


class CachedSource:
    """A `HiddenStateSource`: computes what the store lacks with `inner` and stores it.

    Always returns what the store holds (its dtype, on the CPU), the first time too.
    """

    def __init__(self, inner: HiddenStateSource, store: HiddenStateStore | ShardedStore) -> None:
        if inner.capture != store.capture:
            raise ValueError(f"the source captures {inner.capture}, the store {store.capture}; use one of the two")
        self.inner = inner
        self.store = store
        self.capture = inner.capture
        self.num_uncached = 0
        """Number of sequences that are not a row of the store's dataset and are computed every time."""

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        rows = [self.store.row_of(ids) for ids in token_ids]
        found = [self.stored(row, ids) for row, ids in zip(rows, token_ids, strict=True)]
        missing = [i for i, states in enumerate(found) if states is None]
        if missing:
            computed = self.inner.read([token_ids[i] for i in missing])
            for i, states in zip(missing, computed, strict=True):
                found[i] = self.store_or_pass(rows[i], states)
        return [states for states in found if states is not None]

    def stored(self, row: int | None, token_ids: Tensor) -> VerifierStates | None:
        """Reads a stored row; None when it is not stored or its file is damaged."""
        if row is None or not self.store.has(row):
            return None
        try:
            states = self.store.read_row(row, token_ids)
        except CorruptHiddenStatesError as error:
            logger.warning("%s (it is computed again now)", error)
            return None
        return states

    def store_or_pass(self, row: int | None, states: VerifierStates) -> VerifierStates:
        if row is not None:
            return self.store.write_row(row, states)
        if self.num_uncached == 0:
            logger.warning(
                "a sequence of %d tokens is not a row of the cached dataset; such sequences are computed every time",
                len(states.token_ids_T),
            )
        self.num_uncached += 1
        return states


class StoredOrComputedSource:
    """A `HiddenStateSource`: reads the rows that are stored, computes the others with `inner`, writes nothing."""

    def __init__(self, store: HiddenStateStore | ShardedStore, inner: HiddenStateSource):
        self.store, self.inner = store, inner
        self.capture = store.capture

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        is_stored = [self.store.has(row) if (row := self.store.row_of(ids)) is not None else False for ids in token_ids]
        computed = iter(self.inner.read([ids for ids, stored in zip(token_ids, is_stored, strict=True) if not stored]))
        stored = iter(self.store.read([ids for ids, stored in zip(token_ids, is_stored, strict=True) if stored]))
        return [next(stored) if from_store else next(computed) for from_store in is_stored]


REST_S = 30.0
"""A server that failed is asked again after this, or when all others failed too."""


@dataclass
class StatesServer:
    connect: Callable[[], VllmSource]
    """Raises `ServerUnavailableError` when it does not answer."""
    source: VllmSource | None = None
    """None: it has not answered yet."""
    num_in_flight: int = 0
    rests_until_s: float = 0.0


class BalancedSource:
    """A `HiddenStateSource` over servers of one model. Threads may share it.

    A row goes to the server with the fewest of them. One that fails rests while the others take its rows; with all of
    them failing, a row waits by `retry_wait_s` and asks again, `max_retries` times.
    """

    def __init__(
        self, servers: Sequence[Callable[[], VllmSource]], capture: CaptureSpec, *, concurrency: int, max_retries: int
    ) -> None:
        """Connects; goes on without a server that does not answer until it does.

        Raises `ServerUnavailableError` when none answers, `ValueError` when they serve different models.
        """
        self.servers, self.capture, self.max_retries = (
            [StatesServer(connect) for connect in servers],
            capture,
            max_retries,
        )
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(concurrency * len(servers), thread_name_prefix="balance")
        self._finalizer = weakref.finalize(self, self.pool.shutdown, wait=False, cancel_futures=True)
        errors = [error for server in self.servers if (error := self.failure_of(server)) is not None]
        if len(errors) == len(servers):
            raise errors[0]
        for error in errors:
            logger.warning("%s; going on without this server until it answers", error)

    def failure_of(self, server: StatesServer) -> ServerUnavailableError | None:
        try:
            self.connected(server)
        except ServerUnavailableError as error:
            server.rests_until_s = time.monotonic() + REST_S
            return error
        return None

    def connected(self, server: StatesServer) -> VllmSource:
        if server.source is None:
            source = server.connect()
            names = {other.source.served.root for other in self.servers if other.source is not None}
            if names - {source.served.root}:
                raise ValueError(f"the endpoints serve different models: {sorted({*names, source.served.root})}")
            server.source = source
        return server.source

    @property
    def served(self) -> ServedModel:
        """The model, and the longest sequence that every server takes."""
        known = [server.source.served for server in self.servers if server.source is not None]
        lengths = [model.max_model_len for model in known if model.max_model_len is not None]
        return replace(known[0], max_model_len=min(lengths, default=None))

    def close(self) -> None:
        self._finalizer()
        for server in self.servers:
            if server.source is not None:
                server.source.close()

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        if any(len(ids) == 0 for ids in token_ids):
            raise ValueError("a sequence without tokens has no states; leave it out")
        futures = [self.pool.submit(self.read_one, ids) for ids in token_ids]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def read_one(self, token_ids: Tensor) -> VerifierStates:
        """Raises `ServerUnavailableError` after the last attempt, `InvalidResponseError` for a wrong answer."""
        for attempt in range(self.max_retries + 1):
            tried: list[StatesServer] = []
            while len(tried) < len(self.servers):
                server = self.take(tried)
                tried.append(server)
                try:
                    return self.connected(server).read_one(token_ids)
                except ServerUnavailableError as failed:
                    error = failed
                    server.rests_until_s = time.monotonic() + REST_S
                    if len(tried) < len(self.servers):
                        logger.warning("%s; asking another server", error)
                finally:
                    with self.lock:
                        server.num_in_flight -= 1
            if attempt < self.max_retries:
                wait_s = retry_wait_s(error, attempt)
                logger.warning("%s; trying all servers again in %.0f s", error, wait_s)
                time.sleep(wait_s)
        raise error

    def take(self, tried: Sequence[StatesServer]) -> StatesServer:
        """Chooses a server: of those that do not rest the one with the fewest rows."""
        with self.lock:
            left, now_s = [server for server in self.servers if server not in tried], time.monotonic()
            server = min(left, key=lambda server: (server.rests_until_s > now_s, server.num_in_flight))
            server.num_in_flight += 1
            return server


class MemoryCachedSource:
    """A `HiddenStateSource` over one that computes; the rows that fit the budget stay in memory.

    A row's states depend in their last bits on which rows share its forward. A resumed run must see the bits that the
    whole run saw, so the rows that are kept, and the groups they are computed in, follow from the dataset and the
    budget alone: never from the order in which they are asked for.
    """

    def __init__(
        self,
        inner: HiddenStateSource,
        lengths: Sequence[int],
        row: Callable[[int], Tensor],
        *,
        bytes_per_token: int,
        budget_bytes: int,
    ):
        """`row(i)` returns the `lengths[i]` tokens of a sequence that will be read; the first that fit are kept."""
        self.inner = inner
        self.capture = inner.capture
        self.groups = groups_of(lengths, budget_bytes // max(1, bytes_per_token))
        self.rows = {index: row(index) for group in self.groups for index in group}
        self.row_of = {key_of(ids): index for index, ids in self.rows.items()}
        self.group_of = {index: group for group in self.groups for index in group}
        self.kept: dict[int, VerifierStates] = {}
        self.lock = threading.Lock()

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        wanted = [self.row_of.get(key_of(ids)) for ids in token_ids]
        for row in wanted:
            if row is not None:
                self.keep(self.group_of[row], row)
        rest = iter(self.inner.read([ids for ids, row in zip(token_ids, wanted, strict=True) if row is None]))
        return [next(rest) if row is None else self.kept[row] for row in wanted]

    def keep(self, group: list[int], row: int) -> None:
        with self.lock:  # threads read ahead: a second one that needs this group waits for the first
            if row not in self.kept:
                computed = self.inner.read([self.rows[member] for member in group])
                self.kept |= {member: detached(states) for member, states in zip(group, computed, strict=True)}


def groups_of(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups the first rows that fit `max_tokens` by similar length (least padding); leaves out empty rows."""
    kept, total = [], 0
    for row, length in enumerate(lengths):
        total += length
        if total > max_tokens:
            break
        if length:
            kept.append(row)
    groups: list[list[int]] = []
    for row in sorted(kept, key=lambda row: (-lengths[row], row)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= MAX_GROUP_TOKENS:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def key_of(token_ids: Tensor) -> bytes:
    return token_ids.to("cpu", torch.int64).numpy().tobytes()


def detached(states: VerifierStates) -> VerifierStates:
    """Copies states to the CPU, so that they do not keep their batch in memory."""
    aux_TD, last_TH = (
        None if values is None else values.cpu().clone() for values in (states.aux_TD, states.last_hidden_TH)
    )
    return VerifierStates(states.token_ids_T.cpu(), aux_TD, last_TH)
