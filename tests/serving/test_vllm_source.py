"""VllmSource against a fake server: states land where the drafter reads them, and every fault is retried or named."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import threading
import time

import httpx
import pytest
import torch
from fake_server import HIDDEN_SIZE, states_of
from safetensors.torch import save_file

from speculators.data_generation import VllmSource
from speculators.data_generation.sources.served_files import DamagedStatesError, read_and_delete
from speculators.data_generation.vllm_client import (
    InvalidResponseError,
    ServerUnavailableError,
    extract_output,
    generate_hidden_states_async,
    with_retries,
)
from speculators.interfaces import CaptureSpec
from speculators.verifier.capture import ExtractionNote

pytestmark = pytest.mark.usefixtures("fast_retries")

CAPTURE = CaptureSpec((2, 5), last_hidden=True)
ROWS = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2]), torch.tensor([6, 5, 3, 5])]


def expected(ids: torch.Tensor, slots: list[int], num_slots: int) -> torch.Tensor:
    return torch.from_numpy(states_of(ids.tolist(), num_slots))[:, slots].flatten(1)


def assert_right(states, ids, *, aux_slots=(0, 1), last_slot=2, num_slots=3):
    assert torch.equal(states.token_ids_T, ids)
    assert torch.equal(states.aux_TD, expected(ids, list(aux_slots), num_slots))
    assert torch.equal(states.last_hidden_TH, expected(ids, [last_slot], num_slots))


def test_rows_come_back_in_order_and_no_file_stays(start_fake):
    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states, concurrency=2)
    for states, ids in zip(source.read(ROWS), ROWS, strict=True):
        assert_right(states, ids)
    assert server.files == []
    assert (source.counts.num_read, source.counts.num_retried, source.counts.num_failed) == (3, 0, 0)
    assert source.served.max_model_len == 64


def test_the_servers_note_says_which_slot_is_which_layer(start_fake):
    server = start_fake("--slots", "5")
    ExtractionNote("m", (1, 2, 3, 5, 8), 8).write(server.folder / "states")
    [states] = VllmSource(server.endpoint, CAPTURE, directory=server.states).read(ROWS[:1])
    assert_right(states, ROWS[0], aux_slots=(1, 3), last_slot=4, num_slots=5)
    [last_only] = VllmSource(server.endpoint, CaptureSpec((), last_hidden=True), directory=server.states).read(ROWS[:1])
    assert last_only.aux_TD is None
    [of_last_layer] = VllmSource(server.endpoint, CaptureSpec((2, 8), last_hidden=True), directory=server.states).read(
        ROWS[:1]
    )
    assert torch.equal(of_last_layer.aux_TD[:, HIDDEN_SIZE:], of_last_layer.last_hidden_TH)


def test_layers_the_server_does_not_extract_are_named(start_fake):
    server = start_fake("--slots", "3")
    note = ExtractionNote("m", (1, 2, 8), 8)
    note.write(server.folder / "states")
    with pytest.raises(InvalidResponseError, match=r"layers \[1, 2, 8\] of 8.*reads \[5\].*--target-layer-ids 2 5"):
        VllmSource(server.endpoint, CAPTURE, directory=server.states).read(ROWS[:1])
    (server.folder / "states" / "extraction.json").unlink()
    with pytest.raises(InvalidResponseError, match="extracts 3 layers, the drafter reads 2"):
        VllmSource(server.endpoint, CaptureSpec((2, 5)), directory=server.states).read(ROWS[:1])
    [states] = VllmSource(server.endpoint, CAPTURE, directory=server.states, layer_ids=(2, 5, 8)).read(ROWS[:1])
    assert_right(states, ROWS[0])


@pytest.mark.parametrize("fault", ["500", "drop", "truncated", "nan", "no file", "other tokens in file"])
def test_a_passing_fault_is_tried_again(start_fake, fault):
    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states, concurrency=1)
    server.inject(fault)
    for states, ids in zip(source.read(ROWS), ROWS, strict=True):
        assert_right(states, ids)
    assert server.log == [fault, "ok", "ok", "ok"]
    assert server.files == []


@pytest.mark.parametrize("benign", ["slow writer", "no lock file"])
def test_a_slow_writer_is_waited_for_and_locks_are_optional(start_fake, benign):
    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states)
    server.inject(benign)
    assert_right(source.read(ROWS[:1])[0], ROWS[0])
    assert server.log == [benign]


def test_a_writer_that_never_lets_go_is_given_up_after_the_timeout(start_fake):
    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states, timeout_s=0.3)
    server.inject("lock never released")
    assert_right(source.read(ROWS[:1])[0], ROWS[0])
    assert server.log == ["lock never released", "ok"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("400", "answered 400: .*prompt too long"),
        ("other tokens echoed", "read 4 tokens, not the 5 that were sent"),
        ("no path", "does not extract hidden states.*launch-vllm"),
    ],
)
def test_a_wrong_answer_is_final(start_fake, fault, message):
    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states)
    server.inject(fault)
    with pytest.raises(InvalidResponseError, match=message):
        source.read(ROWS[:1])
    assert server.log == [fault]
    assert source.counts.num_failed == 1


def precious(folder, name):
    """A file of the user's, with a lock beside it, that no server may have deleted."""
    folder.mkdir(exist_ok=True)
    save_file({"hidden_states": torch.ones(5, 3, 4), "token_ids": ROWS[0]}, folder / name)
    (folder / f"{name}.lock").touch()
    return folder / name


