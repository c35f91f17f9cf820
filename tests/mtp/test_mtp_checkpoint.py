"""What is on disk, what comes back, where training starts, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from drafter_toys import HIDDEN, VOCAB, train_on_counting
from mtp_toys import MIMO_LAYER, packed_batch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models import MTPDraftModel, MTPSpeculatorConfig
from speculators.train.config import ConfigError, TrainConfig

OWN = ["token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"]
DECODER = [
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
MORE = {
    "llama": [],
    "qwen3": ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
    "qwen2": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
}


def test_the_class_is_found_by_name():
    assert SpeculatorModel.get_class("mtp") is MTPDraftModel


@pytest.mark.parametrize("arch", MORE)
def test_exactly_the_mtp_layer_is_saved_and_comes_back_bit_for_bit(drafter, tmp_path, arch):
    model = drafter(arch).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    names = [f"{name}.weight" for name in (*OWN, *DECODER)] + MORE[arch]
    assert set(saved) == {f"mtp_layers.0.{name}" for name in names}
    assert saved["mtp_layers.0.input_proj.weight"].shape == (HIDDEN, 2 * HIDDEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is MTPDraftModel and again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    batch = packed_batch([12])
    assert torch.equal(model(**batch)[1], again(**batch)[1])
    assert {name for name, p in again.named_parameters() if p.requires_grad} == set(saved)


def test_embedding_and_head_are_the_verifiers_even_when_a_file_has_others(drafter, tmp_path):
    model = drafter()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    noise = {name: torch.randn(VOCAB, HIDDEN) for name in ("embed_tokens.weight", "lm_head.weight")}
    save_file({**load_file(file), **noise}, file, metadata={"format": "pt"})
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not hasattr(again, "verifier_lm_head")


def test_config_json_holds_the_whole_verifier_config(drafter, verifier_paths, tmp_path):
    drafter("llama", num_speculative_steps=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    nested = config.pop("transformer_layer_config")
    verifier = json.loads((verifier_paths["llama"] / "config.json").read_text())
    assert {key: nested[key] for key in verifier.keys() & nested.keys()} == {
        key: verifier[key] for key in verifier.keys() & nested.keys()
    }
    assert nested["num_hidden_layers"] == 3
    needed = (
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim hidden_act max_position_embeddings rms_norm_eps attention_bias tie_word_embeddings rope_parameters"
    )
    assert set(needed.split()) <= set(nested)
    for key in ("speculators_version", "transformers_version"):
        assert config.pop(key)
    assert config == {
        "architectures": ["MTPDraftModel"],
        "dtype": "float32",
        "num_nextn_predict_layers": 1,
        "speculators_config": {
            "algorithm": "mtp",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": str(verifier_paths["llama"])},
        },
        "speculators_model_type": "mtp",
        "tie_word_embeddings": False,
    }


def test_a_saved_model_writes_the_published_config(tmp_path):
    golden = Path(__file__).parents[1] / "core" / "golden"
    values = json.loads((golden / "mtp.config.json").read_text())
    values["speculators_config"]["verifier"]["name_or_path"] = None
    MTPDraftModel(SpeculatorModelConfig.from_dict(values)).save_pretrained(tmp_path)
    expected = json.loads((golden / "mtp_model.config.json").read_text())
    expected["speculators_config"]["verifier"]["name_or_path"] = None
    expected["transformers_version"] = transformers.__version__
    assert json.loads((tmp_path / "config.json").read_text()) == expected


def test_class_defaults_are_the_contracts():
    config = MTPSpeculatorConfig()
    assert isinstance(config.transformer_layer_config, Qwen2Config) and config.architectures == ["MTPDraftModel"]
    assert config.hidden_size == config.transformer_layer_config.hidden_size
    assert config.draft_vocab_size == config.vocab_size == config.target_vocab_size
    assert SpeculatorModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="Cannot determine num_speculative_steps"):
        _ = config.num_speculative_steps
    with pytest.raises(ValidationError, match="MTP currently supports 1 layer, got 2"):
        MTPSpeculatorConfig(num_nextn_predict_layers=2)


def test_what_can_be_trained_is_said(verifier_paths):
    with pytest.raises(ValueError, match=r"'gpt2'.*llama.*mimo.*qwen2.*qwen3"):
        MTPDraftModel(MTPSpeculatorConfig(transformer_layer_config=transformers.GPT2Config()))
    config = Qwen3Config(vocab_size=VOCAB, hidden_size=HIDDEN)
    with pytest.raises(ValueError, match="verifier_name_or_path is required"):
        MTPDraftModel.from_training_args(config)
    with pytest.raises(ValueError, match="draft_vocab_size=24: an MTP layer drafts through the verifier's own head"):
        path = str(verifier_paths["qwen3"])
        MTPDraftModel.from_training_args(config, verifier_name_or_path=path, draft_vocab_size=24)


def test_target_layers_and_layers(drafter):
    model = drafter()
    assert model.target_layer_ids == [3] and model.layers is model.mtp_layers and len(model.layers) == 1
    SpeculatorModel.verify_training_compatible(model)


def test_training_starts_from_the_layer_the_verifier_ships_with(drafter, verifier_paths):
    """MiMo keeps the hidden half of input_proj first; ours the embedding's."""
    model = drafter("qwen2", random=False)
    native = load_file(verifier_paths["qwen2"] / "model.safetensors")
    ours = model.mtp_layers[0].state_dict()
    for name, tensor in ours.items():
        expected = native[MIMO_LAYER + name]
        if name == "input_proj.weight":
            expected = torch.cat((expected[:, HIDDEN:], expected[:, :HIDDEN]), dim=1)
        assert torch.equal(tensor, expected), name


def test_a_native_layer_that_does_not_fit_is_refused(verifier_paths, tmp_path):
    shutil.copytree(verifier_paths["qwen2"], tmp_path / "odd")
    file = tmp_path / "odd" / "model.safetensors"
    tensors = load_file(file)
    del tensors[MIMO_LAYER + "hidden_layernorm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    config = Qwen2Config.from_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"Architecture mismatch.*hidden_layernorm"):
        MTPDraftModel.from_training_args(config, verifier_name_or_path=str(tmp_path / "odd"))


def test_the_command_line_trains_it_with_the_verifiers_shape(tmp_path, verifier_paths):
    """The loss falls, and the checkpoint has the verifier's config, not a synthesised one."""
    result, remaining = train_on_counting(tmp_path, "mtp", verifier_paths["llama"], epochs=20)
    assert remaining < 0.5
    assert result.acceptance_length is not None and 1.0 < result.acceptance_length <= 4.0
    config = SpeculatorModelConfig.from_pretrained(result.checkpoint)
    nested = config.transformer_layer_config
    assert isinstance(nested, LlamaConfig) and nested.num_hidden_layers == 3 and config.num_speculative_steps == 3


@pytest.mark.parametrize("flag", ["--num-layers=1", "--draft-arch=llama", "--sliding-window=8", "--draft-config=x"])
def test_flags_that_shape_a_drafter_do_not_fit_a_layer_of_the_verifiers_shape(flag):
    argv = ["--speculator-type", "mtp", "--verifier-name-or-path", "x", *flag.split("=")]
    with pytest.raises(ConfigError, match=f"{flag.split('=')[0]}.*verifier's own shape"):
        TrainConfig.resolve(argv)
