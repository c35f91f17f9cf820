"""What is on disk, how command-line values become a config."""

import json
from pathlib import Path

import pytest
import torch
from drafter_toys import HIDDEN, VOCAB
from peagle_toys import MASK, packed_batch
from pydantic import ValidationError
from safetensors import safe_open

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.losses import kl_div_loss
from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig

NAMES = ["embed_tokens", "fc", "norm", "lm_head"]
LAYER = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{n}_proj" for n in "qkvo")]
LAYER += ["self_attn.q_norm", "self_attn.k_norm", *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
ALWAYS = {f"{name}.weight" for name in [*NAMES, "layers.0.hidden_norm", *(f"layers.0.{n}" for n in LAYER)]}
ALWAYS |= {"mask_hidden"}
MAPS = {"d2t", "t2d"}
CASES = {
    "qwen3": ({}, ALWAYS | MAPS),
    "all tokens": ({"draft_vocab_size": VOCAB}, ALWAYS),
    "llama": ({"arch": "llama"}, {key for key in ALWAYS if ".q_norm" not in key and ".k_norm" not in key} | MAPS),
    "fc_norm": ({"fc_norm": True}, ALWAYS | {"d2t", "t2d", *(f"fc_norm.{j}.weight" for j in range(3))}),
    "norm_before_fc": ({"norm_before_fc": True}, ALWAYS | {"d2t", "t2d", "input_norm.weight"}),
    "two layers": ({"num_layers": 2}, ALWAYS | {"d2t", "t2d"} | {f"layers.1.{n}.weight" for n in LAYER}),
}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("case", CASES)
def test_files_hold_exactly_the_contracts_keys(make_drafter, tmp_path, case):
    arguments, expected = CASES[case]
    model = make_drafter(**arguments)
    assert SpeculatorModel.expected_tensors(model.config).keys() == expected
    model.save_pretrained(tmp_path)
    saved = tensors(tmp_path)
    assert set(saved) == expected
    assert saved["mask_hidden"].shape == (1, 1, 3 * HIDDEN)
    assert not any(torch.isnan(tensor).any() for tensor in saved.values() if tensor.is_floating_point())


def test_the_trained_embedding_is_saved_and_loaded_bit_for_bit(make_drafter, verifier, tmp_path):
    model = make_drafter(norm_before_fc=True)
    with torch.no_grad():
        model.embed_tokens.weight += 0.5
    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is PEagleDraftModel
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(again.embed_tokens.weight, verifier.model.embed_tokens.weight)
    assert again.embed_tokens.weight.requires_grad and not again.lm_head.weight.requires_grad
    batch = packed_batch([6, 5])
    model.eval()
    assert torch.equal(model(**batch)[1], again(**batch)[1])


def test_config_json_says_everything_an_engine_reads(make_drafter, verifier_path, tmp_path):
    make_drafter(num_depths=6).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("speculators_version", "transformers_version"):
        assert config.pop(key)
    nested = config.pop("transformer_layer_config")
    assert (nested["model_type"], nested["head_dim"], nested["layer_types"]) == ("qwen3", 6, ["full_attention"])
    assert config == {
        "architectures": ["PEagleDraftModel"],
        "draft_vocab_size": 24,
        "dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "embed_requires_grad": True,
        "fc_norm": False,
        "mask_token_id": MASK,
        "norm_before_fc": False,
        "norm_before_residual": False,
        "norm_output": False,
        "speculators_config": {
            "algorithm": "peagle",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 6, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": str(verifier_path)},
        },
        "speculators_model_type": "peagle",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
    }


def test_fc_norm_is_also_written_where_vllm_forwards_it(make_drafter, tmp_path):
    make_drafter(fc_norm=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["fc_norm"] is True and config["transformer_layer_config"]["fc_norm"] is True
    assert "fc_norm" not in make_drafter().config.to_dict()["transformer_layer_config"]


def test_training_arguments_of_older_configs_are_kept_and_obeyed(make_drafter):
    config = PEagleSpeculatorConfig()
    assert (config.num_depths, config.down_sample_ratio, config.embed_requires_grad) == (8, 0.7, True)
    assert not {"num_depths", "down_sample_ratio", "down_sample_ratio_min"} & config.to_dict().keys()
    old = {**make_drafter().config.to_dict(), "num_depths": 3, "down_sample_ratio": 0.9, "down_sample_ratio_min": None}
    config = SpeculatorModelConfig.from_dict(old)
    assert {**config.to_dict()}["num_depths"] == 3 and config.to_dict()["down_sample_ratio"] == 0.9
    model = PEagleDraftModel(config)
    assert (model.num_depths, model.down_sample_ratio, model.down_sample_ratio_min) == (3, 0.9, 0.2)
    for wrong in ({"num_depths": 17}, {"num_depths": 0}, {"down_sample_ratio": 1.5}, {"down_sample_ratio_min": 0.0}):
        with pytest.raises(ValidationError):
            PEagleSpeculatorConfig(**wrong)


def test_trainer_kwargs():
    train, val = PEagleDraftModel.get_trainer_kwargs(loss_fn="kl_div", lr=1.0)
    assert train == val and train["loss_config"]["kl_div"][0] is kl_div_loss and train["loss_fn"] is kl_div_loss
    names = ("max_anchors", "num_depths", "down_sample_ratio", "down_sample_ratio_min")
    assert tuple(train[name] for name in names) == (None, 8, 0.7, 0.2)
    train, _ = PEagleDraftModel.get_trainer_kwargs(loss_fn="ce", max_anchors=9, num_depths=3)
    assert (train["max_anchors"], train["num_depths"]) == (9, 3)


def test_metrics_have_the_contracts_keys(make_drafter):
    _, _, metrics = make_drafter()(**packed_batch([9]), num_depths=3, loss_fn={"ce": 1.0, "tv": 1.0})
    names = {"loss", "full_acc", "ce_loss", "tv_loss"} | {f"position_{d}_acc" for d in range(3)}
    names |= {f"full_acc_{d}" for d in range(3)}  # ours: what the expected acceptance length is made of
    assert set(metrics) == {"loss"} | {f"{name}_{kind}" for name in names for kind in ("sum", "total")}


def test_a_missing_mask_token_is_said(make_drafter, verifier):
    model = make_drafter()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id is not set"):
        model.make_proposer(verifier, max_batch_size=1, max_length=8)
