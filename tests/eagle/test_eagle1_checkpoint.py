"""On disk in both formats; the verifier attached and detached; the contract's forward."""

import json

import pytest
import torch
from drafter_toys import HIDDEN, VOCAB, packed_row
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, Qwen3Config

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models.eagle import EagleSpeculator, EagleSpeculatorConfig

LAYER = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
ALWAYS = {f"transformer.{name}.weight" for name in [*LAYER, "post_attention_layernorm"]} | {"fusion_fc.weight"}
NORMS = {"embedding_layernorm.weight", "pre_lm_head_layernorm.weight", "transformer.input_layernorm.weight"}
CASES = {
    "eagle": ({}, ALWAYS),
    "hass": ({"fusion_bias": True}, ALWAYS | {"fusion_fc.bias"}),
    "layernorms": ({"layernorms": True}, ALWAYS | NORMS),
    "qwen3": ({"arch": "qwen3"}, ALWAYS | {f"transformer.self_attn.{n}_norm.weight" for n in "qk"}),
}


@pytest.mark.parametrize("case", CASES)
def test_files_hold_exactly_the_contracts_keys_and_load_bit_equal(make_drafter, tmp_path, case):
    arguments, expected = CASES[case]
    model = make_drafter(**arguments)
    assert SpeculatorModel.expected_tensors(model.config).keys() == expected
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == expected
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is EagleSpeculator and again.state_dict().keys() == expected
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    batch = packed_row([6, 5])
    assert torch.equal(model(**batch)[1], again(**batch)[1])


def test_config_json(make_drafter, verifier_path, tmp_path):
    make_drafter().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("speculators_version", "transformers_version"):
        assert config.pop(key)
    nested = config.pop("transformer_layer_config")
    assert (nested["model_type"], nested["num_hidden_layers"], nested["layer_types"]) == (
        "llama",
        1,
        ["full_attention"],
    )
    assert config == {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "dtype": "float32",
        "fusion_bias": False,
        "layernorms": False,
        "speculators_config": {
            "algorithm": "eagle",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": str(verifier_path)},
        },
        "speculators_model_type": "eagle",
        "tie_word_embeddings": False,
        "transformer_layer_architecture": "LlamaDecoderLayer",
    }


def test_config_defaults_and_architectures():
    config = EagleSpeculatorConfig()
    assert (config.layernorms, config.fusion_bias, config.transformer_layer_architecture) == (False, False, "auto")
    assert config.architectures == ["EagleSpeculator"] and isinstance(config.transformer_layer_config, LlamaConfig)
    named = EagleSpeculatorConfig(transformer_layer_architecture="LlamaDecoderLayer", transformer_layer_config={})
    assert named.architectures == ["EagleSpeculator", "LlamaDecoderLayer"]
    assert isinstance(named.transformer_layer_config, LlamaConfig)
    assert SpeculatorModelConfig.from_dict(named.to_dict()) == named
    assert named.to_dict()["architectures"] == ["EagleSpeculator", "LlamaDecoderLayer"]
    with pytest.raises(ValidationError):
        EagleSpeculatorConfig(transformer_layer_config=3)


def tiny(**changes):
    return LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=8, num_attention_heads=2, **changes)


def test_layer_classes_are_known_or_refused():
    config = EagleSpeculatorConfig(transformer_layer_config=tiny())
    EagleSpeculator(config)
    assert config.architectures == ["EagleSpeculator", "LlamaDecoderLayer"]
    wrong = EagleSpeculatorConfig(transformer_layer_config=tiny(), transformer_layer_architecture="Qwen3DecoderLayer")
    with pytest.raises(ValueError, match="'Qwen3DecoderLayer'"):
        EagleSpeculator(wrong)
    with pytest.raises(ValueError, match="NopeLayer"):
        EagleSpeculator(EagleSpeculatorConfig(transformer_layer_architecture="NopeLayer"))
    from transformers import CLIPVisionConfig

    with pytest.raises(TypeError, match="CLIPVisionConfig"):
        EagleSpeculator(EagleSpeculatorConfig(transformer_layer_config=CLIPVisionConfig()))
    with pytest.raises(ValueError, match="BertDecoderLayer"):
        EagleSpeculator(EagleSpeculatorConfig(transformer_layer_config=BertConfig()))
    with pytest.raises(ValueError, match="EagleSpeculatorConfig"):
        EagleSpeculator(LlamaConfig())


def test_attach_and_detach(make_drafter, verifier, verifier_path):
    model = EagleSpeculator(make_drafter().config, verifier_attachment_mode="detached")
    features = torch.zeros(1, 2, HIDDEN)
    assert model.verifier_attachment_mode == "detached"
    assert model.verifier is model.embed_tokens is model.rotary_emb is model.lm_head is None
    with pytest.raises(ValueError, match=r"Verifier model layers not initialized\. Call `attach_verifier`"):
        model(torch.tensor([[1, 2]]), features)
    with pytest.raises(RuntimeError):
        model.detach_verifier()
    assert model.attach_verifier(verifier) is verifier
    assert model.verifier is verifier and model.verifier_attachment_mode == "full"
    assert model.embed_tokens is verifier.model.embed_tokens and model.lm_head is verifier.lm_head
    assert model.rotary_emb is verifier.model.rotary_emb
    with pytest.raises(RuntimeError, match="detach_verifier"):
        model.attach_verifier(verifier)
    model.detach_verifier()
    assert model.verifier is model.lm_head is None
    model.attach_verifier(str(verifier_path), mode="train_only")
    assert model.verifier is None and model.lm_head is not None and model.verifier_attachment_mode == "train_only"
    with pytest.raises(ValueError, match="'train_only'"):
        model.generate(torch.tensor([[1]]))
    model.detach_verifier()
    with pytest.raises(ValueError, match="'half'"):
        model.attach_verifier(verifier, mode="half")
    for nothing in (None, ""):
        with pytest.raises(ValueError, match="give a model"):
            model.attach_verifier(nothing)
    with pytest.raises(TypeError, match="int"):
        model.attach_verifier(7)
    with pytest.raises(ValueError, match="'detached'"):
        model.generate(torch.tensor([[1]]))


