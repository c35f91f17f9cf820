"""Every causal LM that transformers builds tiny is decoded right or refused by name, whatever its attention reads."""

from __future__ import annotations

import architectures
import pytest
import torch
import toys
from transformers import AutoModelForCausalLM, FalconConfig, GPTNeoConfig, MptConfig, PreTrainedModel

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.trees.token_tree import paths_of
from speculators.decoding.verifiers import attention_proof
from speculators.decoding.verifiers.attention_proof import SplitVerifier
from speculators.decoding.verifiers.hf_verifier import HFVerifier
from speculators.decoding.verifiers.recurrent_verifier import make_verifier
from speculators.decoding.verifiers.trial import random_model, small_config

TOGETHER, PATHS, ROWS = (
    "rows together, trees at once",
    "rows together, trees path by path",
    "one row at a time, trees path by path",
)
EXPECTED = {
    "bloom": ROWS,
    "falcon-alibi": ROWS,
    "gemma3_text": TOGETHER,
    "gpt2": TOGETHER,
    "gpt_neo": ROWS,
    "llama": TOGETHER,
    "llama4_text": ROWS,
    "mpt": PATHS,
    "nemotron_h": "recurrent, chains",
    "olmo": TOGETHER,
    "olmo_hybrid": "recurrent, chains",
    "opt": TOGETHER,
    "whisper": ROWS,
}


@pytest.mark.parametrize("model_type", architectures.model_types())
def test_it_is_decoded_right_or_refused_by_name(model_type):
    if model_type in architectures.SKIPPED:
        pytest.skip(f"{model_type}: {architectures.SKIPPED[model_type]}")
    outcome = architectures.outcome_of(model_type)
    if outcome.kind == "not built" and model_type not in EXPECTED:
        pytest.skip(f"{model_type}: {outcome.how}")
    assert outcome.kind in ("right", "refused"), outcome.how
    assert outcome.how == EXPECTED.get(model_type, outcome.how)


def test_at_least_a_hundred_and_fifty_are_tried():
    """The tiny configs are made by one rule: one that no longer fits would skip most types without a word."""
    built = 0
    for model_type in set(architectures.model_types()) - set(architectures.SKIPPED):
        try:
            architectures.tiny(model_type)
            built += 1
        except architectures.NotBuilt:
            pass
    assert built >= 150


def gpt_neo(window: int = 16) -> PreTrainedModel:
    config = GPTNeoConfig(
        vocab_size=toys.VOCAB,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        window_size=window,
        attention_types=[[["global", "local"], 2]],
    )
    return random_model(lambda: AutoModelForCausalLM.from_config(config))


def mpt() -> PreTrainedModel:
    config = MptConfig(vocab_size=toys.VOCAB, d_model=32, n_heads=4, n_layers=3, max_seq_len=512)
    return random_model(lambda: AutoModelForCausalLM.from_config(config))


def falcon() -> PreTrainedModel:
    return random_model(
        lambda: AutoModelForCausalLM.from_config(
            FalconConfig(vocab_size=toys.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
        )
    )


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            gpt_neo,
            "GPTNeoForCausalLM is decoded one row at a time, draft trees path by path: a batch of different lengths",
        ),
        (mpt, "MptForCausalLM is decoded with draft trees scored path by path: a draft tree in one forward changes"),
        (falcon, "FalconForCausalLM is decoded one row at a time.*: its forward on this cache raises ValueError"),
    ],
)
def test_another_way_of_decoding_is_said(build, said):
    with pytest.warns(UserWarning, match=said):
        Engine(build())


def test_a_window_longer_than_the_trial_is_found_on_the_small_copy():
    """256 tokens, GPT-Neo's own: the model itself is tried with few tokens only."""
    attention_proof.found_on_copy.cache_clear()
    model = gpt_neo(window=256)
    assert attention_proof.first_right(model, attention_proof.ATTENTION_WAYS, 24, attention_proof.Found(0)).way == 0
    with pytest.warns(UserWarning, match="one row at a time"):
        verifier = make_verifier(model, 2)
    assert isinstance(verifier, SplitVerifier)


def test_long_and_short_rows_of_gpt_neo_say_what_the_model_says():
    model, prompts = gpt_neo(window=256), [toys.prompts(1, seed=n, shortest=n, longest=n)[0] for n in (300, 100)]
    with pytest.warns(UserWarning, match="one row at a time"):
        engine = Engine(model, max_batch_size=2)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=8))
    for prompt, output in zip(prompts, outputs, strict=True):
        text = list(prompt)
        for token_id in output.token_ids:
            with torch.inference_mode():
                assert token_id == model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax().item()
            text.append(token_id)


def test_states_of_a_split_tree_are_those_of_each_path():
    """The states that a drafter reads, one row at a time and path by path, are those of the tree in one forward."""
    model, parents = toys.tiny_model("llama"), [-1, -1, 1, 0]
    tokens, prompts = torch.tensor(toys.prompts(2, shortest=5, longest=5)), toys.prompts(2, seed=1, longest=12)
    spec = attention_proof.CaptureSpec(aux_layer_ids=(1, 2))
    outputs = []
    for verifier in (
        HFVerifier(model, 2, spec),
        SplitVerifier(HFVerifier(model, 2, spec), by_row=False),
        SplitVerifier(HFVerifier(model, 2, spec, lean=False, masks="own"), by_row=True),
    ):
        with verifier:
            for row, prompt in enumerate(prompts):
                num_valid_1 = torch.tensor([len(prompt)])
                verifier.score(torch.tensor([prompt]), num_valid_1, first_row=row, last_only=True)
                verifier.keep(torch.arange(len(prompt))[None], num_valid_1)
            tree = verifier.score(tokens, torch.tensor([5, 5]), torch.tensor(parents))
            verifier.keep(torch.tensor([[0, 2, 3], [0, 1, 0]]), torch.tensor([3, 2]))
            after = verifier.score(torch.tensor([[7], [8]]), torch.tensor([1, 1]))
        outputs.append((tree, after))
    for tree, after in outputs[1:]:
        for ours, whole in ((tree, outputs[0][0]), (after, outputs[0][1])):
            torch.testing.assert_close(ours.logits_BTV, whole.logits_BTV, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.states_BTD, whole.states_BTD, atol=1e-4, rtol=1e-4)


def test_paths_of_a_tree():
    #        0
    #      1   2         columns; node k is column k + 1
    #      4   3
    assert paths_of([-1, -1, 1, 0]) == [[0, 2, 3], [0, 1, 4]]
    assert paths_of([]) == [[0]]


def test_the_random_state_is_left_as_it_was():
    attention_proof.found_on_copy.cache_clear()
    model = toys.tiny_model("llama")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Engine(model)
    assert torch.equal(torch.rand(3), expected)


def test_a_small_copy_keeps_every_kind_of_layer():
    config = toys.CONFIGS["gemma3"].__class__(
        num_hidden_layers=13, layer_types=["sliding_attention"] * 6 + ["full_attention"] + ["sliding_attention"] * 6
    )
    small = small_config(config)
    assert small.num_hidden_layers == 7
    assert small.layer_types == ["sliding_attention"] * 6 + ["full_attention"]
    assert small.sliding_window == 8
