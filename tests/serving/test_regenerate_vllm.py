"""Regeneration from a real vLLM server on CPU, started by `speculators serve`, and again after it was killed.

`pytest -m vllm tests/serving`. Greedy and fp32, so the tokens are those of our own engine.
"""

from __future__ import annotations

import json
import threading

import pytest
from real_servers import RealServer

from speculators import api, assets
from speculators.data_generation import prepare_data

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

VERIFIER, DATA = str(assets.tiny_verifier_path()), str(assets.prompts_path("heldout"))
VLLM_ARGS = ["--max-model-len", "512", "--enable-scale-out"]


def rows_of(path) -> list[tuple]:
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["id"], row["input_ids"], row["loss_mask"], row["metadata"]["finish_reason"]) for row in rows]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = RealServer(tmp_path_factory.mktemp("server"), ["serve", VERIFIER], VLLM_ARGS)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def two_turns(path, num_conversations: int = 24) -> list[dict]:
    """Held-out questions, two after each other, so that the verifier's own answers are in the second prompt."""
    lines = path.read_text().splitlines()[: 2 * num_conversations]
    asked = [json.loads(line)["conversations"][0]["content"] for line in lines]
    return [{"id": f"c{i}", "turns": asked[2 * i : 2 * i + 2]} for i in range(num_conversations)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("here") / "here.jsonl"
    report = api.regenerate(VERIFIER, two_turns(assets.prompts_path("heldout")), output=path, max_tokens=64)
    assert report.num_rows == 48 and 0 < report.num_cut < 48
    return rows_of(path)


def test_greedy_answers_are_those_of_the_engine_here(server, expected, tmp_path):
    rows = two_turns(assets.prompts_path("heldout"))
    report = api.regenerate(
        VERIFIER, rows, output=tmp_path / "out.jsonl", endpoints=server.endpoint, max_tokens=64, batch_size=8
    )
    assert (report.num_failed, report.num_from_text) == (0, 0)
    assert rows_of(tmp_path / "out.jsonl") == expected


def test_samples_are_drawn_by_their_seed(server, tmp_path):
    rows = two_turns(assets.prompts_path("heldout"))[:6]
    settings = {"max_tokens": 32, "temperature": 1.0, "top_k": 50, "num_samples": 2, "endpoints": server.endpoint}
    for name, seed, batch_size in (("a", 0, 8), ("b", 0, 1), ("c", 1, 8)):
        output = tmp_path / f"{name}.jsonl"
        api.regenerate(VERIFIER, rows, output=output, seed=seed, batch_size=batch_size, **settings)
    first, again, other = (rows_of(tmp_path / f"{name}.jsonl") for name in "abc")
    answers = [ids for _, ids, _, _ in first]
    assert answers == [ids for _, ids, _, _ in again]
    assert len({tuple(ids) for ids in answers}) > len(answers) // 2
    assert sum(ids == ids_of_other for ids, (_, ids_of_other, _, _) in zip(answers, other, strict=True)) <= 6


def test_the_masks_are_those_of_the_servers_rendering(server, tmp_path):
    prepared = prepare_data(
        VERIFIER, DATA, output=tmp_path / "data", max_samples=20, render_endpoint=server.endpoint.removesuffix("/v1")
    )
    assert prepared.manifest.num_rendered_elsewhere == prepared.manifest.num_read >= 20  # all of them alike


def test_a_server_killed_and_started_again_loses_nothing(server, expected, tmp_path):
    """The last test: it ends the server of the others."""
    again: list[RealServer] = []

    def kill_and_restart(what: str, done: int, total: int | None) -> None:
        if done >= 6 and not restart.is_alive() and not again:
            server.kill_front_end()
            restart.start()

    def start_again() -> None:
        server.process.wait()
        again.append(server.again())

    restart = threading.Thread(target=start_again)
    rows = two_turns(assets.prompts_path("heldout"))
    try:
        report = api.regenerate(
            VERIFIER,
            rows,
            output=tmp_path / "out.jsonl",
            endpoints=server.endpoint,
            max_tokens=64,
            batch_size=4,
            max_retries=12,
            progress=kill_and_restart,
        )
        restart.join()
        assert report.num_failed == 0 and len(again) == 1
        assert rows_of(tmp_path / "out.jsonl") == expected
    finally:
        for restarted in again:
            restarted.stop()
