"""Chooses the source of verifier states for training: computed (in process, or by a server), from files, or both.

no files, no --cache-hidden-states     computes the states and keeps in memory those that fit
files                                  reads them; --on-missing says what to do about missing ones
--cache-hidden-states                  reads them, or computes them once and keeps them on disk
--vllm-endpoint URL                    computes with that server
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig

from speculators.data_generation import (
    BalancedSource,
    CachedSource,
    LocalSource,
    MemoryCachedSource,
    PreparedData,
    ShardedStore,
    StoredOrComputedSource,
    VllmSource,
    origin_of,
)
from speculators.data_generation.configs import DEFAULT_CONCURRENCY
from speculators.data_generation.sources.cached import MAX_GROUP_TOKENS
from speculators.data_generation.upkeep import MAX_STORED_DIFFERENCE, difference_of
from speculators.interfaces import CaptureSpec, HiddenStateSource
from speculators.train.by_all_ranks import ByAllRanks
from speculators.train.data import ArrowDataset
from speculators.train.distributed import Ranks
from speculators.train.keys import DataKeys
from speculators.utils.files import is_same_model
from speculators.verifier.placement import read_device_map, refuse_missing_device, refuse_unsplittable

HIDDEN_STATES_NAME = "hidden_states"
SERVER_ITEMSIZE = 4
"""Bytes per value of a server's states, assumed before the first one is seen: fp32 at most."""


def directory_of(keys: DataKeys) -> Path:
    return Path(keys.hidden_states_path or Path(keys.data_path) / HIDDEN_STATES_NAME)


def computes_in_process(keys: DataKeys) -> bool:
    """Says whether the run computes states itself: no server computes states, and not every row is stored."""
    return keys.vllm_endpoint is None and (keys.on_missing == "generate" or keys.cache_hidden_states)


def reading_ahead(keys: DataKeys, device: torch.device) -> tuple[int, int]:
    """Returns how many threads read, and how many rows ahead. In process there is one verifier, so one thread; none for
    one that is split over ranks, whose collective operations have one order with those of training."""
    if not computes_in_process(keys):
        return keys.num_workers, keys.prefetch_factor
    in_process = False if keys.verifier_tp else keys.prefetch_in_process
    return (1, 1) if (device.type != "cpu" if in_process is None else in_process) else (0, 0)


def placement_of(keys: DataKeys, ranks: Ranks, verifier_config: PreTrainedConfig | None = None) -> dict[str, Any]:
    """Where the verifier is loaded, as arguments of `load_verifier`.

    Raises `ValueError` for a device that is not there, a wrong map, several ranks that would share one place, and a
    verifier, where its config is given, that they cannot split.
    """
    if keys.verifier_tp and ranks.world_size == 1:
        raise ValueError(
            "--verifier-tp splits the verifier over the ranks of torchrun, and this process is the only one: start "
            "several, or spread its layers with --verifier-device-map"
        )
    if keys.verifier_tp and verifier_config is not None:
        refuse_unsplittable(verifier_config, ranks.world_size)
    if keys.verifier_tp:
        return {"tp_size": ranks.world_size}
    own = keys.verifier_device_map or keys.verifier_device
    if own is not None and ranks.world_size > 1:
        raise ValueError(
            f"each of {ranks.world_size} ranks would load its verifier on {own}: leave out --verifier-device and "
            "--verifier-device-map (each has its own card), start one rank, or ask a server with --vllm-endpoint"
        )
    if keys.verifier_device_map is not None:
        return {"device_map": read_device_map(keys.verifier_device_map)}
    refuse_missing_device(keys.verifier_device)
    return {"device": keys.verifier_device or ranks.device}


def open_store(keys: DataKeys, capture: CaptureSpec, verifier: str, note: Callable[[str], None]) -> ShardedStore | None:
    """Opens the states beside the prepared data; None when there are none and the run is not to write them.

    A run that writes states removes first what dead processes left half written there.
    """
    directory = directory_of(keys)
    if not keys.cache_hidden_states and not directory.is_dir():
        if keys.hidden_states_path is not None:
            raise ValueError(
                f"--hidden-states-path {directory} does not exist: correct it, leave it out to compute the states "
                "anew, or add --cache-hidden-states to write them there"
            )
        return None
    prepared = PreparedData.open(keys.data_path)
    rows = prepared.dataset()
    store = ShardedStore(
        directory,
        capture,
        rows["input_ids"],
        masks=rows["loss_mask"],
        max_length=keys.total_seq_len,
        origin=origin_of(verifier, prepared),
    )
    if keys.cache_hidden_states:
        for line in store.finish_dead_writes():
            note(line)
    return store


