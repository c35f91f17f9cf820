"""Settings, rows of data, manifests, files of a run and answers of a server, as nobody expects them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, fields

import httpx
import pytest
from fuzz_toys import ODD_VALUES, mutated, watched
from hypothesis import given
from hypothesis import strategies as st

from speculators.data_generation import vllm_client
from speculators.data_generation.conversations import parse_row
from speculators.data_generation.prepared import Manifest, Recipe
from speculators.data_generation.rollout import make_rollout
from speculators.decoding.config import SpeculativeConfig
from speculators.train.checkpoint_files import STATE_FILE, Position, read_position

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
