"""`evaluate --server` on real vLLM servers, one with an EAGLE-3 drafter and one plain: what the local engine measures.

`pytest -m vllm tests/serving`. Both servers are started by `speculators serve`. Everything is greedy and fp32.
"""

from __future__ import annotations

import pytest
from real_servers import STOP_TIMEOUT_S, RealServer

from speculators import assets
from speculators.cli.app import run
from speculators.deploy.process import group_members
from speculators.evaluation.config import ServerConfig
from speculators.evaluation.server import evaluate_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

VERIFIER, DATA = str(assets.tiny_verifier_path()), str(assets.prompts_path("heldout"))
MEASURED = {"num_prompts": 12, "max_tokens": 48}
FLAGS = ["--num-prompts", "12", "--max-tokens", "48"]
NUM_DRAFTS = 3
VLLM_ARGS = ["--max-model-len", "512", "--no-enable-prefix-caching"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("drafter")
    run(
        [
            "prepare-data",
            "--model",
            VERIFIER,
            "--data",
            str(assets.prompts_path("train")),
            "--output",
            str(folder / "data"),
            "--seq-length",
            "160",
            "--max-samples",
            "200",
        ]
    )
    trained = run(
        [
            "train",
            "--verifier-name-or-path",
            VERIFIER,
            "--data-path",
            str(folder / "data"),
            "--save-path",
            str(folder / "run"),
            "--total-seq-len",
            "512",
            "--epochs",
            "2",
            "--lr",
            "3e-3",
            "--draft-vocab-size",
            "2048",
            "--train-data-ratio",
            "1.0",
        ]
    )
    return str(trained["checkpoint"])


@pytest.fixture(scope="module")
def servers(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    started = []
    try:
        started.append(RealServer(folder, ["serve", checkpoint, "-k", str(NUM_DRAFTS)], VLLM_ARGS))
        started[0].wait_until_ready()  # two starts at once would share the cores
        started.append(RealServer(folder, ["serve", VERIFIER], VLLM_ARGS))
        yield started[0], started[1].wait_until_ready()
    finally:
        for server in started:
            server.stop()


def test_the_servers_row_is_the_local_engines_row(servers, checkpoint):
    server, plain = servers
    measured = run(
        [
            "evaluate",
            "--server",
            server.endpoint,
            "--baseline-server",
            plain.endpoint,
            "--data",
            DATA,
            "--concurrency",
            "1,4",
            *FLAGS,
        ]
    )
    local = run(
        [
            "evaluate",
            "--verifier",
            VERIFIER,
            "--data",
            DATA,
            "--method",
            checkpoint,
            "-k",
            str(NUM_DRAFTS),
            "--num-warmup",
            "0",
            *FLAGS,
        ]
    )
    [row] = [row for row in local["rows"] if row["method"] != "none"]
    alone, four = measured["rows"]
    assert measured["verifier"] == VERIFIER
    assert alone["num_speculative_tokens"] == NUM_DRAFTS
    assert alone["num_identical"] == 12
    assert alone["num_tokens"] == row["num_tokens"]
    print({name: (alone[name], row[name]) for name in ("acceptance_length", "conditional_acceptance", "tokens_per_s")})
    assert alone["acceptance_length"]["value"] == pytest.approx(row["acceptance_length"]["value"], rel=0.03)
    assert alone["acceptance_rate"] == pytest.approx(row["acceptance_rate"], rel=0.05)
    assert alone["conditional_acceptance"] == pytest.approx(row["conditional_acceptance"], abs=0.05)
    assert four["num_clients"] == 4
    assert four["acceptance_length"]["value"] == pytest.approx(alone["acceptance_length"]["value"], rel=0.03)
    assert not any("somebody else" in warning or "prefix cache" in warning for warning in alone["warnings"])


def test_a_server_killed_in_the_middle_leaves_its_measured_prompts(servers):
    """The last test: it ends the server. The launcher ends the engine, and says why."""
    server, _ = servers
    killed = []

    def kill_after_four(what: str, done: int, total: int | None) -> None:
        if done == 4:
            killed.append(server.kill_front_end())

    config = ServerConfig(server=server.endpoint, data=DATA, num_warmup=0, max_retries=1, **MEASURED)
    report = evaluate_server(config, progress=kill_after_four)
    assert report.interrupted is not None
    assert "no answer from" in report.interrupted and "4 prompts of this level" in report.interrupted
    [row] = report.rows
    assert row.num_prompts == 4
    assert row.acceptance_length.value > 1
    assert server.process.wait(STOP_TIMEOUT_S) == 1
    assert "the server ended with signal SIGKILL" in server.log.read_text()
    assert group_members(killed[0]) == []
