"""generate-offline-data against the fake server: files as documented, continued, repaired, failures counted."""

from __future__ import annotations

import os

import pytest
import torch
from datasets import Dataset
from fake_server import states_of
from safetensors.torch import load_file

from speculators.cli.app import main, run
from speculators.data_generation import HiddenStateStore, ServerUnavailableError
from speculators.interfaces import CaptureSpec
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


def assert_files_are_right(directory, rows):
    assert sorted(path.name for path in directory.iterdir()) == sorted(f"hs_{row}.safetensors" for row in rows)
    for row in rows:
        tensors = load_file(directory / f"hs_{row}.safetensors")
        assert tensors["token_ids"].tolist() == ROWS[row]
        assert torch.equal(tensors["hidden_states"], torch.from_numpy(states_of(ROWS[row], 4)))


def test_every_row_becomes_a_file_that_training_reads(start_fake, prepared):
    server = start(start_fake)
    result = generate(server, prepared, "--concurrency", "3")
    assert (result["num_written"], result["num_tokens"], result["num_kept"], result["failed"]) == (10, 40, 0, {})
    assert_files_are_right(prepared / "hidden_states", range(10))
    assert server.files == []
    store = HiddenStateStore(prepared / "hidden_states", CaptureSpec((1, 2, 5), last_hidden=True), ROWS)
    [states] = store.read([torch.tensor(ROWS[4])])
    assert torch.equal(states.last_hidden_TH, torch.from_numpy(states_of(ROWS[4], 4))[:, 3])


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
    assert_files_are_right(prepared / "hidden_states", range(4))
    result = generate(start(start_fake, port=server.port), prepared)
    assert (result["num_written"], result["num_kept"]) == (6, 4)
    assert_files_are_right(prepared / "hidden_states", range(10))


def test_damaged_files_are_made_again(start_fake, prepared):
    server = start(start_fake)
    generate(server, prepared)
    directory = prepared / "hidden_states"
    os.truncate(directory / "hs_3.safetensors", 40)
    content = bytearray((directory / "hs_6.safetensors").read_bytes())
    content[-1] ^= 1  # a flipped bit only shows when the file is read in full
    (directory / "hs_6.safetensors").write_bytes(content)
    assert generate(server, prepared)["num_repaired"] == 1
    assert generate(server, prepared, "--validate-outputs")["num_repaired"] == 1
    assert_files_are_right(directory, range(10))


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
    assert_files_are_right(prepared / "hidden_states", range(8))


def test_another_model_and_unknown_layers_are_refused(start_fake, prepared):
    server = start(start_fake)
    with pytest.raises(ValueError, match="serves fake, not --verifier org/other"):
        generate(server, prepared, "--model", "org/other")
    (server.folder / "states" / "extraction.json").unlink()
    with pytest.raises(ValueError, match="left no note"):
        generate(server, prepared)
    assert generate(server, prepared, "--target-layer-ids", "1,2,5,8", "--model", "fake")["num_written"] == 10
