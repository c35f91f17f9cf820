"""HiddenStateStore: keeps one file per row of a prepared dataset, and checks it when it writes and when it reads.

It finds a row by its tokens, so it has the same `read(token_ids)` as every other source. It knows its size before it
writes anything, and respects a cap and the free disk space.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speculators.data_generation.offline import (
    FILE_NAME,
    CorruptHiddenStatesError,
    FileHeader,
    check_hidden_states,
    checksum,
    estimate_bytes,
    from_tensors,
    get_existing_hidden_state_indices,
    hidden_state_path,
    num_slots,
    parse_header,
    to_bytes,
    to_tensors,
)
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.utils.files import atomic_write, finish_dead_writes, is_same_model
from speculators.utils.report import human_bytes
from speculators.utils.util import WRONG_VALUE

logger = logging.getLogger(__name__)

WRITER_TIMEOUT_S = 10.0
"""Longest wait for a file that another process is still writing (it holds `<file>.lock`)."""


class MissingStatesError(ValueError):
    """A row of the dataset has no stored states."""


@dataclass(frozen=True)
class StoragePlan:
    """What it takes to fill the store."""

    num_files: int
    num_tokens: int
    num_bytes: int
    """Bytes of the files still to be written."""
    present_bytes: int
    free_bytes: int
    unit: str = "files"

    def __str__(self) -> str:
        return (
            f"{self.num_files} {self.unit}, {self.num_tokens} tokens, {human_bytes(self.num_bytes)} to write "
            f"({human_bytes(self.present_bytes)} written already, {human_bytes(self.free_bytes)} free)"
        )

    def refuse_too_large(self, directory: Path, max_bytes: int | None, *, is_ring: bool = False) -> None:
        """Raises `ValueError` when it exceeds the cap or the disk; with `is_ring` the cap bounds what is on disk."""
        ways_out = "store fp8, prepare fewer or shorter rows, or keep the states in memory (no cache)"
        if max_bytes is not None and not is_ring and self.num_bytes + self.present_bytes > max_bytes:
            raise ValueError(
                f"hidden states in {str(directory)!r} would take {self}, more than the cap of "
                f"{human_bytes(max_bytes)}; raise the cap, {ways_out}"
            )
        room = max(0, max_bytes - self.present_bytes) if is_ring and max_bytes is not None else self.num_bytes
        most = min(self.num_bytes, room)  # a full ring takes no more space
        if most > self.free_bytes:
            raise ValueError(f"hidden states in {str(directory)!r} would not fit the disk: {self}; {ways_out}")


class HiddenStateStore:
    """The `hs_<row>.safetensors` files of one dataset. `rows[i]` are the tokens of row i."""

    def __init__(
        self,
        directory: str | Path,
        capture: CaptureSpec,
        rows: Iterable[Sequence[int] | Tensor],
        *,
        dtype: torch.dtype | None = None,
        max_bytes: int | None = None,
        verifier: str | None = None,
    ) -> None:
        """`dtype=None` keeps the type of the states, `torch.float8_e4m3fn` halves bfloat16. `max_bytes` caps the whole
        directory. `verifier` is written into the files; files of another verifier are refused.

        Raises `ValueError` when `capture` is empty.
        """
        if num_slots(capture) == 0:
            raise ValueError("the drafter reads no verifier states, so there is nothing to store")
        self.directory = Path(directory)
        self.capture = capture
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.verifier = verifier
        self.lengths: list[int] = []
        self.row_by_digest: dict[bytes, int] = {}
        for row, token_ids in enumerate(rows):
            self.lengths.append(len(token_ids))
            self.row_by_digest.setdefault(digest(token_ids), row)  # equal rows share the first one's file
        self.present = set(get_existing_hidden_state_indices(self.directory))
        self.space_was_checked = False
        self.warned_of_order = False

    def row_of(self, token_ids: Sequence[int] | Tensor) -> int | None:
        """Finds the row with exactly these tokens; None when the dataset has no such row."""
        return self.row_by_digest.get(digest(token_ids))

    def has(self, row: int) -> bool:
        return row in self.present

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Reads rows that are all in the store. Raises `ValueError` when one is not."""
        return [self.read_row(self.stored_row_of(ids), ids) for ids in token_ids]

    def stored_row_of(self, token_ids: Tensor) -> int:
        row = self.row_of(token_ids)
        if row is None:
            raise ValueError(f"no row of the dataset has these {len(token_ids)} tokens; the store is of other data")
        if not self.has(row):
            raise MissingStatesError(
                f"{hidden_state_path(self.directory, row)} does not exist ({len(self.present)} of "
                f"{len(self.row_by_digest)} rows are stored); let a CachedSource compute what is missing"
            )
        return row

    def read_row(self, row: int, token_ids: Sequence[int] | Tensor) -> VerifierStates:
        """Reads one row, or its first tokens.

        Raises `CorruptHiddenStatesError`, naming the file, unless contents, checksum and tokens are right, and
        `ValueError` for a file of another capture or verifier.
        """
        path = hidden_state_path(self.directory, row)
        wait_for_writer(path)
        header, tensors = load_file(path)
        self.refuse_other_capture(path, header, tensors["hidden_states"])
        wanted = torch.as_tensor(token_ids).to("cpu", torch.int64)
        # causal states of a clipped row are the first states of the whole one
        clipped = {key: values[: len(wanted)] for key, values in tensors.items()}
        if not torch.equal(clipped["token_ids"], wanted):
            raise CorruptHiddenStatesError(f"{path} holds the states of other tokens than row {row}'s; delete it")
        return from_tensors(clipped, self.capture, header.source_dtype)

    def refuse_other_capture(self, path: Path, header: FileHeader, states: Tensor) -> None:
        """Raises `ValueError` for a whole file that is useless here: computing all again silently would be worse."""
        if header.capture is None and not self.warned_of_order:
            self.warned_of_order = True
            logger.warning(
                "%s was written by another tool and does not name its layers: they are taken as %s%s, in this order",
                path,
                list(self.capture.aux_layer_ids),
                ", then the last layer before the final norm",
            )
        stored: Any = header.capture or states.shape[1]
        wanted: Any = self.capture if header.capture else len(self.capture.aux_layer_ids) + 1
        if stored != wanted:
            raise ValueError(
                f"{path} holds {stored} (capture, or number of slots), the drafter reads {wanted}; use another "
                "directory for the hidden states or delete this one"
            )
        written, wanted_verifier = header.verifier, self.verifier
        if written is not None and wanted_verifier is not None and not is_same_model(written, wanted_verifier):
            raise ValueError(
                f"{path} holds states of {header.verifier!r}, not of {self.verifier!r}; use another directory for the "
                "hidden states or delete this one"
            )

    def write_row(self, row: int, states: VerifierStates) -> VerifierStates:
        """Stores one row and returns it as it will be read back, so that the first epoch sees the same numbers."""
        source = states.last_hidden_TH if states.last_hidden_TH is not None else states.aux_TD
        assert source is not None
        if not self.space_was_checked:
            width = source.shape[-1] // (1 if states.last_hidden_TH is not None else len(self.capture.aux_layer_ids))
            logger.warning("hidden states in %s: %s", self.directory, self.check_space(width, source.dtype))
        tensors = to_tensors(states, self.capture, self.dtype)
        path = hidden_state_path(self.directory, row)
        with atomic_write(path, "wb") as file:
            file.write(to_bytes(tensors, self.capture, source.dtype, self.verifier))
        self.present.add(row)
        return from_tensors(tensors, self.capture, source.dtype)

    def finish_dead_writes(self) -> list[str]:
        """Removes what processes that died while they wrote a row left; returns a line for each."""
        if not self.directory.is_dir():
            return []
        return finish_dead_writes(self.directory, lambda name: FILE_NAME.fullmatch(name) is not None)

    def plan(self, hidden_size: int, source_dtype: torch.dtype) -> StoragePlan:
        """Measures what is still to be written and how much space is free."""
        missing = [row for row in self.row_by_digest.values() if row not in self.present]
        num_tokens = sum(self.lengths[row] for row in missing)
        existing = next(parent for parent in (self.directory, *self.directory.absolute().parents) if parent.exists())
        return StoragePlan(
            num_files=len(missing),
            num_tokens=num_tokens,
            num_bytes=estimate_bytes(num_tokens, self.capture, hidden_size, self.dtype or source_dtype),
            present_bytes=sum(hidden_state_path(self.directory, row).stat().st_size for row in self.present),
            free_bytes=shutil.disk_usage(existing).free,
        )

    def check_space(self, hidden_size: int, source_dtype: torch.dtype) -> StoragePlan:
        """Raises `ValueError`, before the first byte is written, when the store would not fit."""
        plan = self.plan(hidden_size, source_dtype)
        plan.refuse_too_large(self.directory, self.max_bytes)
        self.space_was_checked = True
        return plan

    def audit(self, progress: Callable[[str, int, int | None], None] | None = None) -> dict[int, str]:
        """Reads every file in full; returns row -> what is wrong with it."""
        problems: dict[int, str] = {}
        for num_done, row in enumerate(sorted(self.present), start=1):
            try:
                load_file(hidden_state_path(self.directory, row))
            except CorruptHiddenStatesError as error:
                problems[row] = str(error)
            if progress is not None:
                progress("audit hidden states", num_done, len(self.present))
        return problems


