"""Writes verifier states of a prepared dataset from an extraction server: one file per row; existing files are kept.

    <prepared>/hidden_states/hs_<row>.safetensors     read by `train`, also on machines without the verifier

The same command continues a run that ended early in any way: files appear whole or not at all.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table

from speculators.data_generation.configs import OfflineConfig
from speculators.data_generation.offline import find_corrupt_hidden_state_indices, get_indices_to_process
from speculators.data_generation.prepared import HIDDEN_STATES_NAME, PreparedData
from speculators.data_generation.sources.store import HiddenStateStore
from speculators.data_generation.sources.vllm import VllmSource, what_the_server_extracts
from speculators.data_generation.vllm_client import InvalidResponseError, ServerUnavailableError
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.utils.progress import Progress, reporting
from speculators.utils.report import TableReport, facts_table

logger = logging.getLogger(__name__)

NUM_AHEAD = 2
"""Rows requested ahead of the one being written, in units of `concurrency`: bounds the states held in memory."""


@dataclass
class OfflineReport(TableReport):
    """Counts what became of the rows of this rank."""

    directory: Path
    capture: CaptureSpec
    num_kept: int = 0
    """Files that existed and are whole."""
    num_repaired: int = 0
    """Written files that replaced a damaged one."""
    num_written: int = 0
    num_tokens: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    """Row -> why it has no file."""

    def tables(self) -> list[Table]:
        last = " and the last" if self.capture.last_hidden else ""
        facts = {
            "directory": self.directory,
            "layers": f"{list(self.capture.aux_layer_ids)}{last}",
            "written": f"{self.num_written:,} rows of {self.num_tokens:,} tokens",
            "of those repaired": f"{self.num_repaired:,}",
            "already there": f"{self.num_kept:,}",
            "failed": f"{len(self.failed):,}",
        }
        return [facts_table("Hidden states", facts)]

    def sentence(self) -> str:
        failed = f", {len(self.failed):,} failed" if self.failed else ""
        return f"{self.num_written:,} rows written, {self.num_kept:,} were there{failed}"


def generate_offline_data(config: OfflineConfig, progress: bool | Progress | None = None) -> OfflineReport:
    """Writes the missing files.

    Raises `ServerUnavailableError` or `InvalidResponseError` when too many rows fail, and `ValueError` when the server
    serves another model or its layers are unknown. Files that were written stay.
    """
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
        rows = PreparedData.open(config.preprocessed_data).dataset()["input_ids"]
        directory = Path(config.output or Path(config.preprocessed_data) / HIDDEN_STATES_NAME)
        store = HiddenStateStore(directory, capture, rows, verifier=source.served.root)
        for line in store.finish_dead_writes():
            logger.info(line)
        report = OfflineReport(directory, capture)
        todo = rows_to_make(config, store, report)
        with reporting(progress) as show:
            write_rows(config, source, store, rows, todo, report, show)
    finally:
        source.close()
    return report


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


def rows_to_make(config: OfflineConfig, store: HiddenStateStore, report: OfflineReport) -> list[int]:
    """Lists the rows of this rank without a whole file; counts the others in the report."""
    damaged = set(find_corrupt_hidden_state_indices(store.directory, store.present))
    if config.validate_outputs:
        damaged |= set(store.audit())
    todo = get_indices_to_process(
        len(store.lengths), config.max_samples, store.present - damaged, config.world_size, config.rank
    )
    mine = get_indices_to_process(len(store.lengths), config.max_samples, (), config.world_size, config.rank)
    report.num_kept = len(mine) - len(todo)
    report.num_repaired = len(damaged.intersection(todo))
    return todo


def write_rows(
    config: OfflineConfig,
    source: VllmSource,
    store: HiddenStateStore,
    rows: Sequence[torch.Tensor],
    todo: Sequence[int],
    report: OfflineReport,
    show: Progress,
) -> None:
    limit = config.max_consecutive_errors or config.concurrency
    num_consecutive = 0
    ahead = request_ahead(source, rows, todo, config.concurrency * NUM_AHEAD)
    for num_done, (row, states) in enumerate(ahead, start=1):
        try:
            store.write_row(row, states.result())
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
        show("hidden states", num_done, len(todo))


def request_ahead(
    source: VllmSource, rows: Sequence[torch.Tensor], todo: Sequence[int], num_ahead: int
) -> Iterator[tuple[int, Future[VerifierStates]]]:
    """Yields each row in order with its requested states; keeps `num_ahead` requests open."""
    requested: deque[tuple[int, Future[VerifierStates]]] = deque()
    for row in todo:
        requested.append((row, source.pool.submit(source.read_one, torch.as_tensor(rows[row]))))
        if len(requested) >= num_ahead:
            yield requested.popleft()
    yield from requested
