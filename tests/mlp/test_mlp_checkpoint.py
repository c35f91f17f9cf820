"""What is on disk and what comes back."""

import json

import pytest
import torch
from drafter_toys import HIDDEN, VOCAB
from last_state_toys import packed_batch
from safetensors.torch import load_file

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models import MLPSpeculator, MLPSpeculatorConfig


@pytest.mark.parametrize("tied", [True, False])
def test_exactly_the_trained_weights_are_saved_and_come_back_bit_for_bit(make_drafter, tmp_path, tied):
    model = make_drafter(tie_weights=tied).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    own = range(1 if tied else 3)
    keys = {f"{name}.{i}.weight" for i in own for name in ("emb", "head", "ln")} | {f"ln.{i}.bias" for i in own}
    keys |= {f"proj.{i}.weight" for i in range(2 if tied else 3)}
    assert set(saved) == keys and saved["emb.0.weight"].shape == saved["head.0.weight"].shape == (VOCAB, 12)
    assert saved["proj.0.weight"].shape == (12, HIDDEN) and saved["proj.1.weight"].shape == (12, 12)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is MLPSpeculator and again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    batch = packed_batch([12])
    assert torch.equal(model(**batch)[1], again(**batch)[1])
    assert {name for name, p in again.named_parameters() if p.requires_grad} == keys
    SpeculatorModel.verify_training_compatible(again)


def test_config_json_is_exactly_this(make_drafter, verifier_path, tmp_path):
    make_drafter().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("speculators_version", "transformers_version"):
        assert config.pop(key)
    assert config == {
        "architectures": ["MLPSpeculator"],
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": 12,
        "num_layers": 3,
        "rms_norm_eps": 1e-4,
        "scale_input": False,
        "tie_weights": True,
        "vocab_size": VOCAB,
        "speculators_config": {
            "algorithm": "mlp",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": str(verifier_path)},
        },
        "speculators_model_type": "mlp",
        "tie_word_embeddings": False,
    }


def test_class_defaults_and_old_names():
    config = MLPSpeculatorConfig()
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (4096, 4096, 128256)
    assert config.num_layers == 5 and config.tie_weights and config.architectures == ["MLPSpeculator"]
    assert SpeculatorModelConfig.from_dict(config.to_dict()) == config
    old = MLPSpeculatorConfig(emb_dim=64, inner_dim=0, n_predict=4, vocab_size=100)
    assert (old.hidden_size, old.intermediate_size, old.num_layers) == (64, 64, 4)


def test_a_reduced_vocabulary_is_refused(make_drafter):
    with pytest.raises(ValueError, match="draft_vocab_size=24"):
        make_drafter(draft_vocab_size=24)
