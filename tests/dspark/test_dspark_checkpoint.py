"""What is on disk, what comes back, what is refused; a training run from a config alone."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from dflash_toys import HIDDEN, MASK_TOKEN, MIXED, SLIDING, VOCAB, packed_batch
from safetensors.torch import load_file

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models import DSparkDraftModel, DSparkSpeculatorConfig
from speculators.train.config import TrainConfig
from speculators.train.events import StepDone
from speculators.train.run import train

GOLDEN = Path(__file__).parent / "golden"


def test_the_class_is_found_by_name():
    assert SpeculatorModel.get_class("dspark") is DSparkDraftModel


@pytest.mark.parametrize("name", ["dspark", "dspark_model"])
def test_published_configs_come_back_byte_for_byte(name, tmp_path):
    text = (GOLDEN / f"{name}.config.json").read_text()
    config = SpeculatorModelConfig.from_dict(json.loads(text))
    assert type(config) is DSparkSpeculatorConfig
    config.save_pretrained(tmp_path)
    expected = text.replace('"transformers_version": "5.19.0"', f'"transformers_version": "{transformers.__version__}"')
    assert (tmp_path / "config.json").read_text() == expected


@pytest.mark.parametrize(("kind", "extra"), [("vanilla", []), ("gated", ["gate_proj"]), ("rnn", ["joint_proj"])])
def test_exactly_these_tensors_are_saved_and_come_back(drafter, tmp_path, kind, extra):
    model = drafter(markov_head_type=kind, num_layers=2).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    heads = {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight"}
    heads |= {"confidence_head.proj.bias"} | {
        f"markov_head.{name}.{part}" for name in extra for part in ("weight", "bias")
    }
    assert {name for name in saved if "head." in name} == heads | {"lm_head.weight"}
    assert set(saved) == model.expected_keys(model.config)
    assert saved["markov_head.markov_w1.weight"].shape == (VOCAB, 5)
    assert saved["markov_head.markov_w2.weight"].shape == (24, 5)
    assert saved["confidence_head.proj.weight"].shape == (1, HIDDEN + 5)
    if kind == "rnn":
        assert saved["markov_head.joint_proj.weight"].shape == (15, 10 + HIDDEN)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is DSparkDraftModel and again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model(**packed_batch([12]))[1], again(**packed_batch([12]))[1])


def test_heads_are_optional(drafter, tmp_path):
    model = drafter(markov_rank=0, confidence_head_with_markov=False, draft_vocab_size=VOCAB)
    model.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert saved == model.expected_keys(model.config)
    assert {name for name in saved if "head" in name} == {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    with pytest.raises(ValueError, match="no-confidence-head-with-markov"):
        drafter(markov_rank=0)


def test_every_field_is_written(drafter, tmp_path):
    drafter().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "sample_from_anchor": True, "sliding_window_non_causal": False, "markov_rank": 5, "markov_head_type": "vanilla",
        "enable_confidence_head": True, "confidence_head_with_markov": True, "block_size": 4,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4


@pytest.mark.parametrize(
    ("arguments", "is_causal"),
    [({}, None), (SLIDING, None), (MIXED, None), ({**SLIDING, "sliding_window_non_causal": True}, False)],
)
def test_the_mask_that_is_trained_is_the_mask_that_is_served(drafter, arguments, is_causal):
    config = drafter(**arguments).config
    assert getattr(config.transformer_layer_config, "is_causal", None) is is_causal
    assert [sight.causal for sight in config.sights] == config.served_causal


def test_heads_that_engines_do_not_load_are_warned_about(drafter, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        drafter().save_pretrained(tmp_path)
        assert "vLLM" not in caplog.text
        drafter(markov_head_type="rnn").save_pretrained(tmp_path)
    assert "not 'rnn' with rank 5" in caplog.text


def test_training_from_a_config_alone_lowers_the_loss_and_saves_a_drafter(verifier_path, tmp_path):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(24):
        length = int(torch.randint(10, 20, (), generator=generator))
        start, stride = torch.randint(1, VOCAB - 1, (2,), generator=generator).tolist()
        ids = [(start + stride * step) % (VOCAB - 1) for step in range(length)]
        rows.append({"input_ids": ids, "loss_mask": [0] * 2 + [1] * (length - 2), "seq_len": length})
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    losses = []

    def listen(event):
        if isinstance(event, StepDone):
            losses.append(event.metrics["loss"])

    config = TrainConfig.from_flat({
        "speculator_type": "dspark", "verifier_name_or_path": str(verifier_path), "data_path": str(tmp_path / "data"),
        "save_path": str(tmp_path / "run"), "total_seq_len": 64, "epochs": 8, "hidden_states_dtype": "float32",
        "lr": 0.02, "num_layers": 1, "block_size": 4, "mask_token_id": MASK_TOKEN, "target_layer_ids": [1, 3, 5],
        "train_data_ratio": 0.8, "markov_rank": 4,
    })  # fmt: skip
    result = train(config, on_event=listen)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    model = SpeculatorModel.from_pretrained(result.checkpoint)
    assert type(model) is DSparkDraftModel and model.config.markov_rank == 4
    assert set(load_file(Path(result.checkpoint) / "model.safetensors")) == model.expected_keys(model.config)


def test_defaults_of_training():
    flat = TrainConfig.from_flat({"speculator_type": "dspark", "verifier_name_or_path": "x"}).flatten()
    expected = {
        "num_layers": 5, "draft_arch": "qwen3", "loss_fn": "kl_div", "block_size": 8, "max_anchors": 512,
        "per_position_loss_weight": "fixed-exp-decay", "sample_from_anchor": True, "markov_rank": 256,
        "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True,
        "confidence_head_alpha": 1.0,
    }  # fmt: skip
    assert {key: flat[key] for key in expected} == expected
    train_kwargs, val_kwargs = DSparkDraftModel.get_trainer_kwargs(**flat)
    assert train_kwargs == val_kwargs and train_kwargs is not val_kwargs
    assert DSparkDraftModel.get_trainer_kwargs(loss_fn="kl_div")[0]["max_anchors"] == 3072
