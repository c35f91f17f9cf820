"""CachedSource: every row's states are computed once, by any source, and read from disk afterwards."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from speculators.data_generation.sources.codec import CorruptHiddenStatesError
from speculators.data_generation.sources.store import HiddenStateStore
from speculators.interfaces import HiddenStateSource, VerifierStates

logger = logging.getLogger(__name__)


class CachedSource:
    """A `HiddenStateSource`: what the store lacks comes from `inner` and is stored.

    What is returned is always what the store holds (its dtype, on the CPU), the first time too.
    """

    def __init__(self, inner: HiddenStateSource, store: HiddenStateStore) -> None:
        if inner.capture != store.capture:
            raise ValueError(f"the source gives {inner.capture}, the store is for {store.capture}; use one of the two")
        self.inner = inner
        self.store = store
        self.capture = inner.capture
        self.num_uncached = 0
        """Sequences that are no row of the store's dataset: computed every time."""

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
        if row is None or not self.store.has(row):
            return None
        try:
            states = self.store.read_row(row, token_ids)
        except CorruptHiddenStatesError as error:
            logger.warning("%s (computed again)", str(error).removesuffix("; delete it"))
            return None
        return states

    def store_or_pass(self, row: int | None, states: VerifierStates) -> VerifierStates:
        if row is not None:
            return self.store.write_row(row, states)
        if self.num_uncached == 0:
            logger.warning(
                "a sequence of %d tokens is no row of the cached dataset; such sequences are computed every time",
                len(states.token_ids_T),
            )
        self.num_uncached += 1
        return states