def load_file(path: Path) -> tuple[FileHeader, dict[str, Tensor]]:
    """Reads a file's header and tensors. Raises `CorruptHiddenStatesError` when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_header(file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError, ValueError, *WRONG_VALUE) as error:
        raise CorruptHiddenStatesError(f"{path} cannot be read: {error}; delete it") from error
    try:
        check_hidden_states(tensors, None)
    except ValueError as error:
        raise CorruptHiddenStatesError(f"{path}: {error}; delete it") from error
    if header.crc32 is not None and checksum(tensors) != header.crc32:
        raise CorruptHiddenStatesError(f"{path} is damaged: its contents do not match its checksum; delete it")
    return header, tensors


def wait_for_writer(path: Path) -> None:
    """Waits while another process holds `<path>.lock`, then removes the lock. Raises `TimeoutError`."""
    lock = path.with_name(path.name + ".lock")
    if not lock.exists():
        return
    import fcntl  # exists on POSIX only, as do the writers that lock

    deadline = time.monotonic() + WRITER_TIMEOUT_S
    with lock.open("rb") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is still being written after {WRITER_TIMEOUT_S:.0f} s") from None
                time.sleep(0.05)
        lock.unlink(missing_ok=True)


def digest(token_ids: Sequence[int] | Tensor) -> bytes:
    ids = token_ids.cpu().numpy() if isinstance(token_ids, Tensor) else token_ids
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
