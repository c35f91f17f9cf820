"""What is on disk, what comes back, what is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from dflash_toys import MIXED, SLIDING, packed_batch
from drafter_toys import HIDDEN, VOCAB
from safetensors.torch import load_file

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models import DSparkDraftModel, DSparkSpeculatorConfig
from speculators.train.config import TrainConfig

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
    assert set(saved) == model.expected_tensors(model.config).keys()
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
    assert saved == model.expected_tensors(model.config).keys()
    assert {name for name in saved if "head" in name} == {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    with pytest.raises(ValueError, match="no-confidence-head-with-markov"):
        drafter(markov_rank=0)


def test_every_field_is_written(drafter, tmp_path):
    drafter().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        "markov_rank": 5,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "block_size": 4,
    }
    assert {key: values[key] for key in expected} == expected
    assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4


@pytest.mark.parametrize(
    ("arguments", "is_causal"),
    [({}, None), (SLIDING, None), (MIXED, None), ({**SLIDING, "sliding_window_non_causal": True}, False)],
)
def test_the_mask_that_is_trained_is_the_mask_that_is_served(drafter, arguments, is_causal):
    config = drafter(**arguments).config
    assert getattr(config.transformer_layer_config, "is_causal", None) is is_causal
    assert [layer_mask.causal for layer_mask in config.layer_masks] == config.served_causal


def test_heads_that_engines_do_not_load_are_warned_about(drafter, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        drafter().save_pretrained(tmp_path)
        assert "vLLM" not in caplog.text
        drafter(markov_head_type="rnn").save_pretrained(tmp_path)
    assert "not 'rnn' with rank 5" in caplog.text


def test_defaults_of_training():
    flat = TrainConfig.from_flat({"speculator_type": "dspark", "verifier_name_or_path": "x"}).flatten()
    expected = {
        "num_layers": 5,
        "draft_arch": "qwen3",
        "loss_fn": "kl_div",
        "block_size": 8,
        "max_anchors": 512,
        "per_position_loss_weight": "fixed-exp-decay",
        "sample_from_anchor": True,
        "markov_rank": 256,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "confidence_head_alpha": 1.0,
    }
    assert {key: flat[key] for key in expected} == expected
    train_kwargs, val_kwargs = DSparkDraftModel.get_trainer_kwargs(**flat)
    assert train_kwargs == val_kwargs and train_kwargs is not val_kwargs
    assert DSparkDraftModel.get_trainer_kwargs(loss_fn="kl_div")[0]["max_anchors"] == 3072
