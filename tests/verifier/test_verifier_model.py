"""Loading verifiers, reading their residual stream, rebuilding their logits."""

from __future__ import annotations

import json

import pytest
import torch
import toys
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GraniteConfig,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from speculators.decoding import Engine, SamplingParams
from speculators.interfaces import CaptureSpec
from speculators.verifier import (
    capture_states,
    check_reproduces_logits,
    load_verifier,
    logits_from_last_hidden,
    verifier_parts,
)


def more_models() -> dict[str, torch.nn.Module]:
    """Logit scales, LayerNorms, another layout, a multimodal wrapper."""
    torch.manual_seed(0)
    gemma3 = Gemma3TextConfig(**{**toys.SHAPE, "num_hidden_layers": 3, "head_dim": 8})
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    return {
        "cohere": AutoModelForCausalLM.from_config(CohereConfig(**toys.SHAPE, num_hidden_layers=2)),
        "granite": AutoModelForCausalLM.from_config(
            GraniteConfig(**toys.SHAPE, num_hidden_layers=2, logits_scaling=3.0)
        ),
        "gemma4": AutoModelForCausalLM.from_config(  # a second norm beside the final one
            Gemma4TextConfig(
                **toys.SHAPE,
                num_hidden_layers=2,
                head_dim=8,
                global_head_dim=8,
                num_kv_shared_layers=0,
                hidden_size_per_layer_input=4,
                vocab_size_per_layer_input=97,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        "gpt2": AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97)),
        "gemma3_multimodal": Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=gemma3, vision_config=vision, mm_tokens_per_image=4)
        ),
    }


ALL = [*toys.CONFIGS, "cohere", "granite", "gemma4", "gpt2", "gemma3_multimodal"]


@pytest.fixture(scope="module", params=ALL)
def model(request):
    if request.param in toys.CONFIGS:
        return toys.tiny_model(request.param)
    return more_models()[request.param].eval().requires_grad_(False)


def test_captured_streams_are_the_residual_stream(model):
    num_layers = len(verifier_parts(model).layers)
    token_ids = torch.tensor([[5, 6, 7, 8, 9]])
    spec = CaptureSpec(aux_layer_ids=tuple(range(num_layers + 1)), last_hidden=True)
    with torch.no_grad(), capture_states(model, spec) as states:
        output = model(input_ids=token_ids, output_hidden_states=True, use_cache=False)
        expected = torch.cat(output.hidden_states[:-1], -1)
        width = expected.shape[-1]
        torch.testing.assert_close(states.aux[..., :width], expected)
        # the last one is before the final norm, where transformers gives it after
        torch.testing.assert_close(states.aux[..., width:], states.last_hidden)
        after_norm = verifier_parts(model).final_norm(states.last_hidden)
    torch.testing.assert_close(after_norm, output.hidden_states[-1])


def test_logits_are_rebuilt_from_the_last_stream(model):
    with torch.no_grad(), capture_states(model, CaptureSpec(last_hidden=True)) as states:
        logits = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
        rebuilt = logits_from_last_hidden(model, states.last_hidden)
    torch.testing.assert_close(rebuilt, logits)
    check_reproduces_logits(model)


def test_hooks_are_gone_afterwards(model):
    with capture_states(model, CaptureSpec((1,), last_hidden=True)):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_transformed_logit_is_noticed():
    model = toys.tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output)  # harmless
    check_reproduces_logits(model)
    original = model.forward

    def twice(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = twice
    with pytest.raises(ValueError, match="do not reproduce its logits"):
        check_reproduces_logits(model)


def test_aux_ids_outside_the_model_are_named():
    with (
        pytest.raises(ValueError, match=r"aux_layer_ids=\[1, 9\] but the verifier has 4 layers"),
        capture_states(toys.tiny_model("llama"), CaptureSpec((1, 9))),
    ):
        pass


def test_multimodal_gemma4_and_gpt2_models_decode():
    for name in ("gemma3_multimodal", "gemma4", "gpt2"):
        model = more_models()[name].eval()
        prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
        outputs = Engine(model).generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        assert [output.token_ids for output in outputs] == [toys.generated(model, prompt, 8) for prompt in prompts]


# -- loading


def test_a_saved_model_loads_in_the_asked_dtype(tmp_path):
    model = toys.tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load_verifier(tmp_path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    assert load_verifier(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_soft_capped_attention_is_loaded_with_the_path_that_caps(tmp_path):
    toys.tiny_model("gemma2").save_pretrained(tmp_path)
    assert load_verifier(tmp_path).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:99", "device='cuda:99' but torch sees"), ("gpu", "device='gpu' is unknown to torch")]
)
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(device, message):
    with pytest.raises(ValueError, match=message):
        load_verifier("/no/such/place", device=device)


def test_pickled_weights_are_refused(tmp_path):
    toys.tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_verifier(tmp_path)


@pytest.mark.parametrize("path", ["/no/such/place", "./missing"])
def test_a_missing_directory_is_named(path):
    with pytest.raises(ValueError, match=f"no verifier at '{path}'"):
        load_verifier(path)


def test_an_encoder_decoder_is_refused(tmp_path):
    T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder-decoder"):
        load_verifier(tmp_path)


def test_a_config_of_no_known_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ValueError, match="unheard_of"):
        load_verifier(tmp_path)


def test_a_verifiers_own_code_runs_only_when_it_is_trusted(tmp_path):
    (tmp_path / "code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'was-run')!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'of_its_own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    toys.tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "of_its_own", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_verifier(tmp_path)
    assert not (tmp_path / "was-run").exists()
    load_verifier(tmp_path, trust_remote_code=True)
    assert (tmp_path / "was-run").exists()
