"""Shards: large append-only files of samples, beside each an index. Knows bytes and checksums, not what samples mean.

    store.json                      what all shards hold, as written in the head of each
    states-<rank>-<number>.shard    head, then records; one process appends, any number read
    states-<rank>-<number>.index    a line per record: CRC-32 of the line, and what stands in the record's own head

    head      "SPECSHRD", bytes and CRC-32 of the JSON that follows, padded to 64
    record    "SPECROW1", bytes and CRC-32 of its `Entry` as JSON, padded; then the contents, padded

A process may die between any two bytes. A record counts when it is whole; the index only saves reading the heads of
all records, and what it lacks (or a cut took) is found again in the shard. The next writer cuts off what is unfinished.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculators.data_generation.offline import CorruptHiddenStatesError

SHARD_MAGIC, RECORD_MAGIC = b"SPECSHRD", b"SPECROW1"
ALIGNMENT = 64
HEAD = struct.Struct("<8sII")
SHARD_NAME = re.compile(r"states-(\d+)-(\d+)\.shard")
INDEX, REUSED = ".index", ".reused"
"""Suffixes of the index of a shard, and of one whose space was reused: its samples were written once and are gone."""
MOST_HEAD_BYTES = 4096
"""Of a shard. A shorter file without a whole head was cut or never begun: it holds nothing."""


WRITE_AGAIN = "write it again: generate-offline-data"
PLACE = ("shard", "start", "offset")


@dataclass(frozen=True)
class Entry:
    """What is known of a sample without reading it."""

    tokens: str
    """Hash of its token ids."""
    row: int
    """Row of the dataset it was made from."""
    num_tokens: int
    mask: tuple[int, ...]
    """The loss mask as lengths of runs, the first one of zeros."""
    made: str
    """Hash of the facts in the shard's head: verifier, layers, dtype, ..."""
    num_bytes: int
    """Of the contents."""
    crc32: int
    attempt: int = 0
    """How many damaged samples of the same tokens it follows: the last one counts."""
    shard: str = field(default="", compare=False)
    start: int = field(default=0, compare=False)
    """Of its record in the shard."""
    offset: int = field(default=0, compare=False)
    """Of the contents in the shard."""

    @property
    def end(self) -> int:
        return padded(self.offset + self.num_bytes)

    def as_json(self, *, placed: bool = False) -> bytes:
        """Returns what stands in the record's head; `placed`: and in the index."""
        return as_json({name: value for name, value in vars(self).items() if placed or name not in PLACE})


@dataclass
class Shard:
    """One file as it was found."""

    path: Path
    facts: dict[str, Any] | None
    """None: the file ends within its head."""
    entries: list[Entry] = field(default_factory=list)
    num_unfinished: int = 0
    """Bytes at the end that are no whole record."""
    num_lost: int = 0
    """Samples in the index that the shard does not hold: it was cut."""
    num_damaged: int = 0
    """Stretches between good records that are none."""
    is_index_whole: bool = True

    @property
    def problems(self) -> list[str]:
        """Says, naming the file, which samples are gone and what to do."""
        found = []
        if self.num_lost:
            found.append(f"{self.path} was cut: {self.num_lost} of its samples are lost; {WRITE_AGAIN}")
        if self.num_damaged:
            found.append(f"{self.path} is damaged in {self.num_damaged} places between its samples; {WRITE_AGAIN}")
        return found

    @property
    def end(self) -> int:
        """Where the next record goes."""
        start = 0 if self.facts is None else len(head_bytes(SHARD_MAGIC, as_json(self.facts)))
        return max((entry.end for entry in self.entries), default=start)


def as_json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def head_bytes(magic: bytes, content: bytes) -> bytes:
    head = HEAD.pack(magic, len(content), zlib.crc32(content)) + content
    return head.ljust(padded(len(head)), b"\0")


def parse_head(data: bytes | mmap.mmap, magic: bytes, start: int = 0) -> tuple[dict[str, Any], int] | None:
    """Returns the JSON of a head and where it ends; None when there is no whole head at `start`."""
    if len(data) < start + HEAD.size:
        return None
    found, num_bytes, crc = HEAD.unpack_from(data, start)
    content = data[start + HEAD.size : start + HEAD.size + num_bytes]
    if found != magic or len(content) != num_bytes or zlib.crc32(content) != crc:
        return None
    return json.loads(content), start + padded(HEAD.size + num_bytes)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(INDEX)


def index_line(entry: Entry) -> bytes:
    content = entry.as_json(placed=True)
    return b"%08x %s\n" % (zlib.crc32(content), content)


def entry_of(values: dict[str, Any], shard: str) -> Entry:
    return Entry(**{**values, "mask": tuple(values["mask"]), "shard": shard})


