"""What is on disk, in our format and in vLLM's, and what comes back."""

import json

import pytest
import torch
from drafter_toys import HIDDEN, VOCAB
from last_state_toys import packed_batch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.checkpoint.formats import ForeignCheckpoint
from speculators.models import MedusaDraftModel, MedusaSpeculatorConfig

KEYS = {f"blocks.{i}.layers.{j}.{kind}" for i in range(3) for j in range(2) for kind in ("weight", "bias")}
KEYS |= {f"lm_heads.{i}.weight" for i in range(3)}


def same_drafts(model, other):
    batch = packed_batch([12])
    return all(torch.equal(a, b) for a, b in zip(model(**batch)[0], other(**batch)[0], strict=True))


def test_exactly_the_heads_are_saved_and_come_back_bit_for_bit(make_drafter, tmp_path):
    model = make_drafter().eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == KEYS and saved["lm_heads.0.weight"].shape == (VOCAB, HIDDEN)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is MedusaDraftModel and again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == KEYS
    SpeculatorModel.verify_training_compatible(again)


def test_config_json_is_exactly_this(make_drafter, verifier_path, tmp_path):
    make_drafter().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("speculators_version", "transformers_version"):
        assert config.pop(key)
    assert config == {
        "architectures": ["MedusaDraftModel"],
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "num_heads": 3,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-4,
        "vocab_size": VOCAB,
        "speculators_config": {
            "algorithm": "medusa",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": str(verifier_path)},
        },
        "speculators_model_type": "medusa",
        "tie_word_embeddings": False,
    }
    assert SpeculatorModelConfig.from_dict(MedusaSpeculatorConfig().to_dict()) == MedusaSpeculatorConfig()


def test_vllms_directory_and_back(make_drafter, verifier_path, tmp_path):
    model = make_drafter()
    model.save_native(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == KEYS
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["MedusaModel"],
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "medusa_fc_bias": True,
        "model_type": "medusa",
        "num_heads": 3,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB,
    }
    assert same_drafts(model, MedusaDraftModel.from_native(tmp_path, verifier=str(verifier_path)))


def test_heads_are_read_for_a_verifier_that_has_no_rms_norm(make_drafter, tmp_path):
    make_drafter().save_native(tmp_path / "heads")
    GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN).save_pretrained(tmp_path / "gpt2")
    native, verifier = MedusaDraftModel.contract.format_named("medusa"), str(tmp_path / "gpt2")
    config = native.read(ForeignCheckpoint(tmp_path / "heads"), verifier).config
    assert (config.recorded_verifier, config.rms_norm_eps) == (verifier, 1e-5)  # GPT2Config's layer_norm_epsilon


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_the_medusa_repositorys_names_are_read(make_drafter, verifier_path, tmp_path, prefix):
    model = make_drafter()
    old = {}
    for i in range(3):
        for j in range(2):
            for kind in ("weight", "bias"):
                old[f"{prefix}{i}.{j}.linear.{kind}"] = model.state_dict()[f"blocks.{i}.layers.{j}.{kind}"]
        old[f"{prefix}{i}.2.weight"] = model.state_dict()[f"lm_heads.{i}.weight"]
    save_file(old, tmp_path / "model.safetensors")
    assert same_drafts(model, MedusaDraftModel.from_native(tmp_path, verifier=str(verifier_path)))
    save_file({**old, "token_map": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="token_map"):
        MedusaDraftModel.from_native(tmp_path)


def test_a_reduced_vocabulary_is_refused(make_drafter):
    with pytest.raises(ValueError, match="draft_vocab_size=24"):
        make_drafter(draft_vocab_size=24)