def rows_to_use(keys: DataKeys, store: ShardedStore | None, note: Callable[[str], None]) -> set[int] | None:
    """Applies `--on-missing` before training; returns the rows to train on, None for all.

    Raises `ValueError` when rows are missing and may be neither computed nor left out.
    """
    if keys.on_missing == "generate" or keys.cache_hidden_states:
        return None
    present = set() if store is None else {row for row in range(len(store.lengths)) if store.has(row)}
    num_rows = len(PreparedData.open(keys.data_path).dataset())
    num_missing = num_rows - len(present)
    if num_missing and (keys.on_missing == "raise" or not present):
        raise ValueError(
            f"{num_missing} of {num_rows} rows have no stored states in {directory_of(keys)}: compute them, "
            f"with --on-missing generate, or leave them out with --on-missing warn{damage_of(store)}"
        )
    if num_missing and keys.on_missing == "warn":
        note(f"{num_missing} of {num_rows} rows have no stored verifier states and are left out{damage_of(store)}")
    return present


def damage_of(store: ShardedStore | None) -> str:
    """Says which files lost samples."""
    return "".join(f". {problem}" for problem in (store.problems if store is not None else ()))


def open_splits(keys: DataKeys, dtype: torch.dtype, vocab_size: int, note: Callable[[str], None]) -> list[ArrowDataset]:
    """Opens the rows of training and, unless all are trained on, of validation; notes what is left out of them.

    Raises `ValueError` for a split without a supervised token, and for tokens outside the verifier's vocabulary.
    """
    ratio, path = keys.train_data_ratio, keys.data_path
    names: list[Literal["train", "val"]] = ["train", "val"] if ratio < 1.0 else ["train"]
    datasets = []
    for name in names:
        dataset = ArrowDataset(keys.total_seq_len, path, train_ratio=ratio, split=name, hidden_states_dtype=dtype)
        check_supervised(dataset, path)
        check_token_ids(dataset, path, vocab_size)
        datasets.append(dataset)
    for told in filter(None, map(leave_out_untrained, datasets)):
        note(told)
    return datasets


def check_supervised(dataset: ArrowDataset, datapath: str | Path) -> None:
    """Raises `ValueError` when no row has a supervised token."""
    if not pc.sum(dataset.column("loss_mask")).as_py():
        raise ValueError(
            f"not one of the {len(dataset)} rows in {datapath} has a supervised token within total_seq_len="
            f"{dataset.max_len}: every loss_mask is 0 there. Look at them with `speculators inspect-mask`; a chat "
            "template that does not match the verifier, or prompts longer than total_seq_len, is the usual reason"
        )


def check_token_ids(dataset: ArrowDataset, datapath: str | Path, vocab_size: int) -> None:
    """Raises `ValueError` when a token id is outside the verifier's vocabulary."""
    largest = pc.max(dataset.column("input_ids")).as_py()
    if largest >= vocab_size:
        raise ValueError(
            f"{datapath} has token {largest} but the verifier knows 0..{vocab_size - 1}: it was prepared with another "
            "tokenizer; prepare it again with this verifier"
        )


def leave_out_untrained(dataset: ArrowDataset) -> str | None:
    """Leaves out rows without a trained token within `max_len`, of which nothing can be learned. Says what is left out
    and cut; None: nothing is."""
    trained, of_whole_rows = dataset.trained_per_row(dataset.max_len), dataset.trained_per_row()
    kept = trained.nonzero()[0].tolist()
    num_rows, num_tokens, num_cut = len(trained), of_whole_rows.sum(), (of_whole_rows - trained).sum()
    num_out = num_rows - len(kept)
    if not num_out and not num_cut:
        return None
    if num_out:
        dataset.select(kept)
    has, is_ = ("has", "is") if num_out == 1 else ("have", "are")
    return (
        f"{dataset.split} split: {num_out} of {num_rows:,} rows {has} no trained token within {dataset.max_len} and "
        f"{is_} left out; {num_cut:,} of {num_tokens:,} trained tokens are cut (--total-seq-len)"
    )