def test_the_constructor_attaches_what_the_config_names(make_drafter, verifier):
    config = make_drafter().config
    assert EagleSpeculator(config).verifier_attachment_mode == "full"
    assert EagleSpeculator(config, verifier_attachment_mode="train_only").verifier is None
    assert EagleSpeculator(config, verifier=verifier).verifier is verifier


def test_loading_takes_what_training_needs_and_gives_way_to_a_verifier(make_drafter, verifier, verifier_path, tmp_path):
    make_drafter().save_pretrained(tmp_path)
    model = SpeculatorModel.from_pretrained(tmp_path)
    assert model.verifier is None and torch.equal(model.lm_head.weight, verifier.lm_head.weight)
    assert not model.lm_head.weight.requires_grad
    model.attach_verifier(verifier)
    assert model.verifier is verifier
    assert SpeculatorModel.from_pretrained(tmp_path, verifier_attachment_mode="detached").lm_head is None
    assert EagleSpeculator.from_pretrained(tmp_path, verifier=verifier).verifier is verifier
    full = EagleSpeculator.from_pretrained(tmp_path, verifier=str(verifier_path), verifier_attachment_mode="full")
    assert full.verifier is not None
    assert not any(name.startswith(("verifier", "embed_tokens", "lm_head")) for name in full.state_dict())
    assert not any(name.startswith("verifier") for name, _ in full.named_parameters())


def test_forward_over_sequences(make_drafter, verifier):
    model = make_drafter(layernorms=True)
    model.attach_verifier(verifier)
    ids, features = torch.randint(0, VOCAB, (2, 6)), torch.randn(2, 6, HIDDEN)
    whole = model(ids, features)
    assert whole.logits.shape == (2, 6, VOCAB) and whole.past_key_values is None
    assert torch.equal(model(ids, features, return_dict=False), whole.logits)
    first = model(ids[:, :4], features[:, :4], use_cache=True)
    rest = model(ids[:, 4:], features[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), whole.logits, atol=1e-5, rtol=1e-5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = model(ids, features, attention_mask=mask).logits
    alone = model(ids[:1, 2:], features[:1, 2:]).logits
    torch.testing.assert_close(padded[0, 2:], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1], whole.logits[1])
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, features, output_attentions=True)


def test_the_native_directory_is_what_vllm_loads(make_drafter, verifier_path, tmp_path):
    """Names and shapes of vLLM's EagleLlamaForCausalLM (llama_eagle.py): no norm on the layer's input, no fc bias."""
    model = make_drafter()
    model.save_native(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == {f"layers.0.{name}.weight" for name in [*LAYER, "post_attention_layernorm"]} | {
        "fc.weight"
    }
    assert tensors["fc.weight"].shape == (HIDDEN, 2 * HIDDEN) and tensors["fc.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["num_hidden_layers"], config["bias"]) == (["LlamaForCausalLM"], 1, False)
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    assert not {"layer_types", "sliding_window", "speculators_config"} & config.keys()
    assert LlamaConfig(**config).rope_parameters["rope_theta"] == 10000.0


def test_native_and_back_is_bit_equal(make_drafter, verifier_path, tmp_path):
    model = make_drafter()
    model.save_native(tmp_path)
    again = EagleSpeculator.from_native(tmp_path, verifier=str(verifier_path))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    batch = packed_row([6, 5])
    assert torch.equal(model(**batch)[1], again(**batch)[1])


def test_native_tensors_decide_bias_and_norms(make_drafter, tmp_path):
    """A file as EAGLE-1 published them: embedding inside, a bias on fc; and one with the extra norms."""
    model = make_drafter(layernorms=True, fusion_bias=True)
    names = {
        "fusion_fc.weight": "fc.weight",
        "fusion_fc.bias": "fc.bias",
        "embedding_layernorm.weight": "embed_layernorm.weight",
        "pre_lm_head_layernorm.weight": "lm_head_layernorm.weight",
        "transformer.input_layernorm.weight": "hidden_layernorm.weight",
    }
    native = {names.get(k, k.replace("transformer.", "layers.0.")): v for k, v in model.state_dict().items()}
    save_file({**native, "embed_tokens.weight": torch.zeros(VOCAB, HIDDEN)}, tmp_path / "model.safetensors")
    nested = model.config.transformer_layer_config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**nested, "architectures": ["LlamaForCausalLM"]}))
    again = EagleSpeculator.from_native(tmp_path)
    assert again.config.layernorms and again.config.fusion_bias
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fusion_bias": True}, "fusion_bias=True.*no bias"),
        ({"layernorms": True}, "layernorms=True"),
        ({"arch": "qwen3"}, "'qwen3'"),
    ],
)
def test_what_vllm_would_serve_wrongly_is_not_exported(make_drafter, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        make_drafter(**arguments).save_native(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_arguments_that_cannot_be(make_drafter):
    with pytest.raises(ValueError, match="num_layers=2"):
        make_drafter(nested={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match="draft_vocab_size=9"):
        make_drafter(draft_vocab_size=9)
    nested = make_drafter(nested={"layer_types": ["sliding_attention"], "sliding_window": 4}).config
    assert nested.transformer_layer_config.layer_types == ["full_attention"]
    assert isinstance(make_drafter(arch="qwen3").config.transformer_layer_config, Qwen3Config)
