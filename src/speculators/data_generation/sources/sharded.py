"""ShardedStore: the verifier's states of a dataset in large shards, found by token ids, read by memory map.

    row of the dataset -> hash of its tokens -> Entry (index) -> bytes in a shard -> VerifierStates

It has the same `read(token_ids)` as every other source. Rows that an earlier release, or another tool, wrote as a file
each are read from there (`HiddenStateStore`).
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from speculators.data_generation.offline import CorruptHiddenStatesError, find_corrupt_hidden_state_indices, num_slots
from speculators.data_generation.sources.samples import (
    MANIFEST,
    Directory,
    Origin,
    StoreFacts,
    choose,
    decode,
    encode,
    mask_of,
    read_sample,
    refuse_other_reader,
    runs_of,
)
from speculators.data_generation.sources.shard_writer import ShardWriter, WriteOptions, finish_dead_writers
from speculators.data_generation.sources.shards import Entry, Mappings
from speculators.data_generation.sources.store import HiddenStateStore, MissingStatesError, StoragePlan, digest
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.provenance import changed_settings, refuse_changes
from speculators.utils.files import atomic_write

logger = logging.getLogger(__name__)

HEAD_BYTES = 640
"""Estimate of what a sample takes beside its contents: its head, its line in the index, padding."""


class ShardedStore:
    """The stored states of one dataset. `rows[i]` are the tokens of row i."""

    def __init__(
        self,
        directory: str | Path,
        capture: CaptureSpec,
        rows: Iterable[Sequence[int] | Tensor],
        *,
        masks: Sequence[Sequence[int] | Tensor] | None = None,
        max_length: int | None = None,
        origin: Origin | None = None,
        options: WriteOptions | None = None,
    ) -> None:
        """`masks[i]` is the loss mask of row i: it decides which last states are kept. Rows are asked for by their
        first `max_length` tokens.

        Raises `ValueError` for a store of other layers, of another verifier, or whose last states do not suffice.
        """
        if num_slots(capture) == 0:
            raise ValueError("the drafter reads no verifier states, so there is nothing to store")
        self.directory, self.capture, self.masks = Path(directory), capture, masks
        self.origin, self.options = origin or Origin(), options or WriteOptions()
        self.lengths: list[int] = []
        self.keys: list[tuple[str, ...]] = []
        """Hashes of a row: as it is asked for, and whole."""
        self.rows_by_key: dict[str, list[int]] = {}
        clipped = []
        for row, token_ids in enumerate(rows):
            asked = token_ids[:max_length]
            clipped.append(asked)
            self.lengths.append(len(asked))
            whole = digest(token_ids).hex()
            self.keys.append((whole,) if len(asked) == len(token_ids) else (digest(asked).hex(), whole))
            self.rows_by_key.setdefault(self.keys[row][0], []).append(row)  # equal rows share one sample
        self.files = HiddenStateStore(self.directory, capture, clipped, verifier=self.origin.verifier)
        found = Directory.read(self.directory)
        self.facts = found.facts
        self.entries = found.entries()
        self.problems = found.problems
        """Files that lost samples, and what to do."""
        self.reused_keys = {entry.tokens for entry in found.reused}
        if self.facts is not None:
            refuse_other_reader(self.facts, capture, self.origin, self.directory / MANIFEST)
        self.mappings = Mappings(self.directory)
        self.writer: ShardWriter | None = None
        self.lock = threading.Lock()
        self.space_was_checked = False

    # -- finding -----------------------------------------------------------------------------------------------------

    @property
    def present(self) -> set[int]:
        """Rows that can be read."""
        return {row for row in range(len(self.keys)) if self.has(row)}

    def row_of(self, token_ids: Sequence[int] | Tensor) -> int | None:
        """Finds the row with exactly these tokens; None when the dataset has no such row."""
        return self.rows_by_key.get(digest(token_ids).hex(), [None])[0]

    def entry_of(self, row: int) -> Entry | None:
        return next((self.entries[key] for key in self.keys[row] if key in self.entries), None)

    def has(self, row: int) -> bool:
        return self.entry_of(row) is not None or self.files.has(row)

    def was_reused(self, row: int) -> bool:
        """Says whether the row was written and its space reused since."""
        return any(key in self.reused_keys for key in self.keys[row])

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Reads rows that are all in the store. Raises `ValueError` when one is not."""
        return [self.read_row(self.stored_row_of(ids), ids) for ids in token_ids]

    def stored_row_of(self, token_ids: Tensor) -> int:
        row = self.row_of(token_ids)
        if row is None:
            raise ValueError(f"no row of the dataset has these {len(token_ids)} tokens; the store is of other data")
        if not self.has(row):
            raise MissingStatesError(
                f"{self.directory} has no states of row {row} ({len(self.present)} of {len(self.rows_by_key)} rows are "
                "stored); let a CachedSource compute what is missing"
            )
        return row

    def read_row(self, row: int, token_ids: Sequence[int] | Tensor) -> VerifierStates:
        """Reads one row, or its first tokens.

        Raises `CorruptHiddenStatesError`, naming the file, unless contents and tokens are right, and `ValueError` when
        the last states of a supervised token were left out.
        """
        entry = self.entry_of(row)
        if entry is None:
            return self.files.read_row(row, token_ids)
        assert self.facts is not None
        self.refuse_other_mask(row, entry)
        states = choose(read_sample(self.mappings, entry, self.facts), self.facts, self.capture, len(token_ids))
        if not torch.equal(states.token_ids_T, torch.as_tensor(token_ids).to("cpu", torch.int64)):
            raise CorruptHiddenStatesError(f"{self.directory / entry.shard} holds other tokens than row {row}'s")
        return states

    def refuse_other_mask(self, row: int, entry: Entry) -> None:
        assert self.facts is not None
        if self.facts.last_rows == "all" or self.masks is None:
            return
        wanted_T = self.facts.kept_rows(self.mask_of_row(row, self.lengths[row]))
        if (wanted_T & ~self.facts.kept_rows(mask_of(entry.mask))[: len(wanted_T)]).any():
            raise ValueError(
                f"{self.directory / entry.shard} lacks last states that row {row} is trained on: its loss mask was "
                "another one when they were written; write the states again"
            )

    def damaged(self, *, in_full: bool) -> dict[int, str]:
        """Returns row -> what is wrong with its states: sizes alone, or `in_full` every byte."""
        present = self.files.present
        of_files = self.files.audit() if in_full else find_corrupt_hidden_state_indices(self.directory, present)
        entries = [self.entry_of(row) for row in range(len(self.keys))]  # a row's file is read where it has none
        problems = {row: text for row, text in of_files.items() if row < len(entries) and entries[row] is None}
        for row, entry in enumerate(entries if in_full else ()):
            try:
                if entry is not None and self.facts is not None:
                    read_sample(self.mappings, entry, self.facts, always_check=True)
            except CorruptHiddenStatesError as error:
                problems[row] = str(error)
        return problems

    # -- writing -----------------------------------------------------------------------------------------------------

    def write_row(self, row: int, states: VerifierStates) -> VerifierStates:
        """Stores one row and returns it as it will be read back, so that the first epoch sees the same numbers."""
        entry, contents = self.put_row(row, states)
        assert self.facts is not None
        content = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
        return choose(decode(content, entry, self.facts), self.facts, self.capture, entry.num_tokens)

    def put_row(self, row: int, states: VerifierStates) -> tuple[Entry, list[memoryview]]:
        """Stores one row. Threads may share the store; each row is whole or not there."""
        with self.lock:
            facts, writer = self.begin_writing(states)
            mask_T = self.mask_of_row(row, len(states.token_ids_T))
            contents = encode(states, facts.kept_rows(mask_T), facts)
            crc = 0
            for part in contents:
                crc = zlib.crc32(part, crc)
            before = self.entry_of(row)
            entry = Entry(
                tokens=digest(states.token_ids_T).hex(),
                row=row,
                num_tokens=len(mask_T),
                mask=runs_of(mask_T),
                made=facts.made,
                num_bytes=sum(map(len, contents)),
                crc32=crc,
                attempt=0 if before is None else before.attempt + 1,
            )
            entry = writer.append(entry, contents)
            if writer.reused:  # while one of them is mapped, its bytes stay on disk
                self.mappings.forget(writer.reused)
                self.entries = {key: known for key, known in self.entries.items() if known.shard not in writer.reused}
                writer.reused = set()
            self.entries[entry.tokens] = entry
            return entry, contents

    def mask_of_row(self, row: int, num_tokens: int) -> Tensor:
        """Returns what is supervised in a row, or in another one of the same tokens: bool [num_tokens]."""
        if self.masks is None:
            return torch.ones(num_tokens, dtype=torch.bool)
        rows = self.rows_by_key[self.keys[row][0]]
        return torch.stack([torch.as_tensor(self.masks[row])[:num_tokens].bool() for row in rows]).any(0)

    def begin_writing(self, states: VerifierStates) -> tuple[StoreFacts, ShardWriter]:
        """Settles what the store holds, by the first states; checks the space and opens a writer."""
        if self.writer is None:
            some = states.last_hidden_TH if states.last_hidden_TH is not None else states.aux_TD
            assert some is not None
            width = 0 if states.aux_TD is None else states.aux_TD.shape[1]
            hidden = 0 if states.last_hidden_TH is None else states.last_hidden_TH.shape[1]
            facts = self.facts_for(width, hidden, some.dtype)
            if not self.space_was_checked:
                logger.info("hidden states in %s: %s", self.directory, self.check_space(facts))
            if not (self.directory / MANIFEST).is_file():
                with atomic_write(self.directory / MANIFEST) as file:
                    json.dump(facts.to_dict(), file, indent=1, sort_keys=True)
                    file.write("\n")
            self.facts, self.writer = facts, ShardWriter(self.directory, facts.to_dict(), self.options)
            self._finalizer = weakref.finalize(self, self.writer.close)  # whoever forgets `close` leaves no lock
        assert self.facts is not None
        return self.facts, self.writer

    def facts_for(self, aux_width: int, hidden_size: int, source_dtype: torch.dtype) -> StoreFacts:
        """Says what such states are stored as. Raises `ValueError` when the store holds something else already."""
        known, wanted = self.facts, self.options
        dtype, last_rows = wanted.dtype or source_dtype, wanted.last_rows or "all"
        origin = self.origin
        if known is not None:
            dtype = wanted.dtype or known.torch_dtype
            last_rows = wanted.last_rows or known.last_rows
            origin = origin.completed(known.origin)
        facts = StoreFacts(
            aux_layer_ids=self.capture.aux_layer_ids,
            last_hidden=self.capture.last_hidden,
            last_rows=last_rows,
            aux_width=aux_width,
            hidden_size=hidden_size if self.capture.last_hidden else 0,
            dtype=str(dtype).removeprefix("torch."),
            source_dtype=str(source_dtype).removeprefix("torch."),
            origin=origin,
        )
        if known is not None and facts != known:
            ways_out = "give the settings it was made with, or name another directory"
            refuse_changes(changed_settings(known.to_dict(), facts.to_dict()), str(self.directory / MANIFEST), ways_out)
        return facts

    def plan(self, facts: StoreFacts) -> StoragePlan:
        """Measures what is still to be written and how much space is free."""
        missing = [row for row, *_ in self.rows_by_key.values() if not self.has(row) and not self.was_reused(row)]
        num_tokens = num_last = sum(self.lengths[row] for row in missing)
        if facts.last_rows == "supervised":
            masks = (self.mask_of_row(row, self.lengths[row]) for row in missing)
            num_last = sum(int(facts.kept_rows(mask_T).sum()) for mask_T in masks)
        existing = next(parent for parent in (self.directory, *self.directory.absolute().parents) if parent.exists())
        return StoragePlan(
            num_files=len(missing),
            num_tokens=num_tokens,
            num_bytes=facts.num_bytes(num_tokens, num_last) + len(missing) * HEAD_BYTES,
            present_bytes=self.num_bytes_on_disk(),
            free_bytes=shutil.disk_usage(existing).free,
            unit="rows",
        )

    def check_space(self, facts: StoreFacts) -> StoragePlan:
        """Raises `ValueError`, before the first byte is written, when the store would not fit."""
        plan, options = self.plan(facts), self.options
        plan.refuse_too_large(self.directory, options.max_bytes, is_ring=True)
        self.space_was_checked = True
        return plan

    def num_bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.directory.glob("*") if path.is_file())

    def finish_dead_writes(self) -> list[str]:
        """Removes or completes what processes that died left; returns a line for each."""
        return [*finish_dead_writers(self.directory, MANIFEST), *self.files.finish_dead_writes()]

    def close(self) -> None:
        """Completes the index; later writes open the shards again."""
        if self.writer is not None:
            self.writer.close()
