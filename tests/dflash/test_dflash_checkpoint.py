"""What is on disk, what comes back, and what is refused before it gets there."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from dflash_toys import MASK_TOKEN, MIXED, SLIDING, packed_batch, save_verifier
from drafter_toys import HIDDEN, VOCAB, draft_maps
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.train.config import TrainConfig
from speculators.train.events import StepDone
from speculators.train.run import train

GOLDEN = Path(__file__).parent / "golden"
LAYER = [
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def test_the_class_is_found_by_name():
    assert SpeculatorModel.get_class("dflash") is DFlashDraftModel


@pytest.mark.parametrize("name", ["dflash", "dflash_model"])
def test_published_configs_come_back_byte_for_byte(name, tmp_path):
    text = (GOLDEN / f"{name}.config.json").read_text()
    config = SpeculatorModelConfig.from_dict(json.loads(text))
    assert type(config) is DFlashSpeculatorConfig
    config.save_pretrained(tmp_path)
    expected = text.replace('"transformers_version": "5.19.0"', f'"transformers_version": "{transformers.__version__}"')
    assert (tmp_path / "config.json").read_text() == expected


def test_a_saved_model_writes_the_published_config(tmp_path):
    """A model save differs from a config save in three keys."""
    values = json.loads((GOLDEN / "dflash.config.json").read_text())
    values["speculators_config"]["verifier"]["name_or_path"] = None
    model = DFlashDraftModel(SpeculatorModelConfig.from_dict(values))
    model.save_pretrained(tmp_path)
    expected = json.loads((GOLDEN / "dflash_model.config.json").read_text())
    expected["speculators_config"]["verifier"]["name_or_path"] = None
    expected["transformers_version"] = transformers.__version__
    assert json.loads((tmp_path / "config.json").read_text()) == expected


@pytest.mark.parametrize("vocab", [24, VOCAB])
def test_exactly_these_tensors_are_saved(drafter, tmp_path, vocab):
    model = drafter(num_layers=2, draft_vocab_size=vocab)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    expected |= {f"layers.{i}.{name}.weight" for i in range(2) for name in LAYER}
    if vocab != VOCAB:
        expected |= {"d2t", "t2d", "lm_head.weight"}
        assert saved["d2t"].dtype == torch.int64 and saved["t2d"].dtype == torch.bool
    assert set(saved) == expected == model.expected_tensors(model.config).keys()
    assert saved["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    assert saved["layers.1.self_attn.k_proj.weight"].shape == (2 * 6, HIDDEN)


def test_biased_attention_has_a_bias_on_its_output_too(drafter, tmp_path):
    """vLLM's DFlash layers have one, Qwen3's own have not."""
    model = drafter(nested={"attention_bias": True})
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert (
        {f"layers.0.self_attn.{x}_proj.bias" for x in "qkvo"}
        <= set(saved)
        == model.expected_tensors(model.config).keys()
    )


@pytest.mark.parametrize("vocab", [24, VOCAB])
def test_a_checkpoint_comes_back_bit_for_bit(drafter, tmp_path, vocab):
    model = drafter(**MIXED, draft_vocab_size=vocab).eval()
    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is DFlashDraftModel and again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again.config.transformer_layer_config._attn_implementation = "eager"
    model.config.transformer_layer_config._attn_implementation = "eager"
    batch = packed_batch([12])
    assert torch.equal(model(**batch)[1], again(**batch)[1])


def test_embedding_and_full_head_are_the_verifiers_even_when_a_file_has_others(drafter, tmp_path):
    model = drafter(draft_vocab_size=VOCAB)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    noise = {name: torch.randn(VOCAB, HIDDEN) for name in ("embed_tokens.weight", "lm_head.weight")}
    save_file({**load_file(file), **noise}, file, metadata={"format": "pt"})
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_every_boolean_and_the_whole_decoder_are_written(drafter, tmp_path):
    drafter().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["sliding_window_non_causal"] is False and values["sample_from_anchor"] is False
    assert values["block_size"] == 4 and values["mask_token_id"] == MASK_TOKEN
    assert values["aux_hidden_state_layer_ids"] == [1, 3, 5] and "max_anchors" not in values
    assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    nested = values["transformer_layer_config"]
    needed = (
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim hidden_act max_position_embeddings rms_norm_eps attention_bias attention_dropout "
        "tie_word_embeddings layer_types sliding_window use_sliding_window rope_parameters"
    )
    assert set(needed.split()) <= set(nested) and nested["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("arguments", "is_causal"),
    [
        ({}, False),  # full: trained to see the whole block
        ({"sliding_window_non_causal": True}, None),
        (SLIDING, None),  # causal by the flag
        ({**SLIDING, "sliding_window_non_causal": True}, None),
        (MIXED, True),  # one mask for all layers is all that can be served
        ({**MIXED, "sliding_window_non_causal": True}, None),
    ],
)
def test_the_mask_that_is_trained_is_the_mask_that_is_served(drafter, arguments, is_causal, caplog, tmp_path):
    config = drafter(**arguments).config
    assert getattr(config.transformer_layer_config, "is_causal", None) is is_causal
    assert [layer_mask.causal for layer_mask in config.layer_masks] == config.served_causal
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        drafter(**arguments).save_pretrained(tmp_path)
    assert "vLLM will serve" not in caplog.text


def test_a_checkpoint_that_will_be_served_otherwise_is_warned_about(drafter, caplog, tmp_path):
    model = drafter()
    del model.config.transformer_layer_config.is_causal  # as other writers leave it
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "vLLM will serve them as [True]" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids=None"),
        ({"block_size": 1}, "block_size=1 drafts nothing"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window=None"),
    ],
)
def test_configs_no_model_can_be_built_from(values, message):
    config = DFlashSpeculatorConfig(
        transformer_layer_config=Qwen3Config(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, layer_types=values.pop("layer_types", None)
        ),
        draft_vocab_size=24,
        **{"aux_hidden_state_layer_ids": [1], **values},
    )
    with pytest.raises(ValueError, match=message):
        DFlashDraftModel(config)


def test_config_defaults_and_old_spellings():
    config = DFlashSpeculatorConfig()
    assert (config.block_size, config.draft_vocab_size, config.max_anchors) == (8, 32000, None)
    assert config.mask_token_id is None and not config.sample_from_anchor and not config.sliding_window_non_causal
    assert DFlashSpeculatorConfig(max_anchors=256).to_diff_dict()["max_anchors"] == 256
    with pytest.raises(ValidationError):
        DFlashSpeculatorConfig(block_size=0)


def test_mask_token_must_be_known_when_it_is_needed(drafter):
    model = drafter()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id is not set"):
        _ = model.mask_token_id


def test_other_decoder_families_are_refused(verifier_path):
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="--draft-arch qwen3"):
        DFlashDraftModel.from_training_args(
            LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_attention_heads=4),
            draft_vocab_size=None,
            verifier_name_or_path=str(verifier_path),
            mask_token_id=0,
            target_layer_ids=[1],
        )


def test_vocabulary_maps_choose_the_heads_rows(drafter):
    model = drafter()
    kept = draft_maps()[0]
    source = load_file(Path(model.config.speculators_config.verifier.name_or_path) / "model.safetensors")
    assert torch.equal(model.lm_head.weight, source["lm_head.weight"][kept])
    assert torch.equal(model.verifier_norm.weight, source["model.norm.weight"])


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """Documents of counting: the next token is the last one plus the document's stride."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(24):
        length = int(torch.randint(10, 20, (), generator=generator))
        start, stride = torch.randint(1, VOCAB - 1, (2,), generator=generator).tolist()
        ids = [(start + stride * step) % (VOCAB - 1) for step in range(length)]
        rows.append({"input_ids": ids, "loss_mask": [0] * 2 + [1] * (length - 2), "seq_len": length})
    path = tmp_path_factory.mktemp("data")
    Dataset.from_list(rows).save_to_disk(path)
    return path


