"""The verifier's cache and masks against plain forwards without a cache."""

from __future__ import annotations

import pytest
import torch
import toys

from speculators.decoding.verifiers.hf_verifier import HFVerifier
from speculators.interfaces import CaptureSpec
from speculators.verifier import verifier_parts

TOLERANCE = 1e-5
"""fp32, relative to the largest entry: sums over a few hundred terms in another order."""


@pytest.fixture(scope="module", params=list(toys.CONFIGS))
def model(request):
    return toys.tiny_model(request.param)


def plain_logits(model, token_ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


def assert_same(ours, expected):
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)


def prefill(verifier, prompts):
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.tensor([prompt + [0] * (int(lengths.max()) - len(prompt)) for prompt in prompts])
    output = verifier.score(padded, lengths, last_only=True)
    verifier.keep(torch.arange(padded.shape[1]).expand(padded.shape), lengths)
    return output


def test_logits_of_ragged_rows_equal_those_without_a_cache(model):
    prompts = toys.prompts(4, longest=30)
    with HFVerifier(model, 4) as verifier:
        first = prefill(verifier, prompts).logits_BTV[:, 0]
        drafts = torch.tensor(toys.prompts(4, seed=1, shortest=5, longest=5))
        scored = verifier.score(drafts, torch.full((4,), 5)).logits_BTV
    for row, prompt in enumerate(prompts):
        expected = plain_logits(model, prompt + drafts[row].tolist())
        assert_same(first[row], expected[len(prompt) - 1])
        assert_same(scored[row], expected[len(prompt) :])


@pytest.mark.parametrize("num_rows", [1, 3])
def test_logits_at_every_tree_node_equal_a_forward_over_its_path(model, num_rows):
    parents = [-1, -1, 0, 0, 2, 1, 5, 6]
    prompts = toys.prompts(num_rows, longest=30)
    tokens = torch.tensor(toys.prompts(num_rows, seed=2, shortest=9, longest=9))
    with HFVerifier(model, num_rows) as verifier:
        prefill(verifier, prompts)
        logits = verifier.score(tokens, torch.full((num_rows,), 9), torch.tensor(parents)).logits_BTV
    for row in range(num_rows):
        for node in range(9):
            path, at = [], node
            while at > 0:
                path, at = [at, *path], parents[at - 1] + 1
            text = prompts[row] + tokens[row, [0, *path]].tolist()
            assert_same(logits[row, node], plain_logits(model, text)[-1])


@pytest.mark.parametrize("parents", [None, [-1, -1, 1, 1, 3]])
def test_the_cache_after_acceptance_equals_a_fresh_prefill(model, parents):
    prompts = toys.prompts(3, longest=25)
    tokens = torch.tensor(toys.prompts(3, seed=3, shortest=6, longest=6))
    columns = torch.tensor([[0, 2, 4], [0, 2, 0], [0, 0, 0]]) if parents else torch.arange(3).expand(3, 3)
    num_kept = torch.tensor([3, 2, 1])
    num_layers = len(verifier_parts(model).layers)
    with HFVerifier(model, 3) as verifier, HFVerifier(model, 3) as fresh:
        prefill(verifier, prompts)
        verifier.score(tokens, torch.full((3,), 6), torch.tensor(parents) if parents else None)
        verifier.keep(columns, num_kept)
        texts = [p + tokens[i, columns[i, : num_kept[i]]].tolist() for i, p in enumerate(prompts)]
        prefill(fresh, texts)
        for row in range(3):
            for layer in range(num_layers):
                for ours, expected in zip(
                    verifier.cached_states(layer, row), fresh.cached_states(layer, row), strict=True
                ):
                    assert_same(ours, expected)


def test_captured_states_equal_hidden_states_of_a_plain_forward(model):
    num_layers = len(verifier_parts(model).layers)
    spec = CaptureSpec(aux_layer_ids=(0, 1, num_layers - 1))
    prompts = toys.prompts(2, shortest=8, longest=20)
    with HFVerifier(model, 2, spec) as verifier:
        states = prefill(verifier, prompts).states_BTD
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
        expected = torch.cat([hidden[i][0] for i in spec.aux_layer_ids], dim=-1)
        assert_same(states[row, : len(prompt)], expected)


def test_sharing_a_prefix_equals_computing_it(model):
    text = toys.prompts(1, shortest=20, longest=20)[0]
    with HFVerifier(model, 2) as verifier:
        prefill(verifier, [text])
        verifier.share_prefix(0, 1, 15)
        rest = torch.tensor([text[15:]])
        logits = verifier.score(rest, torch.tensor([5]), first_row=1).logits_BTV[0]
    assert_same(logits, plain_logits(model, text)[15:])


def test_the_model_is_left_as_it_was(model):
    config = verifier_parts(model).config
    before = config._attn_implementation
    expected = plain_logits(model, [5, 6, 7])
    with HFVerifier(model, 1, CaptureSpec(last_hidden=True)) as verifier:
        prefill(verifier, [[5, 6, 7]])
    assert config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(plain_logits(model, [5, 6, 7]), expected, rtol=0, atol=0)


def test_recurrent_models_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match="cannot be rolled back"):
        HFVerifier(model, 1)
