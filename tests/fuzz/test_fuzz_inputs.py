"""Settings, rows of data, manifests, files of a run and answers of a server, as nobody expects them."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import asdict, fields

import httpx
import pytest
import torch
from fuzz_toys import ODD_VALUES, mutated, watched
from hypothesis import given
from hypothesis import strategies as st

from speculators import SpeculatorModel
from speculators.data_generation import vllm_client
from speculators.data_generation.conversations import parse_row
from speculators.data_generation.offline import header_problem, hidden_state_path, to_bytes, to_tensors
from speculators.data_generation.prepared import Manifest, Recipe
from speculators.data_generation.rollout import make_rollout
from speculators.data_generation.sources.store import load_file
from speculators.decoding.config import SpeculativeConfig
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.train.checkpoint_files import OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE, Position, read_position
from speculators.train.checkpointer import Checkpointer
from speculators.train.optimizers import make_optimizers
from speculators.train.records import TrainerConfig

CONFIGS = [
    {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    {"model": "org/name", "num_speculative_tokens": 3, "rejection_sample_method": "standard"},
    {"method": "suffix", "suffix_decoding_max_tree_depth": 4},
    {"model": "org/name", "dynamic_tree": {"total_token": 6, "depth": 3, "top_k": 2}},
    {"model": "org/name", "speculative_token_tree": "[(0,), (1,), (0, 0)]"},
    {"model": "o/n", "num_speculative_tokens_per_batch_size": [[1, 2, 3]], "num_speculative_tokens": 4},
]
FIELDS = sorted(SpeculativeConfig.model_fields)


@given(st.sampled_from(CONFIGS).flatmap(mutated), st.none() | st.sampled_from(FIELDS), ODD_VALUES)
def test_speculative_configs(values, field, value):
    with watched(ValueError, NotImplementedError):
        config = SpeculativeConfig.from_vllm_json(json.dumps(values if field is None else {**values, field: value}))
        assert config.max_depth > 0 and repr(config) and isinstance(config.vllm_unsupported(), dict)


def test_long_chains_take_no_memory():
    with watched():
        assert SpeculativeConfig(model="o/d", num_speculative_tokens=60_000).max_depth == 60_000
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        SpeculativeConfig(model="o/d", num_speculative_tokens=10**9)


ROWS = [
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "tools": "[]"},
    {"messages": [{"role": "user", "content": [{"text": "a"}]}, {"role": "assistant", "content": "b", "name": "n"}]},
    {"conversation": {"role": ["user", "assistant"], "content": ["a", "b"]}, "primary_id": "x"},
    {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
    {"prompt": "hello"},
]


@given(st.sampled_from(ROWS).flatmap(mutated))
def test_rows_of_data(row):
    with watched(ValueError):
        parsed = parse_row(row, Counter())
        json.dumps(asdict(parsed), ensure_ascii=False, default=str).encode()
    with watched(ValueError):
        make_rollout(0, row, "id")


RECIPE = Recipe(**({field.name: None for field in fields(Recipe)} | {"verifier": "v", "seq_length": 8}))  # type: ignore
MANIFEST = json.loads(Manifest(RECIPE, "0", 1, 1, 3, 2, 3, 3).to_json())


@given(mutated(MANIFEST))
def test_manifests(tmp_path_factory, values):
    with watched(ValueError):
        manifest = Manifest.from_json(json.dumps(values), tmp_path_factory.getbasetemp())
        assert manifest.facts()


POSITION = asdict(Position())


@given(mutated(POSITION))
def test_positions_of_a_run(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("run")
    (path / STATE_FILE).write_text(json.dumps(values))
    with watched(ValueError):
        position = read_position(path)
        assert all(type(value) is int and value >= 0 for value in asdict(position).values())


ANSWER = {
    "choices": [{"prompt_token_ids": [1, 2], "token_ids": [3]}],
    "kv_transfer_params": {"hidden_states_path": "/tmp/states/a.safetensors"},
}
MODELS = {"data": [{"id": "m", "root": "m", "max_model_len": 64}]}


@given(mutated(ANSWER), mutated(MODELS), st.sampled_from([200, 200, 200, 400, 404]))
def test_answers_of_a_server(tmp_path_factory, answer, models, code):
    def reply(request: httpx.Request) -> httpx.Response:
        values = models if request.url.path.endswith("models") else answer
        return httpx.Response(code, content=json.dumps(values).encode())

    with httpx.Client(transport=httpx.MockTransport(reply), base_url="http://server/v1/") as client:
        with watched(vllm_client.InvalidResponseError):
            assert isinstance(vllm_client.served_model(client, max_retries=0).root, str)
        with watched(vllm_client.InvalidResponseError):
            handle, _ = vllm_client.generate_hidden_states(client, "m", {"input_ids": [1, 2]}, max_retries=0)
            vllm_client.name_of_served_file(handle, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def saved_run(checkpoints, tmp_path_factory):
    """A drafter, its optimizers after a step, and the checkpoint that holds both."""
    model = SpeculatorModel.from_pretrained(checkpoints["eagle3"])
    optimizers = make_optimizers(model, TrainerConfig(lr=1e-3, num_epochs=1, save_path=".", optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizers.step(1.0)
    root = tmp_path_factory.mktemp("run")
    Checkpointer(root).save(root / "0", model, optimizers, Position())
    return model, optimizers, root / "0"


@pytest.mark.parametrize("name", [OPTIMIZER_FILE, SCHEDULER_FILE])
def test_damaged_states_of_a_run(saved_run, name):
    model, optimizers, path = saved_run
    whole = (path / name).read_bytes()
    content = torch.load(path / name, weights_only=True)

    @given(mutated(content), st.none() | st.integers(0, len(whole)))
    def run(changed, cut):
        if cut is None:
            torch.save(changed, path / name)
        else:
            (path / name).write_bytes(whole[:cut])
        with watched(ValueError):
            Checkpointer(path.parent).load(path, model, optimizers)

    run()
    (path / name).write_bytes(whole)


def test_headers_of_stored_states(tmp_path):
    """As a damaged file, or another tool, leaves them: named before training, never a traceback."""
    capture = CaptureSpec((1, 3), last_hidden=True)
    states = VerifierStates(torch.arange(6), torch.randn(6, 8), torch.randn(6, 4))
    content = to_bytes(to_tensors(states, capture, torch.bfloat16), capture, torch.float32, "verifier")
    file = hidden_state_path(tmp_path, 0)
    size = struct.unpack("<Q", content[:8])[0]

    @given(mutated(json.loads(content[8 : 8 + size])), st.none() | st.integers(0, len(content)))
    def run(changed, cut):
        text = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :][:cut])
        with watched():
            problem = header_problem(file)
            assert problem is None or isinstance(problem, str)
        with watched(ValueError):
            load_file(file)

    run()