def settings(verifier_path, data_path, save_path, **changes):
    return {
        "speculator_type": "dflash",
        "verifier_name_or_path": str(verifier_path),
        "data_path": str(data_path),
        "save_path": str(save_path),
        "total_seq_len": 64,
        "epochs": 6,
        "hidden_states_dtype": "float32",
        "lr": 0.01,
        "num_layers": 1,
        "block_size": 4,
        "mask_token_id": MASK_TOKEN,
        "target_layer_ids": [1, 3, 5],
        "train_data_ratio": 0.8,
        **changes,
    }


def test_training_from_a_config_alone_lowers_the_loss_and_saves_a_drafter(verifier_path, data_path, tmp_path):
    losses = []

    def listen(event):
        if isinstance(event, StepDone):
            losses.append(event.metrics["loss"])
            assert event.acceptance_length == event.metrics["eal"] >= 1

    result = train(
        TrainConfig.from_flat(settings(verifier_path, data_path, tmp_path, epochs=10, lr=0.02)), on_event=listen
    )
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])
    model = SpeculatorModel.from_pretrained(result.checkpoint)
    assert type(model) is DFlashDraftModel and model.config.block_size == 4
    assert set(load_file(Path(result.checkpoint) / "model.safetensors")) == model.expected_tensors(model.config).keys()


def test_defaults_of_training():
    flat = TrainConfig.from_flat({"speculator_type": "dflash", "verifier_name_or_path": "x"}).flatten()
    expected = {
        "num_layers": 5,
        "draft_arch": "qwen3",
        "loss_fn": "ce",
        "block_size": 16,
        "max_anchors": 512,
        "per_position_loss_weight": "dpace",
        "dpace_alpha": 0.5,
        "dflash_decay_gamma": 4.0,
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
    }
    assert {key: flat[key] for key in expected} == expected
    train_kwargs, val_kwargs = DFlashDraftModel.get_trainer_kwargs(**flat)
    assert train_kwargs == val_kwargs and train_kwargs is not val_kwargs
    assert (train_kwargs["gamma"], train_kwargs["max_anchors"]) == (4.0, 512)
    with pytest.raises(ValueError, match="fixed-exp-decay"):
        DFlashDraftModel.get_trainer_kwargs(**{**flat, "loss_fn": "kl_div"})


def test_mask_token_is_resolved_from_the_verifier(tmp_path, caplog):
    """Without a tokenizer and a given id: a special token of the verifier's config, with a warning, or an error."""
    from speculators.models.draft_model import resolve_mask_token_id

    path = save_verifier(tmp_path)
    assert resolve_mask_token_id(7, path, VOCAB, False) == 7
    with pytest.raises(ValueError, match=r"mask_token_id=40 .* 0..39"):
        resolve_mask_token_id(VOCAB, path, VOCAB, False)
    with pytest.raises(ValueError, match="--mask-token-id"):
        resolve_mask_token_id(None, path, VOCAB, False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 3]}))
    with caplog.at_level(logging.WARNING):
        assert resolve_mask_token_id(None, path, VOCAB, False) == 2
    assert "also has another meaning" in caplog.text
