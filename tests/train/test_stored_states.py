"""States on disk as training, extraction and `speculators store` see them, with a small random verifier."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file

from speculators.cli.app import main, run
from speculators.data_generation import (
    CorruptHiddenStatesError,
    HiddenStateStore,
    LocalSource,
    OfflineConfig,
    ShardedStore,
    compact_store,
    generate_offline_data,
    inspect_store,
    upkeep,
    verify_store,
)
from speculators.data_generation.sources import shard_writer
from speculators.interfaces import CaptureSpec
from speculators.train import run as train_run
from speculators.train.config import TrainConfig

NUM_KILLS = int(os.environ.get("SPECULATORS_NUM_KILLS", "3"))
CAPTURE = CaptureSpec((1, 3, 5), last_hidden=True)


@pytest.fixture
def data(tmp_path, data_path) -> Path:
    return shutil.copytree(data_path, tmp_path / "data")


@pytest.fixture
def extract(data, verifier_path):
    def extract(**changes):
        settings = {"target_layer_ids": (1, 3, 5, 6), "dtype": "float32", "model": str(verifier_path)} | changes
        return generate_offline_data(OfflineConfig(str(data), in_process=True, **settings))

    return extract


def rows_of(data: Path) -> list[torch.Tensor]:
    return list(Dataset.load_from_disk(str(data)).with_format("torch")["input_ids"])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash"])
def test_training_from_shards_files_memory_and_extraction_is_the_same_bit_for_bit(
    algorithm, data, verifier_path, tmp_path, monkeypatch, extract
):
    # row by row: in other batches, padded otherwise, the verifier's states differ in their last bits
    monkeypatch.setattr(train_run, "LocalSource", functools.partial(LocalSource, max_batch_tokens=1))

    def trained(name: str, **changes) -> dict[str, torch.Tensor]:
        settings = {
            "speculator_type": algorithm,
            "verifier_name_or_path": str(verifier_path),
            "data_path": str(data),
            "save_path": str(tmp_path / name),
            "num_layers": 1,
            "target_layer_ids": [1, 3, 5],
            "total_seq_len": 64,
            "epochs": 1,
            "hidden_states_dtype": "bfloat16",
            "parity_gate": False,
            "contract_check": False,
        }
        if algorithm == "dflash":
            settings |= {"block_size": 4, "mask_token_id": 0}
        train_run.train(TrainConfig.from_flat(settings | changes))
        return load_file(tmp_path / name / "0" / "master_weights.fp32")

    of_memory = trained("memory")
    shards, files = (str(tmp_path / name) for name in ("shards", "files"))
    found = {
        "stored while training": trained("cached", cache_hidden_states=True, hidden_states_path=shards),
        "shards": trained("shards-read", on_missing="raise", hidden_states_path=shards),
    }
    rows = rows_of(data)
    old = HiddenStateStore(files, CAPTURE, rows, verifier=str(verifier_path))
    for row, states in enumerate(ShardedStore(shards, CAPTURE, rows).read(rows)):
        assert states.aux_TD.dtype == torch.bfloat16
        old.write_row(row, states)
    found["a file per row"] = trained("files-read", on_missing="raise", hidden_states_path=files)
    extract(dtype="bfloat16")
    found["extracted in process"] = trained("extracted", on_missing="raise")
    for name, weights in found.items():
        assert weights.keys() == of_memory.keys()
        assert all(torch.equal(weights[key], of_memory[key]) for key in weights), name


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_runs_of_extraction_end_in_the_bytes_of_an_uninterrupted_one(extract, data, tmp_path, monkeypatch):
    """Killed at a random moment, then the last shard, its index, or both cut at a random byte."""
    monkeypatch.setattr(shard_writer, "FLUSH_BYTES", 8_000)
    out, draw = data / "hidden_states", Random(3)
    kill_after(extract, None)
    shutil.rmtree(out)
    begun_s = time.monotonic()
    kill_after(extract, None)
    time_s, whole = time.monotonic() - begun_s, contents(out)
    assert len([name for name in whole if name.endswith(".shard")]) > 2
    num_there = []
    for _ in range(NUM_KILLS):
        shutil.rmtree(out)
        kill_after(extract, draw.uniform(0.3, 1.0) * time_s)
        shards = sorted(out.glob("*.shard"))
        for path in [] if not shards else draw.choice([[0], [1], [0, 1]]):
            file = (shards[-1], shards[-1].with_suffix(".index"))[path]
            if file.exists():
                os.truncate(file, draw.randint(0, file.stat().st_size))
        report = extract(shard_bytes=20_000)
        num_there.append(report.num_kept)
        assert contents(out) == whole
    assert any(0 < number < 40 for number in num_there), num_there


def kill_after(extract, time_s: float | None) -> None:
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            extract(shard_bytes=20_000)
        finally:
            os._exit(0)
    if time_s is not None:
        time.sleep(time_s)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# -- speculators store -------------------------------------------------------------------------------------------------


def test_info_says_what_is_stored(extract, data, verifier_path, capsys):
    extract(states_dtype="fp8", last_states="supervised")
    result = run(["store", "info", str(data)])
    assert (result["num_samples"], result["num_shards"], result["num_duplicates"], result["ok"]) == (40, 1, 0, True)
    assert result["num_tokens"] == sum(map(len, rows_of(data)))
    facts = result["facts"]
    assert (facts["dtype"], facts["source_dtype"], facts["verifier"]) == (
        "float8_e4m3fn",
        "float32",
        str(verifier_path),
    )
    assert facts["verifier_fingerprint"] and facts["aux_layer_ids"] == [1, 3, 5]
    assert result["num_bytes"] == sum(path.stat().st_size for path in (data / "hidden_states").iterdir())
    assert main(["store", "inf", str(data)]) == 2
    assert "store inf: no such action. Did you mean 'info'?" in " ".join(capsys.readouterr().err.split())
    assert main(["store", "info", str(verifier_path)]) == 2
    assert "holds no hidden states; write them with generate-offline-data" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("states_dtype", "largest"), [(None, 0.0), ("fp8", 0.05)])
def test_verify_computes_samples_anew(extract, data, states_dtype, largest):
    extract(states_dtype=states_dtype, last_states="supervised")
    result = run(["store", "verify", str(data), "--num-samples", "5"])
    assert result["ok"] and result["num_recomputed"] == 5
    assert 0 <= result["largest_difference"] <= largest
    assert (result["largest_difference"] > 0) == (states_dtype == "fp8")


def test_verify_names_damage_and_states_of_another_verifier(extract, data, verifier_path, tmp_path, capsys):
    extract()
    directory = data / "hidden_states"
    whole = contents(directory)
    other = tmp_path / "other"
    shutil.copytree(verifier_path, other)
    weights = load_file(other / "model.safetensors")
    save_file({key: value * 1.5 for key, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"store.json holds states of .*, not of .*/other': give the verifier that made"
    ):
        verify_store(data, verifier=str(other))

    # states of the other verifier behind the facts of this one: only computing anew can tell
    shutil.rmtree(directory)
    store = ShardedStore(directory, CAPTURE, rows_of(data))
    model = train_run.load_verifier(str(other), dtype=torch.float32)
    for row, ids in enumerate(rows_of(data)):
        store.write_row(row, LocalSource(model, CAPTURE).read([ids])[0])
    store.close()
    report = verify_store(data, verifier=str(verifier_path), num_recomputed=2)
    assert len(report.problems) == 2 and report.num_recomputed == 2
    assert all("states-000-00000.shard, row" in line and "delete the directory" in line for line in report.problems)
    with pytest.raises(ValueError, match="does not say whose states it holds; give --verifier"):
        verify_store(data)

    for name, content in whole.items():
        (directory / name).write_bytes(content)
    flip(directory / "states-000-00000.shard", row=7, data=data)
    assert main(["store", "verify", str(data), "--num-samples", "1"]) == 1
    assert "the sample of row 7" in " ".join(capsys.readouterr().err.split())


def test_verify_keeps_no_states_but_those_it_compares(extract, data, monkeypatch):
    extract()
    read_sample, alive, most = upkeep.read_sample, [], []

    def counted(*args, **kwargs):
        states = read_sample(*args, **kwargs)
        alive.append(weakref.ref(states))
        most.append(sum(known() is not None for known in alive))
        return states

    monkeypatch.setattr(upkeep, "read_sample", counted)
    report = verify_store(data, num_recomputed=8)
    assert (report.num_samples, report.num_recomputed, report.largest_difference) == (40, 8, 0.0)
    assert max(most) <= 2  # the one before, while the next is read; 40 when all were kept to draw 8
    assert len(most) == 40 + 8


def flip(shard: Path, row: int, data: Path) -> None:
    entry = ShardedStore(shard.parent, CAPTURE, rows_of(data)).entry_of(row)
    content = bytearray(shard.read_bytes())
    content[entry.offset + entry.num_bytes - 1] ^= 64
    shard.write_bytes(content)


def make_messy(extract, data: Path) -> None:
    """Shards with a duplicate of row 2, rows 5 and 30 damaged, and rows 0 and 39 in files too, one of them damaged."""
    extract(shard_bytes=20_000)
    directory, rows = data / "hidden_states", rows_of(data)
    [two, zero, last] = ShardedStore(directory, CAPTURE, rows).read([rows[2], rows[0], rows[39]])
    store = ShardedStore(directory, CAPTURE, rows)
    store.write_row(2, two)
    store.close()
    for row in (5, 30):
        flip(directory / store.entry_of(row).shard, row, data)
    files = HiddenStateStore(directory, CAPTURE, rows)
    files.write_row(0, zero)
    files.write_row(39, last)
    os.truncate(directory / "hs_39.safetensors", 50)


def test_compact_drops_what_is_damaged_or_there_twice_and_extraction_fills_the_gaps(extract, data):
    extract(shard_bytes=20_000)
    exact = ShardedStore(data / "hidden_states", CAPTURE, rows_of(data)).read(rows_of(data))
    shutil.rmtree(data / "hidden_states")
    make_messy(extract, data)
    assert inspect_store(data).num_duplicates == 1
    result = run(["store", "compact", str(data)])
    assert (result["num_dropped"], result["num_samples"], result["num_files"]) == (5, 38, 0)
    assert result["num_duplicates"] == 0 and verify_store(data).problems == []
    before = contents(data / "hidden_states")
    assert run(["store", "compact", str(data)])["num_dropped"] == 0
    assert contents(data / "hidden_states") == before
    assert extract(shard_bytes=20_000).num_written == 2
    for read, states in zip(
        ShardedStore(data / "hidden_states", CAPTURE, rows_of(data)).read(rows_of(data)), exact, strict=True
    ):
        assert torch.equal(read.aux_TD, states.aux_TD) and torch.equal(read.last_hidden_TH, states.last_hidden_TH)


def test_compact_may_die_between_any_two_steps(extract, data, tmp_path, monkeypatch):
    make_messy(extract, data)
    directory, messy = data / "hidden_states", tmp_path / "messy"
    shutil.copytree(directory, messy)
    compact_store(data)
    compacted = contents(directory)

    rows = rows_of(data)
    for step in range(40):
        shutil.rmtree(directory)
        shutil.copytree(messy, directory)
        steps = iter(range(step))
        with monkeypatch.context() as patch:
            for owner, name in ((os, "unlink"), (os, "replace"), (Path, "unlink")):
                patch.setattr(owner, name, dying(getattr(owner, name), steps))
            try:
                compact_store(data)
            except Died:
                pass
            else:
                break
        store = ShardedStore(directory, CAPTURE, rows)
        store.read([rows[row] for row in range(40) if row not in (5, 30)])  # nothing good is lost
        compact_store(data)
        assert contents(directory) == compacted, step
    assert 4 < step < 39


class Died(BaseException):
    pass


def dying(function, steps: Iterator[int]):
    """Wraps a function so that the process "dies" before the call after the last step."""

    def call(*args, **kwargs):
        if next(steps, None) is None:
            raise Died
        return function(*args, **kwargs)

    return call


def test_a_shard_that_is_being_written_is_not_compacted(extract, data):
    make_messy(extract, data)
    store = ShardedStore(data / "hidden_states", CAPTURE, rows_of(data))
    [states] = store.read([rows_of(data)[1]])
    store.write_row(1, states)
    with pytest.raises(ValueError, match=r"\.shard is being written by another process; compact when that has ended"):
        compact_store(data)
    store.close()
    with pytest.raises(CorruptHiddenStatesError, match=r"states-\d+-\d+.shard is damaged: the sample of row 5"):
        store.read([rows_of(data)[5]])
    assert json.loads((data / "hidden_states" / "store.json").read_text())["dtype"] == "float32"


def test_equal_rows_are_computed_once(extract, data):
    rows = Dataset.load_from_disk(str(data))
    again = concatenate_datasets([rows, rows.select([2, 0])])
    again.save_to_disk(str(data.with_name("again")))
    shutil.rmtree(data)
    data.with_name("again").rename(data)
    report = extract()
    assert report.num_written == len(rows) and report.num_kept == 2
    assert ShardedStore(report.directory, report.capture, again["input_ids"]).present == set(range(len(again)))


def writes_after_the_scan(monkeypatch, act) -> None:
    """Lets another process act between the reading of all shards and the lock on the first one."""
    scan = upkeep.whole_entries

    def scan_and_act(*args):
        kept = scan(*args)
        act()
        return kept

    monkeypatch.setattr(upkeep, "whole_entries", scan_and_act)


def test_what_a_writer_appends_while_compact_reads_stays(extract, data, monkeypatch):
    extract()
    directory, rows = data / "hidden_states", rows_of(data)
    exact = ShardedStore(directory, CAPTURE, rows).read(rows)
    shutil.rmtree(directory)
    first = ShardedStore(directory, CAPTURE, rows)
    for row in range(10):
        first.write_row(row, exact[row])
    first.close()
    flip(directory / "states-000-00000.shard", 5, data)

    def append() -> None:
        store = ShardedStore(directory, CAPTURE, rows)
        for row in (*range(10, 30), 5):
            store.write_row(row, exact[row])
        store.close()

    writes_after_the_scan(monkeypatch, append)
    assert compact_store(data).num_dropped == 1
    store = ShardedStore(directory, CAPTURE, rows)
    assert store.present == set(range(30))
    for read, states in zip(store.read(rows[:30]), exact[:30], strict=True):
        assert torch.equal(read.aux_TD, states.aux_TD) and torch.equal(read.last_hidden_TH, states.last_hidden_TH)
    assert inspect_store(data).problems == []


def test_compact_leaves_a_shard_that_was_rewritten_or_removed_since_it_was_read(extract, data, monkeypatch):
    make_messy(extract, data)
    directory, compact = data / "hidden_states", upkeep.compact_store
    compacted = []
    with monkeypatch.context() as patch:
        writes_after_the_scan(patch, lambda: compacted or (compacted.append(1), compact(data)))
        with pytest.raises(ValueError, match=r"\.shard was rewritten by another process; run compact again"):
            compact_store(data)
    assert len(ShardedStore(directory, CAPTURE, rows_of(data)).present) == 38
    assert verify_store(data).problems == []

    first, *_ = sorted(directory.glob("*.shard"))
    num_there = len(upkeep.read_shard(first).entries)
    flip(first, 0, data)
    with monkeypatch.context() as patch:
        writes_after_the_scan(patch, first.unlink)  # as a writer under a cap does
        assert compact_store(data).num_samples == 38 - num_there