@pytest.mark.parametrize(
    ("named", "rule"),
    [
        ("{home}/thesis.safetensors", "not directly in .*--server-states-path"),
        ("{states}/../home/thesis.safetensors", "not directly in"),
        ("{states}/deeper/thesis.safetensors", "not directly in"),
        ("{states}/elsewhere/thesis.safetensors", "not directly in"),
        ("thesis.safetensors", "not directly in"),
        ("{states}/link.safetensors", "not a plain file"),
        ("{states}/hs_3.safetensors", "called <request id>"),
        ("{states}/model.safetensors", "called <request id>"),
        ("{states}/notes.txt", "called <request id>"),
        ("{states}/.safetensors", "called <request id>"),
        ("{states}/directory.safetensors", "not a plain file"),
        ("{states}/pipe.safetensors", "not a plain file"),
        ("{states}/a\0.safetensors", "not directly in|called <request id>"),
        ("{states}/" + "a" * 5000 + ".safetensors", "not directly in|called <request id>"),
    ],
)
def test_a_server_chooses_no_file_that_is_read_or_deleted(start_fake, tmp_path, named, rule):
    server, home = start_fake(), tmp_path / "home"
    kept = [precious(home, "thesis.safetensors"), precious(server.states, "hs_3.safetensors")]
    kept += [precious(server.states, name) for name in ("model.safetensors", "notes.txt", ".safetensors")]
    kept.append(precious(server.states / "deeper", "thesis.safetensors"))
    (server.states / "elsewhere").symlink_to(home)
    (server.states / "link.safetensors").symlink_to(kept[0])
    (server.states / "directory.safetensors").mkdir()
    os.mkfifo(server.states / "pipe.safetensors")
    server.inject("names " + named.format(home=home, states=server.states))
    with pytest.raises(InvalidResponseError, match=rule):
        VllmSource(server.endpoint, CAPTURE, directory=server.states).read(ROWS[:1])
    assert all(file.is_file() and file.with_name(f"{file.name}.lock").is_file() for file in kept)


def test_a_directory_may_be_named_by_a_link(start_fake, tmp_path):
    server = start_fake()
    (tmp_path / "link").symlink_to(server.states)
    assert_right(VllmSource(server.endpoint, CAPTURE, directory=tmp_path / "link").read(ROWS[:1])[0], ROWS[0])
    assert server.files == []


@pytest.mark.parametrize(
    "answer",
    [
        '{"choices": 3}',
        '{"choices": ["x"]}',
        '{"choices": {"0": 1}}',
        '{"choices": [{"prompt_token_ids": 5}]}',
        '{"choices": [{"prompt_token_ids": "31415"}]}',
        '{"kv_transfer_params": "path"}',
        '{"kv_transfer_params": {"hidden_states_path": 7}}',
        '{"kv_transfer_params": {"hidden_states_path": ["a"]}}',
    ],
)
def test_a_malformed_answer_is_named(start_fake, answer):
    server = start_fake()
    server.inject("answers " + answer)
    with pytest.raises(InvalidResponseError, match=r"the answer's .* is this a vLLM server"):
        VllmSource(server.endpoint, CAPTURE, directory=server.states).read(ROWS[:1])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "500.*4 attempts"),
        ("truncated", "3 requests of 5 tokens"),
        ("nan", r"shape=\(5, 3, 4\).*affected layer slots=\[0\].*min="),
        ("other tokens in file", "token_ids mismatch"),
        ("no file", "share the directory"),
    ],
)
def test_a_fault_that_stays_is_an_error_that_says_so(start_fake, fault, message):
    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states)
    server.inject(*[fault] * 10)
    with pytest.raises(ServerUnavailableError, match=message):
        source.read(ROWS[:1])
    assert source.counts.num_failed == 1
    assert server.files == []


