"""The lean forward against transformers' own, architecture by architecture; and which models it refuses, and why."""

from __future__ import annotations

import pytest
import torch
import toys
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from speculators.decoding import Engine, HFVerifier, SamplingParams
from speculators.interfaces import CaptureSpec
from speculators.verifier import verifier_parts

TOLERANCE = 1e-5
"""fp32, of the largest entry."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}
SHAPED_LIKE_LLAMA = {
    "biases": LlamaConfig(**toys.SHAPE, num_hidden_layers=2, attention_bias=True, mlp_bias=True),
    "wide_heads": LlamaConfig(**toys.SHAPE, num_hidden_layers=2, head_dim=24, hidden_act="gelu"),
    "one_key_head": LlamaConfig(**{**toys.SHAPE, "num_key_value_heads": 1}, num_hidden_layers=2),
    "a_key_head_each": LlamaConfig(**{**toys.SHAPE, "num_key_value_heads": 4}, num_hidden_layers=2),
    "llama3_rope": LlamaConfig(**toys.SHAPE, num_hidden_layers=2, rope_parameters=LLAMA3),
    "yarn_rope": LlamaConfig(**toys.SHAPE, num_hidden_layers=2, rope_parameters=YARN),
    "qwen2_some_layers_slide": Qwen2Config(
        **toys.SHAPE, num_hidden_layers=4, use_sliding_window=True, sliding_window=toys.WINDOW, max_window_layers=2
    ),
    "qwen3_biases_tied": Qwen3Config(
        **toys.SHAPE, num_hidden_layers=2, head_dim=16, attention_bias=True, tie_word_embeddings=True
    ),
    "phi3_partial_rotary": Phi3Config(**toys.SHAPE, num_hidden_layers=2, partial_rotary_factor=0.5),
}
REFUSED = {
    "granite": (GraniteConfig(**toys.SHAPE, num_hidden_layers=2, residual_multiplier=0.5), "differ"),
    "cohere": (CohereConfig(**toys.SHAPE, num_hidden_layers=2), "no post_attention_layernorm"),
    "olmo2": (Olmo2Config(**toys.SHAPE, num_hidden_layers=2), "no input_layernorm"),
    "mixtral": (MixtralConfig(**toys.SHAPE, num_hidden_layers=2, num_local_experts=2), "no Linear|other parts"),
    "layers_without_rope": (SmolLM3Config(**toys.SHAPE, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]), "differ"),
    "dynamic_rope": (
        LlamaConfig(
            **toys.SHAPE,
            num_hidden_layers=2,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
        "depends on the length",
    ),
}


def random_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # ones would hide a norm that is left out
            else:
                parameter.normal_(0.0, 0.3)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model.eval().requires_grad_(False)


def plain(model, token_ids):
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([token_ids]), use_cache=False, output_hidden_states=True)
    return output.logits[0], output.hidden_states


def assert_same(ours, expected):
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)


def fed(verifier, prompts):
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.tensor([prompt + [0] * (int(lengths.max()) - len(prompt)) for prompt in prompts])
    output = verifier.score(padded, lengths, last_only=True)
    verifier.keep(torch.arange(padded.shape[1]).expand(padded.shape), lengths)
    return output


@pytest.mark.parametrize("name", SHAPED_LIKE_LLAMA)
def test_logits_and_states_are_those_of_transformers(name):
    model = random_model(SHAPED_LIKE_LLAMA[name])
    verifier = HFVerifier(model, 3, CaptureSpec(aux_layer_ids=(0, 1)))
    assert verifier.is_lean, verifier.forward_reason
    prompts = toys.prompts(3, longest=40)  # rows of different lengths, one past the windows
    drafts, parents = toys.prompts(3, seed=1, shortest=5, longest=5), [-1, 0, -1, 2]
    with verifier:
        last = fed(verifier, prompts)
        chain = verifier.score(torch.tensor(drafts), torch.full((3,), 5)).logits_BTV
        tree = verifier.score(torch.tensor(drafts), torch.full((3,), 5), torch.tensor(parents)).logits_BTV
    for row, prompt in enumerate(prompts):
        expected, hidden = plain(model, prompt + drafts[row])
        assert_same(last.logits_BTV[row, 0], expected[len(prompt) - 1])
        assert_same(chain[row], expected[len(prompt) :])
        assert_same(tree[row, :3], expected[len(prompt) : len(prompt) + 3])  # the first branch is the chain's start
        other_branch = prompt + [drafts[row][column] for column in (0, 3, 4)]
        assert_same(tree[row, 3:], plain(model, other_branch)[0][-2:])
        states = torch.cat([hidden[i][0, : len(prompt)] for i in (0, 1)], dim=-1)
        assert_same(last.states_BTD[row, : len(prompt)], states)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "phi3"])
def test_both_forwards_of_a_model_agree(name):
    model, prompts = toys.tiny_model(name), toys.prompts(3, longest=40)
    drafts = torch.tensor(toys.prompts(3, seed=1, shortest=5, longest=5))
    logits = []
    for lean in (True, False):
        with HFVerifier(model, 3, lean=lean) as verifier:
            assert verifier.is_lean == lean
            fed(verifier, prompts)
            logits.append(verifier.score(drafts, torch.full((3,), 5)).logits_BTV)
    assert_same(logits[0], logits[1])


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_left_to_transformers_and_it_is_said_why(name):
    config, reason = REFUSED[name]
    model = random_model(config)
    verifier = HFVerifier(model, 1)
    assert not verifier.is_lean
    assert any(part in verifier.forward_reason for part in reason.split("|")), verifier.forward_reason
    prompt = toys.prompts(1)[0]
    output = Engine(model).generate([prompt], SamplingParams(max_tokens=8))[0]
    assert output.token_ids == toys.generated(model, prompt, 8)


def test_a_model_with_hooks_is_left_to_transformers():
    model = toys.tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 0.5)
    assert "hooks" in HFVerifier(model, 1).forward_reason


def test_hooks_that_transformers_leaves_behind_do_not_count():
    model = toys.tiny_model("llama")
    model(torch.tensor([[5, 6]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert HFVerifier(model, 1).is_lean


class Halved(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 0.5


def halve_by_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 0.5)


def halve_by_module(model):
    model.model.layers[1].mlp.down_proj = Halved(model.model.layers[1].mlp.down_proj)


def halve_by_forward(model):
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) * 0.5


@pytest.mark.parametrize("change", [halve_by_hook, halve_by_module, halve_by_forward])
def test_what_is_put_into_the_model_later_is_noticed(change):
    model, prompts = toys.tiny_model("llama"), toys.prompts(3)
    engine = Engine(model, max_batch_size=2)
    params = SamplingParams(max_tokens=10)
    before = [output.token_ids for output in engine.generate(prompts, params)]
    assert engine.verifier.is_lean
    change(model)
    after = [output.token_ids for output in engine.generate(prompts, params)]
    assert not engine.verifier.is_lean and "Llama-shaped" not in engine.verifier.forward_reason
    assert after == [toys.generated(model, prompt, 10) for prompt in prompts]
    assert after != before


def test_a_change_amid_a_stream_goes_on_with_what_is_cached():
    model, prompts = toys.tiny_model("qwen3"), toys.prompts(2)
    expected = [toys.generated(model, prompt, 12) for prompt in prompts]
    engine, tokens = Engine(model, max_batch_size=2), [[], []]
    num_hooked = []
    for event in engine.stream(prompts, SamplingParams(max_tokens=12)):
        tokens[event.request_index] += event.token_ids
        if len(tokens[0]) == 4:
            model.model.norm.register_forward_hook(lambda module, args, output: num_hooked.append(1))
    assert not engine.verifier.is_lean and num_hooked
    assert tokens == expected


def test_a_forward_that_does_something_else_at_the_end_is_found_out():
    model = toys.tiny_model("llama")
    own = model.forward

    class Louder(type(model)):
        def forward(self, *args, **kwargs):
            output = own(*args, **kwargs)
            output.logits = output.logits * 1.001
            return output

    model.__class__ = Louder
    assert "its logits differ" in HFVerifier(model, 1).forward_reason


@pytest.mark.parametrize("change", ["in_place", "assigned"])
def test_later_changes_of_the_weights_are_followed(change):
    model, text = toys.tiny_model("qwen3"), toys.prompts(1, shortest=9, longest=9)[0]
    verifier = HFVerifier(model, 1)
    with verifier:
        fed(verifier, [text])
    changed = {name: tensor.clone() * 1.25 for name, tensor in model.state_dict().items()}
    model.load_state_dict(changed, assign=change == "assigned")
    verifier.truncate(0, 0)
    with verifier:
        assert_same(fed(verifier, [text]).logits_BTV[0, 0], plain(model, text)[0][-1])


def test_weights_are_held_once_and_can_be_saved_and_trained(tmp_path):
    model = toys.tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verifiers = [HFVerifier(model, 1), HFVerifier(model, 2)]
    assert all(verifier.is_lean for verifier in verifiers)
    attention = verifier_parts(model).layers[0].self_attn
    starts = [module.weight.untyped_storage().data_ptr() for module in (attention.q_proj, attention.k_proj)]
    assert starts[0] == starts[1]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name])
    model.requires_grad_(True)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert attention.q_proj.weight.grad is not None


def test_half_precision_stays_within_its_rounding():
    model = random_model(SHAPED_LIKE_LLAMA["biases"], torch.bfloat16)
    text = toys.prompts(1, shortest=30, longest=30)[0]
    with HFVerifier(model, 1) as verifier:
        assert verifier.is_lean
        ours = fed(verifier, [text]).logits_BTV[0, 0].float()
    exact = plain(random_model(SHAPED_LIKE_LLAMA["biases"]).to(torch.bfloat16).float(), text)[0][-1]
    theirs = plain(model, text)[0][-1].float()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