def make_source(
    keys: DataKeys, store: ShardedStore | None, computing: HiddenStateSource | None, hidden_size: int, ranks: Ranks
) -> HiddenStateSource:
    """Combines the store and the computing source; `computing=None`: every row that is used has a file."""
    if keys.verifier_tp:
        whole = keys.model_copy(update={"verifier_tp": False})
        return ByAllRanks(make_source(whole, store, computing, hidden_size, ranks), ranks)
    if computing is None:
        assert store is not None
        return store
    if store is None:
        return kept_in_memory(keys, computing, hidden_size)
    check_stored_states(store, computing, Path(keys.data_path))
    return CachedSource(computing, store) if keys.cache_hidden_states else StoredOrComputedSource(store, computing)


def ask_server(
    keys: DataKeys, capture: CaptureSpec, verifier: str, hidden_size: int, note: Callable[[str], None]
) -> VllmSource | BalancedSource:
    """Connects to the servers behind `--vllm-endpoint`.

    Raises `ServerUnavailableError` when none answers, `ValueError` when a row is too long for one.
    """
    assert keys.vllm_endpoint is not None
    urls, directories = (
        [part.strip() for part in text.split(",")] for text in (keys.vllm_endpoint, keys.server_states_path)
    )
    if len(directories) not in (1, len(urls)):
        raise ValueError(
            f"--server-states-path names {len(directories)} directories for {len(urls)} servers: give one for each, in "
            "the order of --vllm-endpoint, or one for all"
        )
    connect = partial(
        VllmSource,
        hidden_size=hidden_size,
        timeout_s=keys.request_timeout,
        max_retries=keys.max_retries if len(urls) == 1 else 0,  # another server is asked first
        validation_retries=keys.generation_validation_retries,
    )
    places = zip(urls, directories * (len(urls) // len(directories)), strict=True)
    servers = [partial(connect, url, capture, directory=directory) for url, directory in places]
    source = (
        servers[0]()
        if len(servers) == 1
        else BalancedSource(servers, capture, concurrency=DEFAULT_CONCURRENCY, max_retries=keys.max_retries)
    )
    limit = source.served.max_model_len
    longest = max(lengths_of(keys))
    if limit is not None and longest >= limit:  # vLLM extracts while it generates one token
        raise ValueError(
            f"the longest row has {longest} tokens, the server at {keys.vllm_endpoint} takes {limit - 1}: start it "
            f"with --max-model-len {longest + 1}, or clip rows with --total-seq-len {limit - 1}"
        )
    if not is_same_model(source.served.root, verifier):
        note(f"the server at {keys.vllm_endpoint} serves {source.served.root}; the verifier is {verifier}")
    return source


def lengths_of(keys: DataKeys) -> list[int]:
    """Returns the tokens of each row after clipping."""
    return [min(int(length), keys.total_seq_len) for length in PreparedData.open(keys.data_path).dataset()["seq_len"]]


def kept_in_memory(keys: DataKeys, computing: HiddenStateSource, hidden_size: int) -> HiddenStateSource:
    """Keeps states in memory for later epochs; `--hidden-states-memory-gb 0` computes them anew each time."""
    if keys.hidden_states_memory_gb == 0:
        return computing
    num_states = len(computing.capture.aux_layer_ids) + computing.capture.last_hidden
    itemsize, group_tokens = SERVER_ITEMSIZE, MAX_GROUP_TOKENS
    if isinstance(computing, LocalSource):  # one forward: on a CPU the first rows would wait for thousands of tokens
        itemsize, group_tokens = next(computing.model.parameters()).element_size(), computing.batching.max_tokens
    data = PreparedData.open(keys.data_path).dataset()
    return MemoryCachedSource(
        computing,
        lengths_of(keys),
        lambda row: data[row]["input_ids"][: keys.total_seq_len],
        bytes_per_token=num_states * hidden_size * itemsize,
        budget_bytes=int(keys.hidden_states_memory_gb * 1e9),
        group_tokens=group_tokens,
    )


def check_stored_states(store: ShardedStore, computing: HiddenStateSource, datapath: Path) -> None:
    """Compares the first stored row with the verifier's states: states of another model train a useless drafter.

    Raises `ValueError` when they differ by more than `MAX_STORED_DIFFERENCE`.
    """
    row = min(store.present, default=None)
    if row is None:
        return
    token_ids = PreparedData.open(datapath).dataset()[row]["input_ids"][: store.lengths[row]]
    [stored], [computed] = store.read([token_ids]), computing.read([token_ids])
    difference = difference_of(stored, computed)
    if not difference <= MAX_STORED_DIFFERENCE:
        raise ValueError(
            f"the states stored for row {row} in {store.directory} differ from the verifier's by {difference:.0%}: "
            "they come from another model or other layers; delete them, or use another --data"
        )
