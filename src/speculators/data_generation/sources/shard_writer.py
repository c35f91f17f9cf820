"""ShardWriter: appends samples to shards so that a process may die between any two bytes, and reuses the space of the
oldest shards where the disk is capped.

    1 record at the end of the shard        2 fsync of the shard, every 64 MiB        3 lines of the index, fsync
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from speculators.data_generation.configs import DEFAULT_SHARD_BYTES
from speculators.data_generation.sources.shards import (
    INDEX,
    RECORD_MAGIC,
    REUSED,
    SHARD_MAGIC,
    SHARD_NAME,
    Entry,
    Shard,
    as_json,
    head_bytes,
    index_line,
    index_path,
    padded,
    read_shard,
    shard_paths,
)
from speculators.provenance import changed_settings, refuse_changes
from speculators.utils.files import atomic_write, finish_dead_writes, flush, lock_path_if_free, locked_if_dead
from speculators.utils.report import human_bytes

FLUSH_BYTES = 64 << 20
"""Bytes appended between two waits for the disk; the index follows behind them."""
RING_SHARDS = 8
"""Least number of shards under a cap: reusing the space of one then costs an eighth of the samples."""
LastRows = Literal["all", "supervised"]


@dataclass(frozen=True)
class WriteOptions:
    """How states are stored. None: as the store does already, else as they come."""

    dtype: torch.dtype | None = None
    last_rows: LastRows | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    max_bytes: int | None = None
    """Cap of the directory: the oldest shards make room for new ones."""
    rank: int = 0


class ShardWriter:
    """Appends to the shards of one rank. Several writers, also of one rank, never share a file."""

    def __init__(self, directory: Path, facts: dict[str, Any], options: WriteOptions) -> None:
        self.directory, self.facts, self.rank = directory, facts, options.rank
        self.shard_bytes, self.max_bytes = options.shard_bytes, options.max_bytes
        if self.max_bytes is not None:
            self.shard_bytes = min(self.shard_bytes, self.max_bytes // RING_SHARDS)
        self.num_unfinished = 0
        """Unfinished samples of a writer before that were cut off."""
        self.reused: set[str] = set()
        """Names of the shards whose space was reused."""
        self.path = directory
        numbers = [
            int(match[2])
            for path in shard_paths(directory)
            if (match := SHARD_NAME.fullmatch(path.name)) and int(match[1]) == self.rank
        ]
        self.number, self.handle = max(numbers, default=0) - 1, -1  # goes on in the last shard: the order stays
        self.size = self.begin = self.flushed = 0
        self.pending: list[Entry] = []
        directory.mkdir(parents=True, exist_ok=True)

    def append(self, entry: Entry, contents: Sequence[bytes | memoryview]) -> Entry:
        """Writes a sample whole and returns it with its place. Raises `OSError` when the disk is full; nothing stays
        of the sample then."""
        head = head_bytes(RECORD_MAGIC, entry.as_json())
        num_bytes = len(head) + padded(entry.num_bytes)
        while self.handle < 0 or (self.size > self.begin and self.size + num_bytes > self.shard_bytes):
            self.open_next(num_bytes)
        placed = replace(entry, shard=self.path.name, start=self.size, offset=self.size + len(head))
        padding = bytes(padded(entry.num_bytes) - entry.num_bytes)
        try:
            write_all(self.handle, [head, *contents, padding], self.size)
        except OSError:
            os.ftruncate(self.handle, self.size)
            raise
        self.size += num_bytes
        self.pending.append(placed)
        if self.size - self.flushed > FLUSH_BYTES:
            self.flush()
        return placed

    def flush(self) -> None:
        """Waits until all samples are on disk, then adds them to the index."""
        if not self.pending:
            return
        os.fsync(self.handle)
        with index_path(self.path).open("ab") as file:
            file.writelines(index_line(entry) for entry in self.pending)
            file.flush()
            os.fsync(file.fileno())
        self.pending, self.flushed = [], self.size

    def close(self) -> None:
        if self.handle >= 0:
            self.flush()
            os.close(self.handle)
            self.handle = -1

    def open_next(self, num_bytes: int) -> None:
        """Opens this rank's next shard that no other process writes to, made for so many bytes if it is not there."""
        self.close()
        while self.handle < 0:
            self.number += 1
            self.path = self.directory / f"states-{self.rank:03d}-{self.number:05d}.shard"
            if index_path(self.path).with_suffix(REUSED).exists():
                continue
            self.handle = self.locked(self.path, max(num_bytes, self.shard_bytes))
        self.continue_shard()

    def locked(self, path: Path, num_bytes: int) -> int:
        """Opens a shard for this process alone; -1 where another one writes to it."""
        is_new = not path.exists()
        if is_new:
            self.make_room(num_bytes)
        try:
            handle = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if is_new else 0), 0o666)
        except FileExistsError:  # made by another process just now
            return -1
        except FileNotFoundError:  # removed by another process just now
            if is_new:
                raise
            return -1
        if lock_path_if_free(handle, path, without_locks=is_new):  # where none are, nobody opens another one's shard
            return handle
        os.close(handle)
        return -1

    def continue_shard(self) -> None:
        """Cuts off what is unfinished and brings the index up to date. Raises `ValueError` for other facts."""
        shard = read_shard(self.path)
        if shard.facts is None:
            os.ftruncate(self.handle, 0)
            write_all(self.handle, [head_bytes(SHARD_MAGIC, as_json(self.facts))], 0)
            shard.facts = self.facts
        elif shard.facts != self.facts:
            ways_out = "give the settings it was made with, or name another directory"
            refuse_changes(changed_settings(shard.facts, self.facts), str(self.path), ways_out)
        self.num_unfinished += shard.num_unfinished > 0
        os.ftruncate(self.handle, shard.end)  # also pads the last record, whose padding was cut
        self.begin = len(head_bytes(SHARD_MAGIC, as_json(self.facts)))
        self.size = self.flushed = shard.end
        if not shard.is_index_whole:
            write_index(shard)
        flush(self.directory)

    def make_room(self, num_bytes: int) -> None:
        """Removes the oldest shards while so many bytes more would exceed the cap. Their indexes stay, under another
        name: they say what was written already. Raises `ValueError` when the cap is too small for one sample."""
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise ValueError(
                f"--max-disk {human_bytes(self.max_bytes)} is less than one sample, {human_bytes(num_bytes)}; give more"
            )
        while self.max_bytes is not None:
            found = {path: status for path in shard_paths(self.directory) if (status := status_of(path)) is not None}
            if sum(status.st_size for status in found.values()) + num_bytes <= self.max_bytes:
                return
            oldest_first = sorted(found, key=lambda path: (found[path].st_mtime_ns, path.name))
            if not any(self.reuse(path) for path in oldest_first):  # writers, this one too, hold all of them
                return

    def reuse(self, path: Path) -> bool:
        """Removes a shard, unless a writer holds it or it is gone; none can take it meanwhile."""
        with locked_if_dead(path) as is_dead:
            if is_dead:
                if index_path(path).exists():
                    os.replace(index_path(path), index_path(path).with_suffix(REUSED))
                path.unlink()
                self.reused.add(path.name)
        return is_dead


