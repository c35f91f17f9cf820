"""generate-offline-data against the fake server: states as documented, continued, repaired, failures counted."""

from __future__ import annotations

import os

import pytest
import torch
from datasets import Dataset
from fake_server import states_of

from speculators.cli.app import main, run
from speculators.data_generation import HiddenStateStore, ServerUnavailableError, ShardedStore
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.verifier.capture import ExtractionNote

pytestmark = pytest.mark.usefixtures("fast_retries")

ROWS = [[row + 1, row + 2, row + 3, 7] for row in range(10)]


@pytest.fixture
def prepared(tmp_path):
    path = tmp_path / "prepared"
    Dataset.from_list([{"input_ids": ids, "loss_mask": [1] * 4, "seq_len": 4} for ids in ROWS]).save_to_disk(path)
    return path


def start(start_fake, **named):
    server = start_fake("--slots", "4", **named)
    ExtractionNote("fake", (1, 2, 5, 8), 8).write(server.folder / "states")
    return server


def generate(server, prepared, *flags):
    return run(
        [
            "generate-offline-data",
            "--endpoint",
            server.endpoint,
            "--server-states-path",
            str(server.states),
            "--preprocessed-data",
            str(prepared),
            *flags,
        ]
    )


def assert_states_are_right(directory, rows):
    store = ShardedStore(directory, CaptureSpec((1, 2, 5), last_hidden=True), ROWS)
    assert sorted(store.present) == list(rows)
    for row in rows:
        [states] = store.read([torch.tensor(ROWS[row])])
        slots = torch.from_numpy(states_of(ROWS[row], 4))
        assert torch.equal(states.aux_TD, slots[:, :3].flatten(1))
        assert torch.equal(states.last_hidden_TH, slots[:, 3])


def test_states_of_every_row_are_stored_for_training(start_fake, prepared):
    server = start(start_fake)
    result = generate(server, prepared, "--concurrency", "3")
    assert (result["num_written"], result["num_tokens"], result["num_kept"], result["failed"]) == (10, 40, 0, {})
    assert_states_are_right(prepared / "hidden_states", range(10))
    assert server.files == []
    names = {path.name for path in (prepared / "hidden_states").iterdir()}
    assert names == {"store.json", "states-000-00000.shard", "states-000-00000.index"}


def test_rows_that_have_a_file_of_an_earlier_release_are_kept(start_fake, prepared):
    files = HiddenStateStore(prepared / "hidden_states", CaptureSpec((1, 2, 5), last_hidden=True), ROWS)
    for row in (0, 4):
        slots = torch.from_numpy(states_of(ROWS[row], 4))
        files.write_row(row, VerifierStates(torch.tensor(ROWS[row]), slots[:, :3].flatten(1), slots[:, 3]))
    (prepared / "hidden_states" / ".hs_7.safetensors.partial").write_bytes(b"half")
    result = generate(start(start_fake), prepared)
    assert (result["num_written"], result["num_kept"]) == (8, 2)
    assert_states_are_right(prepared / "hidden_states", range(10))
    assert not list((prepared / "hidden_states").glob(".hs_*"))  # its process is dead
    os.truncate(prepared / "hidden_states" / "hs_4.safetensors", 40)
    assert generate(start(start_fake), prepared)["num_repaired"] == 1
    assert_states_are_right(prepared / "hidden_states", range(10))


def test_a_run_goes_on_where_the_last_one_ended(start_fake, prepared, capsys):
    server = start(start_fake)
    server.inject(*[""] * 5, "die")
    code = main(
        [
            "generate-offline-data",
            "--endpoint",
            server.endpoint,
            "--server-states-path",
            str(server.states),
            "--preprocessed-data",
            str(prepared),
            "--concurrency",
            "1",
            "--fail-on-error",
        ]
    )
    assert code == 1
    # one request of the five asked what the server extracts
    assert "4 rows were written" in capsys.readouterr().err.replace("\n", " ")
    assert_states_are_right(prepared / "hidden_states", range(4))
    result = generate(start(start_fake, port=server.port), prepared)
    assert (result["num_written"], result["num_kept"]) == (6, 4)
    assert_states_are_right(prepared / "hidden_states", range(10))


def test_damaged_files_are_made_again(start_fake, prepared):
    server = start(start_fake)
    generate(server, prepared)
    directory = prepared / "hidden_states"
    shard = directory / "states-000-00000.shard"
    os.truncate(shard, shard.stat().st_size - 100)
    result = generate(server, prepared)
    assert (result["num_written"], result["num_unfinished"]) == (1, 1)
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1  # a flipped bit only shows when the sample is read in full
    shard.write_bytes(content)
    assert generate(server, prepared)["num_repaired"] == 0
    assert generate(server, prepared, "--validate-outputs")["num_repaired"] == 1
    assert_states_are_right(directory, range(10))


def test_failed_rows_are_counted_and_many_in_a_row_end_it(start_fake, prepared):
    server = start(start_fake)
    server.inject("", "400", "", "nan", "nan", "nan")
    result = generate(server, prepared, "--concurrency", "1", "--max-consecutive-errors", "3")
    assert result["num_written"] == 8
    assert list(result["failed"]) == ["0", "2"]
    assert "answered 400" in result["failed"]["0"]
    assert "not finite" in result["failed"]["2"]
    server.process.kill()
    server.process.wait()
    with pytest.raises(ServerUnavailableError, match="no answer from"):
        generate(server, prepared)


def test_so_many_failures_in_a_row_end_the_run(start_fake, prepared):
    server = start(start_fake)
    server.inject("", "", *["500"] * 100)
    with pytest.raises(ServerUnavailableError, match=r"\(2 rows failed in sequence\). 1 rows were written"):
        generate(server, prepared, "--concurrency", "1", "--max-consecutive-errors", "2")


def test_machines_share_the_rows(start_fake, prepared):
    server = start(start_fake)
    flags = ["--world-size", "3", "--max-samples", "8"]
    shares = [generate(server, prepared, *flags, "--rank", str(rank)) for rank in range(3)]
    assert [share["num_written"] for share in shares] == [3, 3, 2]
    assert_states_are_right(prepared / "hidden_states", range(8))


def test_another_model_and_unknown_layers_are_refused(start_fake, prepared):
    server = start(start_fake)
    with pytest.raises(ValueError, match="serves fake, not --verifier org/other"):
        generate(server, prepared, "--model", "org/other")
    (server.folder / "states" / "extraction.json").unlink()
    with pytest.raises(ValueError, match="left no note"):
        generate(server, prepared)
    assert generate(server, prepared, "--target-layer-ids", "1,2,5,8", "--model", "fake")["num_written"] == 10
