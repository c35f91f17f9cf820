"""A verifier whose layers lie in several places computes the states of the whole one."""

from __future__ import annotations

import json

import pytest
import torch
from drafter_toys import save_llama, train_on_counting
from safetensors.torch import load_file

from speculators.data_generation import LocalSource
from speculators.interfaces import CaptureSpec
from speculators.train.config import ConfigError, TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.keys import DataKeys
from speculators.train.sources import placement_of
from speculators.verifier import check_reproduces_logits, load_verifier
from speculators.verifier.placement import device_of, read_device_map

NUM_LAYERS = 6
ON_DISK = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.layers.5", "lm_head")
CPU = ("model.layers.1", "model.layers.3", "model.layers.4", "model.norm", "model.rotary_emb")


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("verifier"), num_layers=NUM_LAYERS))


@pytest.fixture
def device_map(tmp_path) -> str:
    (tmp_path / "map.json").write_text(json.dumps(dict.fromkeys(ON_DISK, "disk") | dict.fromkeys(CPU, "cpu")))
    return str(tmp_path / "map.json")


def test_states_of_a_verifier_partly_on_disk_are_those_of_the_whole_one(verifier, device_map):
    pytest.importorskip("accelerate")
    whole = load_verifier(verifier, dtype=torch.float32, device="cpu")
    split = load_verifier(verifier, dtype=torch.float32, device_map=read_device_map(device_map))
    places = {name: param.device.type for name, param in split.named_parameters()}
    assert places["model.layers.0.mlp.up_proj.weight"] == places["lm_head.weight"] == "meta"
    assert places["model.layers.1.mlp.up_proj.weight"] == "cpu"
    assert device_of(split) == device_of(whole) == torch.device("cpu")
    check_reproduces_logits(split)
    capture = CaptureSpec((0, 2, 3, NUM_LAYERS), last_hidden=True)
    rows = [torch.arange(1, 30), torch.arange(3, 9)]
    for ours, theirs in zip(*(LocalSource(model, capture).read(rows) for model in (split, whole)), strict=True):
        assert torch.equal(ours.aux_TD, theirs.aux_TD)
        assert torch.equal(ours.last_hidden_TH, theirs.last_hidden_TH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither `auto` nor a JSON file"),
        ("[1]", "must hold an object"),
        ("{}", "must hold an object"),
        ('{"model": null}', "must hold an object"),
        ('{"model": "cuda:77"}', "torch sees"),
        ('{"model": 77}', "torch sees"),
        ('{"model": "gpu7"}', "unknown to torch"),
    ],
)
def test_a_wrong_map_is_refused_before_weights_are_read(content, message, tmp_path):
    if content is not None:
        (tmp_path / "map.json").write_text(content)
    keys = DataKeys(verifier_device_map=str(tmp_path / "map.json"))
    with pytest.raises(ValueError, match=message):
        placement_of(keys, Ranks())


def test_places_that_ranks_would_share_are_refused(device_map):
    for keys in (DataKeys(verifier_device="cpu"), DataKeys(verifier_device_map=device_map)):
        with pytest.raises(ValueError, match="each of 2 ranks would load its verifier on"):
            placement_of(keys, Ranks(world_size=2))
    assert placement_of(DataKeys(verifier_device="cpu"), Ranks()) == {"device": "cpu"}
    assert placement_of(DataKeys(), Ranks(device=torch.device("meta"))) == {"device": torch.device("meta")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verifier_device": "cpu", "verifier_device_map": "auto"}, "leave out verifier_device"),
        ({"verifier_device_map": "auto", "eval_prompts": 2}, "decoded on one device"),
        ({"verifier_device_map": "auto", "vllm_endpoint": "http://h/v1"}, "leave out --verifier-device-map"),
        ({"verifier_device": "cpu", "on_missing": "raise"}, "leave out --verifier-device"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_sources(cli={"verifier_name_or_path": "m", **given})


def test_a_device_and_a_map_are_one_too_many(verifier):
    with pytest.raises(ValueError, match="give one of the two"):
        load_verifier(verifier, device="cpu", device_map="auto")


def test_a_run_with_a_split_verifier_ends_with_the_weights_of_a_whole_one(verifier, device_map, tmp_path):
    pytest.importorskip("accelerate")
    weights = []
    for name, place in (("whole", {"verifier_device": "cpu"}), ("split", {"verifier_device_map": device_map})):
        result, _ = train_on_counting(tmp_path / name, "medusa", verifier, epochs=2, **place)
        weights.append(load_file(result.checkpoint / "master_weights.fp32"))
        assert (result.parity is None) == (name == "split")  # the gate decodes on one device
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
