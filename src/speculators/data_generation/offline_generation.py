"""Writes the verifier's states of a prepared dataset to disk, computed in this process or by an extraction server.

    <prepared>/hidden_states/     large shards (see `sources/shards.py`), read by `train`, also without the verifier

The same command continues a run that ended early in any way: a sample is there whole or not at all, and what is there
is not computed again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table

from speculators.data_generation.configs import STATES_DTYPES, OfflineConfig
from speculators.data_generation.offline import get_indices_to_process
from speculators.data_generation.prepared import HIDDEN_STATES_NAME, PreparedData
from speculators.data_generation.sources.local import compute_in_order
from speculators.data_generation.sources.samples import origin_of
from speculators.data_generation.sources.shard_writer import WriteOptions
from speculators.data_generation.sources.sharded import ShardedStore
from speculators.data_generation.sources.vllm import VllmSource, what_the_server_extracts
from speculators.data_generation.vllm_client import InvalidResponseError, ServerUnavailableError
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.utils.files import absolute_if_directory
from speculators.utils.progress import Progress, reporting
from speculators.utils.report import TableReport, facts_table, human_bytes
from speculators.utils.util import chosen_device
from speculators.verifier import check_reproduces_logits, load_verifier
from speculators.verifier.config import get_verifier_config, resolve_target_layer_ids

logger = logging.getLogger(__name__)

NUM_AHEAD = 2
"""Rows requested ahead of the one being written, in units of `concurrency`: bounds the states held in memory."""
Extracted = tuple[int, Callable[[], VerifierStates]]
"""A row, and what returns its states or says why there are none."""


@dataclass
class OfflineReport(TableReport):
    """Counts what became of the rows of this rank."""

    directory: Path
    capture: CaptureSpec
    num_kept: int = 0
    """Rows whose states existed and are whole."""
    num_repaired: int = 0
    """Written rows that replaced damaged ones."""
    num_unfinished: int = 0
    """Samples of killed writers that were cut off."""
    num_written: int = 0
    num_tokens: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    """Row -> why it has no states."""
    num_bytes: int = 0
    """Bytes of the directory."""

    def tables(self) -> list[Table]:
        last = " and the last" if self.capture.last_hidden else ""
        facts = {
            "directory": self.directory,
            "layers": f"{list(self.capture.aux_layer_ids)}{last}",
            "written": f"{self.num_written:,} rows of {self.num_tokens:,} tokens",
            "of those repaired": f"{self.num_repaired:,}",
            "already there": f"{self.num_kept:,}",
            "unfinished, cut off": f"{self.num_unfinished:,}",
            "on disk": human_bytes(self.num_bytes),
            "failed": f"{len(self.failed):,}",
        }
        return [facts_table("Hidden states", facts)]

    def sentence(self) -> str:
        failed = f", {len(self.failed):,} failed" if self.failed else ""
        return f"{self.num_written:,} rows written, {self.num_kept:,} were there{failed}"


def generate_offline_data(
    config: OfflineConfig, progress: bool | Progress | None = None, note: Callable[[str], None] = logger.info
) -> OfflineReport:
    """Writes the missing states. `note` hears of the size before the first byte.

    Raises `ServerUnavailableError` or `InvalidResponseError` when too many rows fail, and `ValueError` when the server
    serves another model, its layers are unknown, the states do not fit the disk, or the store was made otherwise. What
    was written stays.
    """
    prepared = PreparedData.open(config.preprocessed_data)
    extract = extract_in_process if config.in_process else extract_from_server
    return extract(config, prepared, progress, note)


def open_store(config: OfflineConfig, prepared: PreparedData, capture: CaptureSpec, verifier: str) -> ShardedStore:
    if config.states_dtype not in (None, *STATES_DTYPES):
        raise ValueError(
            f"states_dtype={config.states_dtype!r}; states are stored as one of {', '.join(STATES_DTYPES)}"
        )
    if config.last_states not in ("all", "supervised"):
        raise ValueError(f"last_states={config.last_states!r} is neither 'all' nor 'supervised'")
    rows = prepared.dataset()
    name = {"fp8": "float8_e4m3fn"}.get(str(config.states_dtype), config.states_dtype)
    return ShardedStore(
        Path(config.output or prepared.path / HIDDEN_STATES_NAME),
        capture,
        rows["input_ids"],
        masks=rows["loss_mask"],
        origin=origin_of(verifier, prepared),
        options=WriteOptions(
            dtype=None if name is None else getattr(torch, name),
            last_rows="supervised" if config.last_states == "supervised" else "all",
            shard_bytes=config.shard_bytes,
            max_bytes=config.max_disk_bytes,
            rank=config.rank,
        ),
    )


def extract_from_server(
    config: OfflineConfig, prepared: PreparedData, progress: bool | Progress | None, note: Callable[[str], None]
) -> OfflineReport:
    capture = capture_of(config)
    source = VllmSource(
        config.endpoint,
        capture,
        directory=config.server_states_path,
        layer_ids=config.target_layer_ids,
        concurrency=config.concurrency,
        timeout_s=config.request_timeout_s,
        max_retries=config.max_retries,
    )
    try:
        if config.model is not None and config.model not in (source.served.root, source.served.name):
            raise ValueError(f"{config.endpoint} serves {source.served.root}, not --verifier {config.model}")
        store = open_store(config, prepared, capture, source.served.root)

        def extracted(todo: Sequence[int]) -> Iterator[Extracted]:
            return request_ahead(source, prepared.dataset()["input_ids"], todo, config.concurrency * NUM_AHEAD)

        return write_missing(config, store, extracted, progress, note)
    finally:
        source.close()


def capture_of(config: OfflineConfig) -> CaptureSpec:
    """Finds everything that the server extracts. Raises `ValueError` when neither a note nor the settings say."""
    ids, num_layers = config.target_layer_ids, max(config.target_layer_ids or (0,))
    if ids is None:
        note = what_the_server_extracts(
            config.endpoint,
            Path(config.server_states_path).expanduser(),
            timeout_s=config.request_timeout_s,
            max_retries=config.max_retries,
        )
        if note is None:
            raise ValueError(
                f"{config.endpoint} left no note of its layers; start it with `speculators launch-vllm`, or "
                "give --target-layer-ids as it was started, the last layer at the end"
            )
        ids, num_layers = note.layer_ids, note.num_layers
    return CaptureSpec(tuple(i for i in ids if i != num_layers), last_hidden=num_layers in ids)


def extract_in_process(
    config: OfflineConfig, prepared: PreparedData, progress: bool | Progress | None, note: Callable[[str], None]
) -> OfflineReport:
    name = config.model or (prepared.manifest.recipe.verifier if prepared.manifest is not None else None)
    if name is None:
        raise ValueError(f"{str(prepared.path)!r} does not say which verifier it is for; name it with --verifier")
    name = absolute_if_directory(name)
    verifier_config = get_verifier_config(name, config.trust_remote_code)
    num_layers, hidden_size = verifier_config.num_hidden_layers, verifier_config.hidden_size
    ids = config.target_layer_ids or (*resolve_target_layer_ids(None, verifier_config), num_layers)
    capture = CaptureSpec(tuple(i for i in ids if i != num_layers), last_hidden=num_layers in ids)
    store = open_store(config, prepared, capture, name)
    source_dtype = getattr(torch, config.dtype)
    plan = store.check_space(store.facts_for(len(capture.aux_layer_ids) * hidden_size, hidden_size, source_dtype))
    note(f"hidden states in {store.directory}: {plan}")
    if config.max_disk_bytes is not None and plan.num_bytes + plan.present_bytes > config.max_disk_bytes:
        kept = human_bytes(config.max_disk_bytes)
        note(f"at most {kept} are kept at a time (--max-disk): the oldest shards make room for new ones")

    def extracted(todo: Sequence[int]) -> Iterator[Extracted]:
        device, trust = chosen_device(config.device), config.trust_remote_code
        model = load_verifier(name, dtype=source_dtype, device=device, trust_remote_code=trust)
        check_reproduces_logits(model)
        rows = prepared.dataset()["input_ids"]
        for row, states in compute_in_order(model, capture, rows, todo, config.batch_tokens):
            yield row, lambda states=states: states  # type: ignore[misc]

    return write_missing(config, store, extracted, progress, note)


def write_missing(
    config: OfflineConfig,
    store: ShardedStore,
    extracted: Callable[[Sequence[int]], Iterator[Extracted]],
    progress: bool | Progress | None,
    note: Callable[[str], None],
) -> OfflineReport:
    for line in store.finish_dead_writes():
        note(line)
    report = OfflineReport(store.directory, store.capture)
    todo = rows_to_make(config, store, report)
    try:
        with reporting(progress) as show:
            if todo:
                write_rows(config, store, extracted(todo), len(todo), report, show, note)
    finally:
        store.close()
        report.num_unfinished = 0 if store.writer is None else store.writer.num_unfinished
    report.num_bytes = store.num_bytes_on_disk()
    return report


def rows_to_make(config: OfflineConfig, store: ShardedStore, report: OfflineReport) -> list[int]:
    """Lists the rows of this rank without whole states; counts the others in the report."""
    damaged = set(store.damaged(in_full=config.validate_outputs))
    done = {row for row in store.present if row not in damaged}
    done |= {row for row in range(len(store.lengths)) if store.was_reused(row)}
    done |= {row for _, *equal in store.rows_by_key.values() for row in equal}  # they share the first one's sample
    shares = (config.max_samples, done, config.world_size, config.rank)
    todo = get_indices_to_process(len(store.lengths), *shares)
    mine = get_indices_to_process(len(store.lengths), config.max_samples, (), config.world_size, config.rank)
    report.num_kept = len(mine) - len(todo)
    report.num_repaired = len(damaged.intersection(todo))
    return todo


def write_rows(
    config: OfflineConfig,
    store: ShardedStore,
    extracted: Iterator[Extracted],
    num_rows: int,
    report: OfflineReport,
    show: Progress,
    note: Callable[[str], None],
) -> None:
    limit = config.max_consecutive_errors or config.concurrency
    num_consecutive = 0
    for num_done, (row, states) in enumerate(extracted, start=1):
        try:
            store.put_row(row, states())
        except (ServerUnavailableError, InvalidResponseError) as error:
            report.failed[row] = str(error)
            num_consecutive += 1
            logger.warning("row %d: %s", row, error)
            if config.fail_on_error or num_consecutive >= limit:
                raise type(error)(
                    f"{error} ({num_consecutive} rows failed in sequence). {report.num_written} rows were written to "
                    f"{store.directory}; the same command writes the others"
                ) from error
        else:
            num_consecutive = 0
            report.num_written += 1
            report.num_tokens += store.lengths[row]
        show("hidden states", num_done, num_rows)


def request_ahead(
    source: VllmSource, rows: Sequence[torch.Tensor], todo: Sequence[int], num_ahead: int
) -> Iterator[Extracted]:
    """Yields each row in order with its requested states; keeps `num_ahead` requests open."""
    requested: deque[Extracted] = deque()
    for row in todo:
        requested.append((row, source.pool.submit(source.read_one, torch.as_tensor(rows[row])).result))
        if len(requested) >= num_ahead:
            yield requested.popleft()
    yield from requested