def shard_paths(directory: Path) -> list[Path]:
    """Lists the shards of a store in the order of their names."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if SHARD_NAME.fullmatch(path.name))


# -- reading -----------------------------------------------------------------------------------------------------------


def read_shard(path: Path) -> Shard:
    """Finds the samples of a shard. Raises `CorruptHiddenStatesError` when its head is damaged."""
    size = path.stat().st_size
    listed, is_whole = read_index(index_path(path), path.name)
    inside = [entry for entry in listed if entry.offset + entry.num_bytes <= size]
    if inside and not all(is_in_place(path, entry) for entry in (inside[0], inside[-1])):
        listed, is_whole = [], False  # of an earlier shard of this name: the records are looked for
    facts = read_facts(path)
    shard = Shard(path, facts, is_index_whole=is_whole)
    if facts is None:
        shard.num_lost, shard.num_unfinished, shard.is_index_whole = len(listed), size, False
        return shard
    start = shard.end
    for entry in sorted(listed, key=lambda entry: entry.offset):
        if entry.offset + entry.num_bytes > size:
            shard.num_lost += 1
        elif entry.start >= start:
            start = add_gap(shard, start, entry.start)
            shard.entries.append(entry)
            start = entry.end
    end = add_gap(shard, start, size)
    shard.num_unfinished = max(0, size - end)
    shard.is_index_whole &= len(listed) == len(shard.entries) and not shard.num_lost
    return shard


def is_in_place(path: Path, entry: Entry) -> bool:
    """Says whether the record that an index lists begins where it says."""
    with path.open("rb") as file:
        file.seek(entry.start)
        found = parse_head(file.read(entry.offset - entry.start), RECORD_MAGIC)
    return found is not None and entry_of(found[0], entry.shard) == entry


def read_facts(path: Path) -> dict[str, Any] | None:
    """Reads what is written in the head of a shard; None when the file ends within it.

    Raises `CorruptHiddenStatesError` for another head.
    """
    with path.open("rb") as file:
        first = file.read(MOST_HEAD_BYTES)
    found = parse_head(first, SHARD_MAGIC)
    if found is not None and found[1] <= len(first):
        return found[0]
    if len(first) < MOST_HEAD_BYTES:
        return None
    raise CorruptHiddenStatesError(
        f"the head of {path} is damaged, so nobody can say what its samples are; delete it and its index: "
        "generate-offline-data writes them again"
    )


def read_index(path: Path, shard: str) -> tuple[list[Entry], bool]:
    """Returns the entries of all good lines, and whether all lines are good."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b"missing"]
    good = []
    for line in lines:
        crc, _, content = line.partition(b" ")
        if content and crc == b"%08x" % zlib.crc32(content):
            good.append(entry_of(json.loads(content), shard))
    return good, len(good) == len(lines) - 1 and lines[-1] == b""


def add_gap(shard: Shard, start: int, stop: int) -> int:
    """Adds the whole records between two offsets, which the index does not list; returns the end of the last."""
    if stop <= start:
        return start
    end = start
    for entry in scan(shard.path, start, stop):
        shard.num_damaged += entry.start > end
        shard.entries.append(entry)
        end = entry.end
    return end


def scan(path: Path, start: int, stop: int) -> Iterator[Entry]:
    """Yields the whole records in a part of a shard, whatever stands between them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while start + HEAD.size <= stop:
            found = parse_head(data, RECORD_MAGIC, start)
            if found is not None:
                entry = replace(entry_of(found[0], path.name), start=start, offset=found[1])
                content = data[entry.offset : entry.offset + entry.num_bytes]
                if entry.offset + entry.num_bytes <= stop and zlib.crc32(content) == entry.crc32:
                    yield entry
                    start = entry.end
                    continue
            start = data.find(RECORD_MAGIC, start + 1, stop)
            while start > 0 and start % ALIGNMENT:
                start = data.find(RECORD_MAGIC, start + 1, stop)
            if start < 0:
                return


class Mappings:
    """The shards of a directory in memory, mapped when first needed. Threads may share it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mapped: dict[str, Tensor] = {}
        self.checked: set[tuple[str, int]] = set()
        self.lock = threading.Lock()

    def forget(self, shards: Iterable[str]) -> None:
        with self.lock:
            for name in shards:
                self.mapped.pop(name, None)

    def is_checked(self, entry: Entry) -> bool:
        return (entry.shard, entry.offset) in self.checked

    def content(self, entry: Entry, *, always_check: bool = False) -> Tensor:
        """Returns the contents of a sample, uint8; compares their checksum when first read.

        Raises `CorruptHiddenStatesError` for a missing, cut or changed one.
        """
        path = self.directory / entry.shard
        with self.lock:
            shard = self.mapped.get(entry.shard)
            end = entry.offset + entry.num_bytes
            if shard is None or len(shard) < end:
                size = path.stat().st_size if path.exists() else 0
                if size < end:
                    raise CorruptHiddenStatesError(
                        f"{path} ends before the sample of row {entry.row}: it was cut; {WRITE_AGAIN}"
                    )
                shard = self.mapped[entry.shard] = torch.from_file(str(path), size=size, dtype=torch.uint8)
        content = shard[entry.offset : end]
        if always_check or not self.is_checked(entry):
            if zlib.crc32(content.numpy().data) != entry.crc32:
                raise CorruptHiddenStatesError(
                    f"{path} is damaged: the sample of row {entry.row} at byte {entry.offset} does not match its "
                    f"checksum; {WRITE_AGAIN} --validate-outputs"
                )
            self.checked.add((entry.shard, entry.offset))
        return content
