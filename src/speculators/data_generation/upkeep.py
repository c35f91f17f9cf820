"""Looks after stored verifier states: says what a directory holds, checks it against the verifier, drops what is bad.

`compact` writes a shard that holds damaged or replaced samples anew without them. It may die between any two steps:

    1 the index goes    2 the new shard replaces the old one    3 a new index; without it the shard alone is read
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from speculators.data_generation.configs import DEFAULT_RECOMPUTED, DEFAULT_SEED, refuse_missing_states
from speculators.data_generation.offline import (
    CorruptHiddenStatesError,
    from_tensors,
    get_existing_hidden_state_indices,
    hidden_state_path,
)
from speculators.data_generation.prepared import HIDDEN_STATES_NAME
from speculators.data_generation.sources.local import LocalSource
from speculators.data_generation.sources.samples import (
    MANIFEST,
    Directory,
    StoreFacts,
    is_same_origin,
    origin_of,
    read_sample,
)
from speculators.data_generation.sources.shard_writer import rewrite_shard
from speculators.data_generation.sources.shards import Entry, Mappings, Shard, index_path, read_shard
from speculators.data_generation.sources.store import digest, load_file
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.utils.files import flush, locked_if_dead
from speculators.utils.progress import Progress, reporting
from speculators.utils.report import TableReport, facts_table, human_bytes
from speculators.utils.util import chosen_device
from speculators.verifier import load_verifier

MAX_STORED_DIFFERENCE = 0.15
"""Largest relative difference. fp8 storage of bf16 states differs by about 0.03, another layer or model by 1."""


@dataclass
class StoreReport(TableReport):
    """What a directory of stored states holds, and what was found or done."""

    directory: Path
    facts: StoreFacts | None = None
    """None: it has no shards, only a file per row, or nothing."""
    num_shards: int = 0
    num_files: int = 0
    """Rows stored as a file each."""
    num_samples: int = 0
    num_tokens: int = 0
    num_duplicates: int = 0
    num_reused: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    """Each names the file and the way out."""
    num_recomputed: int = 0
    largest_difference: float | None = None
    """Between stored and computed states, relative."""
    num_dropped: int = 0

    def as_dict(self) -> dict[str, Any]:
        facts = None if self.facts is None else self.facts.to_dict()
        return {**asdict(self), "directory": str(self.directory), "facts": facts, "ok": not self.problems}

    def tables(self) -> list[Table]:
        rows: dict[str, object] = {
            "directory": self.directory,
            "samples": f"{self.num_samples:,} of {self.num_tokens:,} tokens in {self.num_shards:,} shards",
            "on disk": human_bytes(self.num_bytes),
            "replaced by later ones, reused": f"{self.num_duplicates:,}, {self.num_reused:,}",
            "one file per row": f"{self.num_files:,}",
        }
        if self.facts is not None:
            facts, origin = self.facts, self.facts.origin
            last = f" and the last ({facts.last_rows} tokens)" if facts.last_hidden else ""
            rows |= {
                "layers": f"{list(facts.aux_layer_ids)}{last}",
                "dtype": f"{facts.dtype} of {facts.source_dtype}",
                "verifier": f"{origin.verifier} (fingerprint {origin.verifier_fingerprint or 'unknown'})",
                "chat template": origin.chat_template or "unknown",
            }
        if self.largest_difference is not None:
            rows["computed anew"] = f"{self.num_recomputed} samples, largest difference {self.largest_difference:.2%}"
        return [facts_table("Stored states", rows)]


def states_directory(path: str | Path) -> Path:
    """Finds the states in a prepared dataset or in a directory of their own. Raises `ValueError` where none are."""
    given = Path(path).expanduser()
    refuse_missing_states(given)
    directory = given / HIDDEN_STATES_NAME if (given / HIDDEN_STATES_NAME).is_dir() else given
    if not Directory.read(directory).shards and not get_existing_hidden_state_indices(directory):
        raise ValueError(f"{str(directory)!r} holds no hidden states; write them with generate-offline-data")
    return directory


def inspect_store(path: str | Path) -> StoreReport:
    """Says what is stored, from the indexes alone."""
    return report_of(states_directory(path))


def report_of(directory: Path) -> StoreReport:
    found = Directory.read(directory)
    live = found.entries().values()
    return StoreReport(
        directory,
        found.facts,
        num_shards=len(found.shards),
        num_files=len(get_existing_hidden_state_indices(directory)),
        num_samples=len(live),
        num_tokens=sum(entry.num_tokens for entry in live),
        num_duplicates=sum(len(shard.entries) for shard in found.shards) - len(live),
        num_reused=len(found.reused),
        num_bytes=sum(entry.stat().st_size for entry in directory.iterdir() if entry.is_file()),
        problems=found.problems,
    )


def verify_store(
    path: str | Path,
    *,
    verifier: str | None = None,
    num_recomputed: int = DEFAULT_RECOMPUTED,
    seed: int = DEFAULT_SEED,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool | Progress | None = None,
) -> StoreReport:
    """Reads every sample, and computes `num_recomputed` random ones anew with the verifier (None: the recorded one).

    Raises `ValueError` for another verifier, or where none is recorded or given.
    """
    report = inspect_store(path)
    if report.facts is not None and report.facts.origin.projection is not None:
        raise ValueError(f"{report.directory / MANIFEST} holds projected states, which no verifier alone computes anew")
    with reporting(progress) as show:
        good = list(whole_samples(report, show))
    chosen = random.Random(seed).sample(good, min(num_recomputed, len(good)))
    if not chosen:
        return report
    named = None if report.facts is None else report.facts.origin.verifier
    name = verifier or named or next((sample.verifier for sample in chosen if sample.verifier is not None), None)
    if name is None:
        raise ValueError(f"{report.directory} does not say whose states it holds; give --verifier")
    if report.facts is not None and not is_same_origin(origin_of(name), report.facts.origin):
        recorded = report.facts.origin
        raise ValueError(
            f"{report.directory / MANIFEST} holds states of {recorded.verifier!r} (weights "
            f"{recorded.verifier_fingerprint}), not of {name!r}: give the verifier that made them, or write them anew"
        )
    dtype = chosen[0].dtype
    model = load_verifier(name, dtype=dtype, device=chosen_device(device), trust_remote_code=trust_remote_code)
    mappings, differences = Mappings(report.directory), []
    for sample in chosen:
        stored = sample.states(mappings, report.facts)
        [computed] = LocalSource(model, sample.capture, max_batch_tokens=1).read([stored.token_ids_T])
        differences.append(difference_of(stored, computed))
        if not differences[-1] <= MAX_STORED_DIFFERENCE:
            report.problems.append(
                f"{sample.name}: the states differ from those of {name} by {differences[-1]:.0%}: they come from "
                "another model or other layers; delete the directory and write them again: generate-offline-data"
            )
    report.num_recomputed, report.largest_difference = len(differences), max(differences)
    return report


class Sample(NamedTuple):
    """Where whole states are, without them: a store is larger than the memory."""

    place: Entry | Path
    name: str
    """File and row."""
    dtype: torch.dtype
    """Of the verifier."""
    capture: CaptureSpec
    verifier: str | None = None

    def states(self, mappings: Mappings, facts: StoreFacts | None) -> VerifierStates:
        if isinstance(self.place, Path):
            return from_tensors(load_file(self.place)[1], self.capture, self.dtype)
        assert facts is not None
        return read_sample(mappings, self.place, facts)


def whole_samples(report: StoreReport, show: Progress) -> Iterator[Sample]:
    """Reads all samples; adds what is wrong to the report, yields the others."""
    directory, mappings = report.directory, Mappings(report.directory)
    files = [hidden_state_path(directory, row) for row in get_existing_hidden_state_indices(directory)]
    places: list[Entry | Path] = [*Directory.read(directory).entries().values(), *files]
    for num_done, place in enumerate(places, start=1):
        try:
            if (sample := read_whole(place, mappings, report.facts)) is not None:
                yield sample
        except CorruptHiddenStatesError as error:
            report.problems.append(str(error))
        show("read states", num_done, len(places))


def read_whole(place: Entry | Path, mappings: Mappings, facts: StoreFacts | None) -> Sample | None:
    """None: a file of another tool, which does not say which layers it holds."""
    if isinstance(place, Path):
        header, _ = load_file(place)
        capture, dtype = header.capture, header.source_dtype
        return None if capture is None else Sample(place, str(place), dtype, capture, header.verifier)
    assert facts is not None
    read_sample(mappings, place, facts, always_check=True)
    name, dtype = f"{mappings.directory / place.shard}, row {place.row}", getattr(torch, facts.source_dtype)
    return Sample(place, name, dtype, CaptureSpec(facts.aux_layer_ids, facts.last_hidden))


def difference_of(stored: VerifierStates, computed: VerifierStates) -> float:
    """Returns the largest relative difference of the aux and of the last states, where they are stored."""
    found = [torch.zeros(())]
    for theirs, ours in ((stored.aux_TD, computed.aux_TD), (stored.last_hidden_TH, computed.last_hidden_TH)):
        if ours is not None and theirs is not None and theirs.any():
            is_stored_T = theirs.any(-1)  # last states may be kept for supervised tokens only
            ours, theirs = ours.float().cpu()[is_stored_T], theirs.float()[is_stored_T]
            found.append((ours - theirs).norm() / ours.norm())
    return float(torch.stack(found).max())


# -- compact -----------------------------------------------------------------------------------------------------------


def compact_store(path: str | Path, progress: bool | Progress | None = None) -> StoreReport:
    """Drops samples that are damaged or replaced by later ones; `generate-offline-data` writes the damaged ones again.

    Raises `ValueError` where another process writes to a shard or rewrites it. What one appended meanwhile stays.
    """
    directory = states_directory(path)
    found = Directory.read(directory)
    kept, num_dropped = whole_entries(found, directory), 0
    with reporting(progress) as show:
        for num_done, shard in enumerate(found.shards, start=1):
            num_dropped += compact_shard(shard, [entry for entry in shard.entries if kept.get(entry.tokens) is entry])
            show("shards", num_done, len(found.shards))
    num_dropped += drop_files(directory, kept)
    return replace(report_of(directory), num_dropped=num_dropped)


def whole_entries(found: Directory, directory: Path) -> dict[str, Entry]:
    """Hash of the tokens -> the latest sample that is whole."""
    mappings, kept = Mappings(directory), {}
    for entry in sorted((e for shard in found.shards for e in shard.entries), key=lambda entry: entry.attempt):
        assert found.facts is not None
        try:
            read_sample(mappings, entry, found.facts)
        except CorruptHiddenStatesError:
            continue
        kept[entry.tokens] = entry
    return kept


def compact_shard(shard: Shard, kept: list[Entry]) -> int:
    """Writes a shard anew with these samples only, and what was appended since; returns how many others it held."""
    is_tight = len(shard.entries) == len(kept) and not shard.num_damaged and not shard.num_lost
    if (is_tight and not shard.num_unfinished and shard.is_index_whole) or not shard.path.exists():
        return 0
    with locked_if_dead(shard.path) as is_dead:
        if not is_dead:
            raise ValueError(f"{shard.path} is being written by another process; compact when that has ended")
        known, shard = shard.entries, read_shard(shard.path)
        if [vars(entry) for entry in shard.entries[: len(known)]] != [vars(entry) for entry in known]:
            raise ValueError(f"{shard.path} was rewritten by another process; run compact again")
        kept = [*kept, *shard.entries[len(known) :]]
        num_dropped = len(shard.entries) - len(kept) + shard.num_damaged + shard.num_lost
        index_path(shard.path).unlink(missing_ok=True)
        flush(shard.path.parent)
        if not kept:
            shard.path.unlink()
            return num_dropped
        rewrite_shard(shard, kept)
    return num_dropped


def drop_files(directory: Path, kept: dict[str, Entry]) -> int:
    """Deletes the files of rows that are damaged, or in a shard too."""
    num_dropped = 0
    for row in get_existing_hidden_state_indices(directory):
        file = hidden_state_path(directory, row)
        try:
            is_needed = digest(load_file(file)[1]["token_ids"]).hex() not in kept
        except CorruptHiddenStatesError:
            is_needed = False
        if not is_needed:
            file.unlink()
            num_dropped += 1
    return num_dropped
