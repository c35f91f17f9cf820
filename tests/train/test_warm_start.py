"""A drafter that begins with the weights of the algorithm it builds on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators.model_loading import load_tensors
from speculators.train.config import TrainConfig
from speculators.train.draft_shape import build_model, load_verifier_config
from speculators.train.events import StepDone
from speculators.train.run import train

PAIRS = {"peagle": "eagle3", "dspark": "dflash"}
NEW = {"peagle": {"mask_hidden"}, "dspark": {"markov_head", "confidence_head"}}

SHAPES = {
    "eagle3": {"target_layer_ids": [1, 2, 5], "draft_vocab_size": 40},
    "dflash": {"num_layers": 1, "block_size": 4, "target_layer_ids": [2, 4], "sample_from_anchor": False},
}


@pytest.fixture(scope="module")
def common(verifier_path, data_path, tmp_path_factory) -> dict[str, object]:
    data = shutil.copytree(data_path, tmp_path_factory.mktemp("warm") / "data")  # a draft vocabulary is kept in it
    torch.save({token: 64 - token for token in range(64)}, data / "token_freq.pt")
    return {
        "verifier_name_or_path": str(verifier_path),
        "data_path": str(data),
        "total_seq_len": 64,
        "hidden_states_dtype": "float32",
        "parity_gate": False,
        "contract_check": False,
        "draft_attn_impl": "eager",
    }


@pytest.fixture(scope="module")
def sources(common, tmp_path_factory):
    """Checkpoints of the algorithms that others build on, trained until they know something."""
    found = {}
    for name, keys in SHAPES.items():
        output = tmp_path_factory.mktemp(name)
        values = {**common, **keys, "speculator_type": name, "save_path": str(output), "epochs": 4, "lr": 0.01}
        found[name] = str(train(TrainConfig.from_flat(values)).checkpoint)
    return found


def first_loss(common, tmp_path, **keys) -> float:
    losses = []

    def listen(event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.metrics["loss"])

    train(TrainConfig.from_flat({**common, "max_steps": 1, "save_path": str(tmp_path), **keys}), on_event=listen)
    return losses[0]


@pytest.mark.parametrize("name", PAIRS)
def test_shared_tensors_are_taken_over_and_new_ones_named(name, common, sources, caplog):
    source = sources[PAIRS[name]]
    config = TrainConfig.from_flat({**common, "speculator_type": name, "from_pretrained": source})
    model = build_model(config, load_verifier_config(str(common["verifier_name_or_path"])))
    tensors, own = load_tensors(source, {}), model.state_dict()
    assert tensors.keys() <= own.keys()
    trained = {key for key, param in model.named_parameters() if param.requires_grad} & tensors.keys()
    assert trained >= {"fc.weight", "norm.weight", "layers.0.mlp.up_proj.weight"}
    assert all(torch.equal(own[key], tensors[key].float()) for key in trained)
    [line] = [record.getMessage() for record in caplog.records if "begins with" in record.getMessage()]
    assert {part.split(".")[0].split(" (")[0] for part in line.split("new are: ")[1].split(", ")} >= NEW[name]
    recorded, before = model.config.to_dict(), json.loads(Path(source, "config.json").read_text())
    kept = {"block_size", "mask_token_id", "draft_vocab_size", "sample_from_anchor", "norm_before_residual", "fc_norm"}
    assert all(recorded[key] == before[key] for key in kept & before.keys())
    assert model.embed_tokens.weight.requires_grad == (name == "peagle")


@pytest.mark.parametrize("name", PAIRS)
def test_a_warm_start_has_a_lower_first_loss(name, common, sources, tmp_path):
    head = {"markov_rank": 4, "enable_confidence_head": False, "loss_fn": "ce"} if name == "dspark" else {}
    cold = first_loss(common, tmp_path / "cold", speculator_type=name, **SHAPES[PAIRS[name]], **head)
    warm = first_loss(common, tmp_path / "warm", speculator_type=name, from_pretrained=sources[PAIRS[name]], **head)
    assert warm < 0.98 * cold


@pytest.mark.parametrize(
    ("name", "source", "keys", "message"),
    [
        ("mlp", "eagle3", {}, "is of 'eagle3', whose weights 'mlp' does not continue"),
        ("eagle3", "dflash", {}, "is of 'dflash'"),
        ("dspark", "dflash", {"block_size": 6}, "--block-size: +4 -> 6"),
    ],
)
def test_what_does_not_continue_a_checkpoint_is_refused(name, source, keys, message, common, sources):
    config = TrainConfig.from_flat({**common, "speculator_type": name, "from_pretrained": sources[source], **keys})
    with pytest.raises(ValueError, match=message):
        build_model(config, load_verifier_config(str(common["verifier_name_or_path"])))


def test_tensors_that_do_not_fit_are_refused_by_name(common, sources, tmp_path):
    source = tmp_path / "checkpoint"
    source.mkdir()
    tensors = load_file(f"{sources['dflash']}/model.safetensors")
    tensors["extra.weight"], tensors["norm.weight"] = torch.zeros(2), torch.zeros(3)
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(Path(sources["dflash"], "config.json").read_text())
    config = TrainConfig.from_flat({**common, "speculator_type": "dspark", "from_pretrained": str(source)})
    with pytest.raises(ValueError, match=r"extra\.weight, norm\.weight"):
        build_model(config, load_verifier_config(str(common["verifier_name_or_path"])))
