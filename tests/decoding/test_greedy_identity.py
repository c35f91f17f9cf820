"""Whatever is drafted, greedy output is transformers' own greedy output, token for token (fp32)."""

from __future__ import annotations

import pytest
import toys

from speculators.decoding import Engine, SamplingParams

NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS)
PARENTS, RIGHT_PATH = [-1, -1, -1, 1, 1, 4, 0], [1, 4, 5]  # the right branch is not the first one


@pytest.fixture(scope="module", params=list(toys.CONFIGS))
def case(request):
    model = toys.tiny_model(request.param)
    prompts = toys.prompts(8)
    return model, prompts, [toys.generated(model, prompt, NUM_TOKENS) for prompt in prompts]


def decode(model, prompts, proposer=None, num_tokens=4, batch=8, **options):
    engine = Engine(
        model,
        proposer,
        num_speculative_tokens=num_tokens if proposer is not None else None,
        max_batch_size=batch,
        **options,
    )
    outputs = engine.generate(prompts, GREEDY)
    return [output.token_ids for output in outputs], engine.stats


@pytest.mark.parametrize("batch", [1, 8])
def test_plain_decoding_is_transformers_generate(case, batch):
    model, prompts, reference = case
    prompts, reference = prompts[: batch * 2], reference[: batch * 2]
    assert decode(model, prompts, batch=batch)[0] == reference


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("num_right", [0, 2, None])
def test_drafts_that_are_wrong_half_right_and_right(case, batch, num_right):
    model, prompts, reference = case
    prompts, reference = (prompts, reference) if batch == 8 else (prompts[:2], reference[:2])
    texts = [prompt + output for prompt, output in zip(prompts, reference, strict=True)]
    proposer = toys.ScriptedProposer(toys.oracle(texts, num_right))
    tokens, stats = decode(model, prompts, proposer, batch=batch)
    assert tokens == reference
    if num_right is not None:
        assert max(i for i, count in enumerate(stats.accepted_histogram) if count) == num_right
    else:
        # the first token comes from the prompt, then 5 a round: 23 = 4 * 5 + 3
        assert stats.num_rounds == 5 * len(prompts)


def test_random_ragged_drafts(case):
    model, prompts, reference = case
    assert decode(model, prompts, toys.ScriptedProposer(toys.at_random(0)))[0] == reference


@pytest.mark.parametrize("batch", [1, 8])
def test_trees(case, batch):
    model, prompts, reference = case
    prompts, reference = (prompts, reference) if batch == 8 else (prompts[:2], reference[:2])
    texts = [prompt + output for prompt, output in zip(prompts, reference, strict=True)]
    tokens, stats = decode(model, prompts, toys.TreeProposer(texts, PARENTS, RIGHT_PATH), num_tokens=7, batch=batch)
    assert tokens == reference
    assert stats.acceptance_length > 3.0  # 1 + 3, less where the text ends


def test_ngram(case):
    model, prompts, _reference = case
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    engine = Engine(model, config, max_batch_size=3)
    repetitive = [prompt * 2 for prompt in prompts]
    outputs = engine.generate(repetitive, GREEDY)
    assert [output.token_ids for output in outputs] == [toys.generated(model, p, NUM_TOKENS) for p in repetitive]
    assert engine.stats.num_drafted > 0


def test_early_exit(case):
    model, prompts, reference = case
    engine = Engine(model, {"method": "early_exit", "num_speculative_tokens": 3, "early_exit_layer": 1})
    assert [output.token_ids for output in engine.generate(prompts, GREEDY)] == reference


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_draft_model(batch, tmp_path):
    model, draft = toys.tiny_model("qwen3"), toys.tiny_model("llama_tied", seed=1)
    draft.save_pretrained(tmp_path)
    prompts = toys.prompts(8)
    config = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 4}
    engine = Engine(model, config, max_batch_size=batch)
    assert [o.token_ids for o in engine.generate(prompts, GREEDY)] == [
        toys.generated(model, prompt, NUM_TOKENS) for prompt in prompts
    ]


def test_a_draft_model_equal_to_the_verifier_is_always_accepted(tmp_path):
    # also proves the draft's cache: one wrong position or a stale key would cost acceptance
    model = toys.tiny_model("mistral_sliding")
    model.save_pretrained(tmp_path)
    config = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    engine = Engine(model, config, max_batch_size=3)
    engine.generate(toys.prompts(6, longest=60), SamplingParams(max_tokens=41))
    assert engine.stats.acceptance_length == 4.0