def write_index(shard: Shard) -> None:
    with atomic_write(index_path(shard.path), "wb") as file:
        file.writelines(index_line(entry) for entry in shard.entries)


def rewrite_shard(shard: Shard, kept: Sequence[Entry]) -> None:
    """Replaces a shard, which the caller has locked, by one of these samples only; then its index."""
    placed = []
    with shard.path.open("rb") as old, atomic_write(shard.path, "wb") as new:
        position = new.write(head_bytes(SHARD_MAGIC, as_json(shard.facts or {})))
        for entry in kept:
            old.seek(entry.start)
            record = old.read(entry.offset + entry.num_bytes - entry.start)
            placed.append(replace(entry, start=position, offset=position + entry.offset - entry.start))
            position += new.write(record.ljust(padded(len(record)), b"\0"))
    write_index(replace(shard, entries=placed))


def finish_dead_writers(directory: Path, manifest: str) -> list[str]:
    """Removes what dead processes left half written beside the shards, and completes the indexes of their shards.
    Returns a line for each."""
    if not directory.is_dir():
        return []
    lines = finish_dead_writes(
        directory, lambda name: name == manifest or name.endswith(INDEX) or SHARD_NAME.fullmatch(name) is not None
    )
    for path in shard_paths(directory):
        with locked_if_dead(path) as is_dead:
            shard = read_shard(path) if is_dead else None
            if shard is not None and shard.entries and not shard.is_index_whole:
                write_index(shard)
                lines.append(f"completed {index_path(path)}: its process died before it listed all samples")
    return lines


def status_of(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # removed by another process just now
        return None


def write_all(handle: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            num_written = os.pwrite(handle, rest, offset)
            offset += num_written
            rest = rest[num_written:]
