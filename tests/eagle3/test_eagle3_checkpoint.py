"""What is on disk: key set, dtypes and config JSON of the contract; and how command-line values become a config."""

import json
from pathlib import Path

import pytest
import torch
from drafter_toys import HIDDEN, VOCAB, draft_maps
from eagle3_toys import packed_batch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.losses import ce_loss, kl_div_loss, tv_loss
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig, shift_batch
from speculators.models.eagle3.checkpoint import complete_transformer_layer_config
from speculators.models.eagle3.keys import Eagle3TrainingArgs

ATTENTION = {f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}
MLP = {f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
NORMS = {f"layers.0.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
ALWAYS = {"embed_tokens.weight", "fc.weight", "norm.weight", "lm_head.weight"} | ATTENTION | MLP | NORMS
SECOND = {name.replace("layers.0.", "layers.1.") for name in (ATTENTION | MLP | NORMS) if "hidden_norm" not in name}
CASES = {
    "llama": ({}, ALWAYS | {"d2t", "t2d"}),
    "all tokens": ({"draft_vocab_size": VOCAB}, ALWAYS),
    "norm_before_fc": ({"norm_before_fc": True}, ALWAYS | {"d2t", "t2d", "input_norm.weight"}),
    "fc_norm": ({"fc_norm": True}, ALWAYS | {"d2t", "t2d", *(f"fc_norm.{j}.weight" for j in range(3))}),
    "qwen3": (
        {"arch": "qwen3"},
        ALWAYS | {"d2t", "t2d", "layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight"},
    ),
    "two layers": ({"num_layers": 2}, ALWAYS | SECOND | {"d2t", "t2d"}),
    "biases": (
        {"nested": {"attention_bias": True}},
        ALWAYS | {"d2t", "t2d"} | {f"layers.0.self_attn.{name}_proj.bias" for name in "qkvo"},
    ),
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
    for name, tensor in saved.items():
        kinds = {"d2t": torch.int64, "t2d": torch.bool}
        assert tensor.dtype == kinds.get(name, torch.float32), name
    assert saved["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    assert saved["layers.0.self_attn.q_proj.weight"].shape == (4 * 6, 2 * HIDDEN)
    assert saved["layers.0.self_attn.k_proj.weight"].shape == (2 * 6, 2 * HIDDEN)
    assert saved["lm_head.weight"].shape == (model.config.draft_vocab_size, HIDDEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_save_and_load_is_bit_equal_and_trains_and_drafts_the_same(make_drafter, verifier, tmp_path):
    model = make_drafter(norm_before_fc=True, norm_output=True)
    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is Eagle3DraftModel
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    batch = packed_batch([6, 5])
    assert torch.equal(model(**batch)[1], again(**batch)[1])
    assert not again.lm_head.weight.requires_grad and not again.verifier_norm.weight.requires_grad


def test_config_json_says_everything_an_engine_reads(make_drafter, verifier_path, tmp_path):
    model = make_drafter(norm_before_fc=True, norm_output=True, ttt_steps=4)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("speculators_version", "transformers_version"):
        assert config.pop(key)
    assert config.pop("transformer_layer_config") == {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "layer_types": ["full_attention"],
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 40,
    }
    assert config == {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": 24,
        "dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "embed_requires_grad": False,
        "fc_norm": False,
        "norm_before_fc": True,
        "norm_before_residual": True,
        "norm_output": True,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": str(verifier_path)},
        },
        "speculators_model_type": "eagle3",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
    }


def test_llama_drafts_with_other_than_three_aux_layers_say_so_where_engines_look(make_drafter):
    nested = make_drafter(target_layer_ids=[1, 5]).config.transformer_layer_config
    assert nested.num_aux_hidden_states == 2
    assert not hasattr(make_drafter().config.transformer_layer_config, "num_aux_hidden_states")
    assert make_drafter(arch="qwen3", target_layer_ids=[1, 2, 3, 4]).fc.in_features == 4 * HIDDEN


def test_layer_types_must_fit_the_depth():
    with pytest.raises(ValueError, match="layer_types has 2 entries for num_hidden_layers=1"):
        nested = LlamaConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
        nested.layer_types = ["full_attention"] * 2
        complete_transformer_layer_config(nested)


def test_architectures_that_cannot_be_served_are_refused(make_drafter):
    with pytest.raises(ValueError, match=r"'gpt2'.*llama.*qwen3"):
        make_drafter(arch="gpt2")


def test_norms_before_fc_exclude_each_other():
    with pytest.raises(ValueError, match="mutually exclusive"):
        Eagle3SpeculatorConfig(norm_before_fc=True, fc_norm=True)


def test_class_defaults_are_the_contracts():
    config = Eagle3SpeculatorConfig()
    assert config.transformer_layer_config.model_type == "qwen3"
    assert (config.draft_vocab_size, config.norm_before_residual, config.eagle_aux_hidden_state_layer_ids) == (
        32000,
        False,
        None,
    )
    assert config.architectures == ["Eagle3Speculator"]
    assert SpeculatorModelConfig.from_dict(config.to_dict()) == config


def test_training_defaults_differ_from_class_defaults():
    """The command line trains EAGLE-3.1; a config without flags is the original EAGLE-3."""
    arguments = Eagle3TrainingArgs()
    assert (arguments.ttt_steps, arguments.ttt_step_loss_decay) == (3, 1.0)
    assert arguments.norm_before_residual and arguments.norm_output and not arguments.fc_norm
    assert Eagle3DraftModel.training_defaults == {"draft_arch": "llama"}


def test_norm_before_fc_is_on_unless_fc_norm_takes_its_place(make_drafter):
    for asked, fc_norm, expected in ((None, False, True), (None, True, False), (False, False, False)):
        assert make_drafter(norm_before_fc=asked, fc_norm=fc_norm).config.norm_before_fc is expected


def test_draft_vocabulary_defaults_to_the_verifiers(make_drafter):
    model = make_drafter(draft_vocab_size=None)
    assert model.config.draft_vocab_size == VOCAB and model.d2t is None


def test_the_draft_head_holds_the_kept_rows_of_the_verifiers_head(make_drafter, verifier):
    model = make_drafter()
    kept = draft_maps()[0].nonzero().flatten()
    assert torch.equal(model.lm_head.weight, verifier.lm_head.weight[kept])
    assert torch.equal(model.verifier_norm.weight, verifier.model.norm.weight)


@pytest.mark.parametrize("spec", ["kl_div", {"ce": 0.1, "tv": 0.9}, kl_div_loss])
def test_trainer_kwargs_serve_both_generations_of_callers(spec):
    train, val = Eagle3DraftModel.get_trainer_kwargs(loss_fn=spec, ttt_steps=2, ttt_step_loss_decay=0.8, lr=1.0)
    assert train == val and train is not val and train["loss_config"] is not val["loss_config"]
    assert (train["ttt_steps"], train["ttt_step_loss_decay"]) == (2, 0.8)
    if isinstance(spec, dict):
        assert train["loss_config"] == {"ce": (ce_loss, 0.1), "tv": (tv_loss, 0.9)}
    else:
        assert train["loss_fn"] is kl_div_loss and train["loss_config"]["kl_div"][0] is kl_div_loss


def test_loss_fn_alone_and_loss_config_alone_train_the_same(make_drafter):
    model, batch = make_drafter(), packed_batch([6])
    train, _ = Eagle3DraftModel.get_trainer_kwargs(loss_fn="rkl", ttt_steps=2, ttt_step_loss_decay=1.0)
    whole = model(**batch, **train)[1]
    assert torch.equal(model(**batch, **{k: v for k, v in train.items() if k != "loss_fn"})[1], whole)
    assert torch.equal(model(**batch, **{k: v for k, v in train.items() if k != "loss_config"})[1], whole)


def test_metrics_have_the_contracts_keys(make_drafter):
    _, _, metrics = make_drafter()(**packed_batch([6]), ttt_steps=2, loss_fn={"ce": 1.0, "tv": 1.0})
    names = {"loss"} | {f"{n}_{s}" for n in ("loss", "full_acc", "cond_acc", "ce_loss", "tv_loss") for s in range(2)}
    assert set(metrics) == {"loss"} | {f"{name}_{kind}" for name in names for kind in ("sum", "total")}
    assert metrics["loss_total"] == 1.0


def test_shift_pairs_each_token_with_the_state_before_it():
    """Hand-worked: tokens 0 1 2 3; state and target columns named by their position."""
    column = torch.arange(4)
    sample = {
        "input_ids": column * 10,
        "hidden_states": column[:, None].float(),
        "loss_mask": torch.tensor([0, 0, 1, 1]),
        "verifier_last_hidden_states": column[:, None].float(),
        "position_ids": column,
        "lengths": torch.tensor([4]),
    }
    shifted = shift_batch(sample)
    assert shifted["input_ids"].tolist() == [10, 20, 30]
    assert shifted["hidden_states"].flatten().tolist() == [0, 1, 2]
    assert shifted["verifier_last_hidden_states"].flatten().tolist() == [1, 2, 3]
    assert shifted["loss_mask"].tolist() == [0, 1, 1]
    assert shifted["position_ids"].tolist() == [1, 2, 3]
    assert shifted["lengths"].tolist() == [3] and sample["lengths"].tolist() == [4]
    assert Eagle3DraftModel.align is shift_batch


def test_unknown_aux_layers_are_an_error_that_says_what_to_do(make_drafter):
    model = make_drafter()
    model.config.eagle_aux_hidden_state_layer_ids = None
    with pytest.raises(ValueError, match="n // 2, n - 3"):
        _ = model.target_layer_ids


def test_training_and_drafting_read_the_layers_that_config_json_names(make_drafter, verifier, tmp_path):
    make_drafter().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"]
    model = SpeculatorModel.from_pretrained(tmp_path)
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=32)
    assert written == sorted(set(written)) and len(written) == 3
    # an engine reads config.json alone: a shift made alike in training and drafting would only show when served
    assert list(model.capture.aux_layer_ids) == list(proposer.capture.aux_layer_ids) == written


def test_layers_to_read_that_a_config_leaves_open_are_chosen_by_its_verifier(make_drafter, tmp_path):
    """[2, n // 2, n - 3] of 8 layers, as engines choose; written down when saved again."""
    torch.manual_seed(0)
    deep = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(deep).save_pretrained(tmp_path / "deep")
    make_drafter(verifier_name_or_path=str(tmp_path / "deep")).save_pretrained(tmp_path / "drafter")
    file = tmp_path / "drafter" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "eagle_aux_hidden_state_layer_ids": None}))
    model = Eagle3DraftModel.from_pretrained(tmp_path / "drafter")
    assert model.target_layer_ids == [2, 4, 5]
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