def test_a_server_that_dies_and_comes_back_is_asked_on(start_fake, monkeypatch):
    from speculators.data_generation import vllm_client

    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states, concurrency=1, max_retries=8)
    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.05)
    server.inject("", "die")
    restarted = server.when_it_dies(lambda: start_fake(port=server.port))
    for states, ids in zip(source.read(ROWS), ROWS, strict=True):
        assert_right(states, ids)
    restarted.join()
    assert server.log == ["ok", "die", "ok", "ok"]


def test_a_server_that_stays_away_is_named(start_fake):
    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states)
    server.process.kill()
    server.process.wait()
    with pytest.raises(ServerUnavailableError, match=rf"no answer from .*:{server.port}/v1/completions.*4 attempts"):
        source.read(ROWS)
    with pytest.raises(ServerUnavailableError, match="no answer from"):
        VllmSource(server.endpoint, CAPTURE, directory=server.states)
    with pytest.raises(ValueError, match="begins with http://"):
        VllmSource("localhost:8000", CAPTURE)


def test_a_lock_left_by_a_dead_writer_does_not_block(tmp_path):
    path = tmp_path / "a.safetensors"
    (tmp_path / "a.safetensors.lock").touch()
    start = time.monotonic()
    with pytest.raises(DamagedStatesError, match="wrote no"):
        read_and_delete(path.parent, path.name, ROWS[0], timeout_s=5)
    assert time.monotonic() - start < 1
    assert list(tmp_path.iterdir()) == []


def test_the_reader_waits_for_the_lock_and_not_for_the_file(tmp_path):
    path, lock = tmp_path / "a.safetensors", tmp_path / "a.safetensors.lock"
    handle = lock.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    path.write_bytes(b"half")

    def finish() -> None:
        save_file({"hidden_states": torch.ones(5, 1, 2), "token_ids": ROWS[0]}, path)
        handle.close()

    threading.Timer(0.2, finish).start()
    assert read_and_delete(path.parent, path.name, ROWS[0], timeout_s=5).shape == (5, 1, 2)


def test_the_async_request_answers_alike(start_fake):
    server = start_fake()

    async def ask() -> tuple[str, dict]:
        async with httpx.AsyncClient(base_url=server.endpoint + "/") as client:
            return await generate_hidden_states_async(client, "fake", {"input_ids": ROWS[0]})

    server.inject("500")
    handle, transfer = asyncio.run(ask())
    assert transfer == {"hidden_states_path": handle}
    assert server.log == ["500", "ok"]


def test_answers_without_what_is_needed_are_refused():
    good = {"choices": [{"prompt_token_ids": [1, 2]}], "kv_transfer_params": {"handle": "h"}}
    assert extract_output(good, [1, 2]) == ("h", {"handle": "h"})
    for lacking in ({"choices": [{}]}, {"kv_transfer_params": None}, {"kv_transfer_params": {"x": 1}}):
        with pytest.raises(InvalidResponseError):
            extract_output({**good, **lacking}, [1, 2])


def test_retries_count_tries_and_waits_double(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr("speculators.data_generation.vllm_client.BACKOFF_S", 1.0)
    tries = []

    @with_retries
    def refused() -> None:
        tries.append(1)
        raise httpx.ConnectError("refused", request=httpx.Request("GET", "http://x/"))

    with pytest.raises(ServerUnavailableError, match="http://x/"):
        refused()
    assert (len(tries), waits) == (4, [1.0, 2.0, 4.0])


def test_a_source_forgotten_in_a_thread_of_its_own_pool_closes_its_connections(start_fake):
    server = start_fake()
    source = VllmSource(server.endpoint, CAPTURE, directory=server.states, concurrency=1)
    pool, client = source.pool, source.client
    last_reference = [source]
    del source
    pool.submit(last_reference.clear).result()
    gc.collect()
    assert client.is_closed
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(len, "")
