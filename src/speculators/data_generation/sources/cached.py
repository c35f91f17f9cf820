"""Sources over another source: they keep what it computes on disk or in memory, or prefer what is on disk.

CachedSource              computes each row once, by any source, and reads it from disk afterwards
MemoryCachedSource        keeps rows in memory, so that later epochs of a small dataset cost no verifier forwards
StoredOrComputedSource    reads the rows that are stored, computes the others, writes nothing
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speculators.data_generation.offline import CorruptHiddenStatesError
from speculators.data_generation.sources.sharded import ShardedStore
from speculators.data_generation.sources.store import HiddenStateStore
from speculators.interfaces import HiddenStateSource, VerifierStates

logger = logging.getLogger(__name__)

MAX_GROUP_TOKENS = 4096
"""Most tokens asked of a server together. More saves little, and the first batch waits for its groups."""


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
        group_tokens: int = MAX_GROUP_TOKENS,
    ):
        """`row(i)` returns the `lengths[i]` tokens of a sequence that will be read; the first that fit are kept.

        `group_tokens`: most positions computed at once, padding included, unless one row is longer.
        """
        self.inner = inner
        self.capture = inner.capture
        self.groups = groups_of(lengths, budget_bytes // max(1, bytes_per_token), group_tokens)
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


def groups_of(lengths: Sequence[int], max_tokens: int, group_tokens: int = MAX_GROUP_TOKENS) -> list[list[int]]:
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
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= group_tokens:
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
