"""LocalSource: runs the verifier in this process on several sequences per forward; and the sources that keep what is
computed on disk or in memory, or prefer what is on disk.

CachedSource              computes each row once, by any source, and reads it from disk afterwards
MemoryCachedSource        keeps rows in memory, so that later epochs of a small dataset cost no verifier forwards
StoredOrComputedSource    reads the rows that are stored, computes the others, writes nothing

Sequences of similar length share a right-padded batch where that pays, which the device decides. No attention mask is
needed: attention is causal, so padding after a token cannot change its state, and kernels for plain causal attention
are the fastest.

Shapes: B sequences of a batch, T tokens, A aux layers, H hidden size.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speculators.data_generation.offline import CorruptHiddenStatesError
from speculators.data_generation.sources.sharded import ShardedStore
from speculators.data_generation.sources.store import HiddenStateStore
from speculators.interfaces import CaptureSpec, HiddenStateSource, VerifierStates
from speculators.verifier import capture_states

logger = logging.getLogger(__name__)


class LocalSource:
    """A `HiddenStateSource` over a loaded verifier."""

    def __init__(self, verifier_model: nn.Module, capture: CaptureSpec, *, max_batch_tokens: int | None = None) -> None:
        """Runs at most `max_batch_tokens` positions (padding included) per forward; a longer sequence runs alone. None:
        what is fastest on the verifier's device."""
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens={max_batch_tokens}; a forward needs at least 1 token")
        self.capture = capture
        self.model = verifier_model
        self.max_batch_tokens = max_batch_tokens
        # runs the decoder alone: training makes its own logits, and [B, T, V] is the largest tensor of a forward
        get_decoder: Any = getattr(verifier_model, "get_decoder", None)
        self.decoder: nn.Module = verifier_model if get_decoder is None else get_decoder()

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Computes the states of each sequence, in order. Raises `ValueError` for an empty sequence or NaN states."""
        if any(len(ids) == 0 for ids in token_ids):
            raise ValueError("a sequence without tokens has no states; leave it out")
        found: list[VerifierStates | None] = [None] * len(token_ids)
        batching = batching_of(next(self.model.parameters()).device, self.max_batch_tokens)
        for batch in batches_by_length([len(ids) for ids in token_ids], batching):
            for index, states in zip(batch, self.forward([token_ids[i] for i in batch]), strict=True):
                found[index] = states
        return [states for states in found if states is not None]

    @torch.no_grad()
    def forward(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Runs one forward of the verifier over all the sequences."""
        device = next(self.model.parameters()).device
        token_ids_BT = pad_sequence([ids.to(device, torch.int64) for ids in token_ids], batch_first=True)
        # a caller's autocast would silently change the states' precision
        with torch.autocast(device.type, enabled=False), capture_states(self.model, self.capture) as captured:
            self.decoder(input_ids=token_ids_BT, use_cache=False)
        aux_BTD, last_BTH = captured.aux, captured.last_hidden
        states = [
            VerifierStates(
                token_ids_T=ids,
                aux_TD=None if aux_BTD is None else aux_BTD[row, : len(ids)],
                last_hidden_TH=None if last_BTH is None else last_BTH[row, : len(ids)],
            )
            for row, ids in enumerate(token_ids)
        ]
        for row in states:
            refuse_non_finite(row)
        return states


@dataclass(frozen=True)
class Batching:
    """What a device computes together. Unit: positions, padding included."""

    max_tokens: int
    """Most positions of a forward that has more than one row."""
    max_padding: int
    """Most positions that a forward wastes on padding: about what the next forward costs besides its own positions."""


CPU_BATCHING = Batching(max_tokens=512, max_padding=32)
"""A product of 128 rows fills the cores, one of 1,024 leaves their caches (measured by benchmarks/extract.py)."""
GPU_BATCHING = Batching(max_tokens=8192, max_padding=512)
"""Estimated, not measured: starting a forward of an 8B verifier takes as long as computing some 500 positions."""


def batching_of(device: torch.device, max_tokens: int | None = None) -> Batching:
    batching = CPU_BATCHING if device.type == "cpu" else GPU_BATCHING
    return batching if max_tokens is None else replace(batching, max_tokens=max_tokens)


def batches_by_length(lengths: Sequence[int], batching: Batching) -> list[list[int]]:
    """Groups indices, longest first, so that count x longest and the padding of each group stay within the limits."""
    batches: list[list[int]] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        padding += longest - lengths[index]
        fits = batches and longest * (len(batches[-1]) + 1) <= batching.max_tokens
        if fits and padding <= batching.max_padding:
            batches[-1].append(index)
        else:
            batches.append([index])
            padding = 0
    return batches


def refuse_non_finite(states: VerifierStates) -> None:
    for name, values in (("aux", states.aux_TD), ("last", states.last_hidden_TH)):
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(
                f"the verifier's {name} hidden states are NaN or infinite for a sequence of {len(values)} tokens "
                f"(dtype {values.dtype}); load the verifier in bfloat16 or float32"
            )


GPU_BATCH_TOKENS = 16384
WINDOW_BATCHES = 8
"""Batches whose rows are sorted by length together, so that little is padded."""


def compute_in_order(
    model: nn.Module, capture: CaptureSpec, rows: Sequence[Tensor], todo: Sequence[int], batch_tokens: int | None = None
) -> Iterator[tuple[int, VerifierStates]]:
    """Yields each row of `todo`, in order, with its states; `batch_tokens=None` chooses by device.

    On a CPU a row at a time, so that a row's states depend on nothing else: a hundred tokens fill the cores. On a GPU
    batches of similar length.
    """
    if batch_tokens is None:
        batch_tokens = 1 if next(model.parameters()).device.type == "cpu" else GPU_BATCH_TOKENS
    source = LocalSource(model, capture, max_batch_tokens=batch_tokens)
    window: list[int] = []
    num_tokens = 0
    for index, row in enumerate(todo, start=1):
        window.append(row)
        num_tokens += len(rows[row])
        if batch_tokens == 1 or num_tokens >= batch_tokens * WINDOW_BATCHES or index == len(todo):
            yield from zip(window, source.read([torch.as_tensor(rows[row]) for row in window]), strict=True)
            window, num_tokens = [], 0


# -- sources over another source ---------------------------------------------------------------------------------------

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
            logger.warning("%s (computed again)", str(error).removesuffix("; delete it"))
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
    """A `HiddenStateSource`: reads the rows that have a file, computes the others with `inner`, writes nothing."""

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
