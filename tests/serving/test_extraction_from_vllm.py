"""A real `extract_hidden_states` server on CPU: its states are those of in-process capture, `train` runs from it, and
killing it loses nothing and leaves no process. One server serves all tests (30 to 100 s to start on shared cores).

`pytest -m vllm tests/serving`; SPECULATORS_VLLM_PYTHON names an environment made by scripts/vllm_cpu/install.sh.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from real_servers import RealServer
from transformers import AutoTokenizer

from speculators import assets
from speculators.cli.app import run
from speculators.data_generation import LocalSource, ServerUnavailableError, VllmSource
from speculators.deploy.process import group_members
from speculators.interfaces import CaptureSpec
from speculators.train.config import TrainConfig
from speculators.train.events import StepDone
from speculators.train.run import train
from speculators.verifier import load_verifier

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MAX_MODEL_LEN, MAX_BATCHED_TOKENS = 512, 128
VLLM_ARGS = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
LAYERS = (2, 6, 9)
VERIFIER = str(assets.tiny_verifier_path())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extraction")
    states = ["--hidden-states-path", str(folder / "states"), "--target-layer-ids", *map(str, LAYERS)]
    extraction = RealServer(folder, ["launch-vllm", VERIFIER, *states], VLLM_ARGS)
    try:
        yield extraction.wait_until_ready()
    finally:
        extraction.stop()


@pytest.fixture(scope="module")
def verifier_model():
    return load_verifier(VERIFIER, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    lines = assets.prompts_path("heldout").read_text().splitlines()[:60]
    texts = [turn["content"] for line in lines for turn in json.loads(line)["conversations"]]
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    lengths = (1, 2, 15, 16, 17, 100, 129, 300, MAX_MODEL_LEN - 1)  # around blocks of the cache, over one chunk
    starts = [sum(lengths[:i]) % 400 for i in range(len(lengths))]
    return [torch.tensor(ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def assert_same(served, local):
    for ours, theirs in zip(local, served, strict=True):
        assert torch.equal(ours.token_ids_T, theirs.token_ids_T)
        for left_TD, right_TD in ((ours.aux_TD, theirs.aux_TD), (ours.last_hidden_TH, theirs.last_hidden_TH)):
            # states of this verifier reach 150, so 1e-5 is of each token's largest; against fp64 both err as much
            largest_T = left_TD.abs().amax(dim=-1)
            assert ((left_TD - right_TD).abs().amax(dim=-1) <= 1e-5 * largest_T).all()


@pytest.mark.parametrize("capture", [CaptureSpec(LAYERS, last_hidden=True), CaptureSpec((6,), last_hidden=True)])
def test_states_are_those_of_in_process_capture(server, verifier_model, rows, capture):
    """Chunked prefill: rows are up to four times as long as what vLLM computes at once."""
    source = VllmSource(server.endpoint, capture, directory=server.folder / "states", concurrency=4)
    assert_same(source.read(rows), LocalSource(verifier_model, capture).read(rows))
    assert source.counts.num_read == len(rows) and source.counts.num_retried == 0
    source.close()
    left = [path.name for path in (server.folder / "states").iterdir()]
    assert left == ["extraction.json"]


def test_prefix_caching_leaves_no_hole(server, verifier_model, rows):
    """The same prompt again, and one that shares its first 200 tokens: most of both comes from vLLM's cache."""
    capture = CaptureSpec(LAYERS, last_hidden=True)
    source = VllmSource(server.endpoint, capture, directory=server.folder / "states")
    longest = rows[-1]
    branched = torch.cat([longest[:200], longest[:150]])
    before = cached_tokens(server)
    served = [source.read_one(longest), source.read_one(longest), source.read_one(branched)]
    assert cached_tokens(server) - before > 400  # it was put to the test
    assert_same(served, LocalSource(verifier_model, capture).read([longest, longest, branched]))
    source.close()


