"""`train --vllm-endpoint`: the whole run from a server; when it dies no step is lost, and the same command goes on."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from fakes import launch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from speculators.data_generation import InvalidResponseError, ServerUnavailableError
from speculators.train.config import TrainConfig
from speculators.train.events import Note, StepDone
from speculators.train.run import train
from speculators.verifier.capture import ExtractionNote

pytestmark = pytest.mark.usefixtures("fast_retries")
HIDDEN_SIZE = 16
UNKEPT = {"hidden_states_memory_gb": 0, "num_workers": 0}


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    path = tmp_path_factory.mktemp("verifier")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 64, (12 + row % 9,), generator=generator).tolist() for row in range(24)]
    path = tmp_path_factory.mktemp("data")
    Dataset.from_list(
        [{"input_ids": ids, "loss_mask": [0, 0] + [1] * (len(ids) - 2), "seq_len": len(ids)} for ids in rows]
    ).save_to_disk(path)
    return str(path)


@pytest.fixture
def settings(tmp_path, verifier, data):
    return keys(tmp_path, verifier, data)


def keys(folder, verifier, data):
    return {
        "speculator_type": "eagle3",
        "verifier_name_or_path": verifier,
        "data_path": data,
        "total_seq_len": 64,
        "target_layer_ids": [1, 3, 5],
        "save_path": str(folder / "run"),
        "epochs": 2,
        "train_data_ratio": 0.75,
        "hidden_states_dtype": "float32",
        "num_workers": 2,
        "draft_attn_impl": "eager",
    }


def run(settings, server, on_event=lambda event: None, **changes):
    served = {} if server is None else {"vllm_endpoint": server.endpoint, "server_states_path": str(server.states)}
    return train(TrainConfig.from_flat({**settings, **served, **changes}), on_event=on_event)


SLOTS = ("--slots", "5", "--hidden", str(HIDDEN_SIZE))


def leave_note(server):
    ExtractionNote("fake", (1, 2, 3, 5, 6), 6).write(server.folder / "states")
    return server


def start(start_fake, *flags, **named):
    return leave_note(start_fake(*SLOTS, *flags, **named))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, verifier, data):
    """Master weights after a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    server = leave_note(launch(folder / "fake", *SLOTS))
    run(keys(folder, verifier, data), server, epochs=3, **UNKEPT)
    server.end()
    return masters(folder / "run")


def masters(path):
    return load_file(path / "2" / "master_weights.fp32")


def test_a_run_asks_for_each_row_once_and_leaves_no_file(start_fake, settings, tmp_path):
    server, events = start(start_fake), []
    result = run(settings, server, events.append)
    assert result.num_steps > 0
    assert server.log == ["ok"] * 24  # two epochs: kept in memory after the first
    assert server.files == []
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("serves fake; the verifier is" in note for note in notes)


@pytest.mark.parametrize("after", [8, 18, 42])  # inside an epoch; in its validation; at the start of another
def test_a_server_that_dies_costs_no_step_and_the_same_command_goes_on(start_fake, settings, whole, tmp_path, after):
    dying = start(start_fake)
    dying.inject(*[""] * after, "die")
    steps = []
    changes = {"epochs": 3, "checkpoint_freq": 2, **UNKEPT}

    def listen(event):
        if isinstance(event, StepDone):
            steps.append(event.step)

    with pytest.raises(ServerUnavailableError, match="no answer from") as failure:
        run(settings, dying, listen, **changes)
    first = len(steps)
    assert f"interrupted: the same command continues from step {first}" in str(failure.value)
    back = start(start_fake, port=dying.port)
    run(settings, back, listen, **changes)
    assert steps == list(range(1, len(steps) + 1))  # none twice, none left out
    assert 0 < first < len(steps)
    resumed = masters(tmp_path / "run")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_server_that_comes_back_in_time_is_not_even_noticed(start_fake, settings, monkeypatch):
    from speculators.data_generation import vllm_client

    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.05)
    server = start(start_fake)
    server.inject(*[""] * 5, "die")
    restart = server.when_it_dies(lambda: start(start_fake, port=server.port))
    assert run(settings, server, epochs=1, max_retries=8).num_steps > 0
    restart.join()
    assert "die" in server.log


def test_states_of_another_width_and_rows_too_long_are_refused(start_fake, settings, tmp_path):
    server = leave_note(start_fake("--slots", "5", "--hidden", "8"))
    with pytest.raises(InvalidResponseError, match="hidden size is 8; the verifier's is 16: it is another model"):
        run(settings, server)
    normal = start(start_fake, name="normal")  # takes 64 tokens, one of which it generates
    Dataset.from_list([{"input_ids": [1] * 64, "loss_mask": [1] * 64, "seq_len": 64}] * 4).save_to_disk(
        tmp_path / "long"
    )
    with pytest.raises(ValueError, match=r"longest row has 64 tokens.*takes 63.*--max-model-len 65"):
        run(settings, normal, data_path=str(tmp_path / "long"))


def test_served_states_are_cached_and_compared_with_those_stored(start_fake, settings, tmp_path):
    server = start(start_fake)
    stored = {"cache_hidden_states": True, "hidden_states_path": str(tmp_path / "stored")}
    run(settings, server, epochs=1, **stored)
    assert len((tmp_path / "stored" / "states-000-00000.index").read_bytes().splitlines()) == 24
    asked = len(server.log)
    run(settings, server, save_path=str(tmp_path / "second"), epochs=1, **stored)
    assert len(server.log) == asked + 1  # one row, to see that server and files agree
    offline = {"on_missing": "raise", "hidden_states_path": str(tmp_path / "stored"), "epochs": 1}
    run(settings, None, save_path=str(tmp_path / "third"), **offline)


def test_a_run_goes_on_where_one_of_several_servers_dies(start_fake, tmp_path, verifier, data):
    weights = []
    for name in ("whole", "dying"):
        servers = [start(start_fake, name=f"{name}-{number}") for number in range(2)]
        if name == "dying":
            servers[0].inject(*[""] * 5, "die")
        several = {
            "vllm_endpoint": ",".join(server.endpoint for server in servers),
            "server_states_path": ",".join(str(server.states) for server in servers),
        }
        result = train(TrainConfig.from_flat({**keys(tmp_path / name, verifier, data), **several, **UNKEPT}))
        weights.append(load_file(result.checkpoint / "master_weights.fp32"))
    assert servers[0].log[-1] == "die" and len(servers[1].log) > len(servers[0].log)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_directories_and_servers_must_pair(tmp_path, verifier, data):
    several = {"vllm_endpoint": "http://a/v1,http://b/v1,http://c/v1", "server_states_path": "x,y"}
    with pytest.raises(ValueError, match="names 2 directories for 3 servers"):
        train(TrainConfig.from_flat({**keys(tmp_path, verifier, data), **several}))