def cached_tokens(server) -> int:
    import httpx

    from speculators.evaluation.server_client import parse_metrics

    return parse_metrics(httpx.get(f"http://127.0.0.1:{server.port}/metrics").text).num_cached_prompt_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "prepared"
    run(
        [
            "prepare-data",
            "--model",
            VERIFIER,
            "--data",
            str(assets.prompts_path("train")),
            "--output",
            str(path),
            "--seq-length",
            "128",
            "--max-samples",
            "60",
        ]
    )
    return str(path)


def settings(data: str, save_path: Path, **changes):
    return TrainConfig.from_flat(
        {
            "speculator_type": "eagle3",
            "verifier_name_or_path": VERIFIER,
            "data_path": data,
            "total_seq_len": 256,
            "save_path": str(save_path),
            "epochs": 1,
            "hidden_states_dtype": "float32",
            "target_layer_ids": list(LAYERS),
            "num_workers": 2,
            **changes,
        }
    )


def losses_of(config: TrainConfig) -> list[float]:
    losses = []
    train(config, on_event=lambda event: losses.append(event.metrics["loss"]) if isinstance(event, StepDone) else None)
    return losses


def test_train_from_the_server_is_train_in_process(server, data, tmp_path):
    served = losses_of(
        settings(
            data, tmp_path / "served", vllm_endpoint=server.endpoint, server_states_path=str(server.folder / "states")
        )
    )
    local = losses_of(settings(data, tmp_path / "local"))
    assert len(served) > 3
    assert served == pytest.approx(local, rel=1e-3)


def test_states_on_disk_train_where_there_is_no_server(server, data, tmp_path):
    stored = str(tmp_path / "states")
    written = run(
        [
            "generate-offline-data",
            "--preprocessed-data",
            data,
            "--endpoint",
            server.endpoint,
            "--server-states-path",
            str(server.folder / "states"),
            "--output",
            stored,
            "--concurrency",
            "4",
        ]
    )
    assert (written["num_written"], written["failed"]) == (60, {})
    again = run(
        [
            "generate-offline-data",
            "--preprocessed-data",
            data,
            "--endpoint",
            server.endpoint,
            "--server-states-path",
            str(server.folder / "states"),
            "--output",
            stored,
            "--validate-outputs",
        ]
    )
    assert (again["num_written"], again["num_kept"]) == (0, 60)
    read = losses_of(settings(data, tmp_path / "read", hidden_states_path=stored, on_missing="raise", max_steps=4))
    local = losses_of(settings(data, tmp_path / "local", max_steps=4))
    assert read == pytest.approx(local, rel=1e-3)


def test_killed_in_the_middle_nothing_is_lost_and_no_process_stays(server, data, tmp_path):
    """The last test: it ends the server. kill -9 of the front end; the launcher ends the engine and says why."""
    group = server.front_end
    assert len(group_members(group)) >= 2
    steps: list[int] = []

    def listen(event):
        if isinstance(event, StepDone):
            steps.append(event.step)
            if event.step == 3:
                server.kill_front_end()

    config = settings(
        data,
        tmp_path / "run",
        vllm_endpoint=server.endpoint,
        server_states_path=str(server.folder / "states"),
        hidden_states_memory_gb=0,
        max_retries=1,
        num_workers=0,
    )
    with pytest.raises(ServerUnavailableError, match="the same command continues from step"):
        train(config, on_event=listen)
    assert server.process.wait(60) == 1
    assert "the server ended with signal SIGKILL" in server.log.read_text()
    assert group_members(group) == []

    again = server.again()
    try:
        retried = threading.Timer(0.0, again.wait_until_ready)
        retried.start()
        patient = settings(
            data,
            tmp_path / "run",
            vllm_endpoint=server.endpoint,
            server_states_path=str(server.folder / "states"),
            hidden_states_memory_gb=0,
            max_retries=9,
            num_workers=0,
        )
        train(patient, on_event=listen)  # begins before the server is there
        retried.join()
        assert steps == list(range(1, len(steps) + 1))
        uninterrupted = losses_of(settings(data, tmp_path / "whole"))
        assert len(steps) == len(uninterrupted)
    finally:
        group = again.front_end
        again.stop()
    assert again.process.returncode == 0
    assert group_members(group) == []
