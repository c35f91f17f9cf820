"""Scores that are no numbers: they end the request they belong to, with everything before them, and touch nobody else.

The reference is a naive loop: transformers' own forward on the whole text, token by token, until a score is not finite.
"""

from __future__ import annotations

import math

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.request import NonFiniteScoresError, raise_for_failed
from speculators.decoding.verification import StandardRule
from speculators.interfaces import CaptureSpec, Proposal, Verification

NAN, INF = math.nan, math.inf
BAD = 59
"""A token whose embedding is NaN."""
NUM_TOKENS = 14
GREEDY = SamplingParams(max_tokens=NUM_TOKENS)
METHODS = {
    "plain": None,
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1},
    "early exit": {"method": "early_exit", "num_speculative_tokens": 3, "early_exit_layer": 1},
    "tree": {"method": "early_exit", "early_exit_layer": 1, "speculative_token_tree": "[(0,), (1,), (0, 0), (0, 1)]"},
}


def damaged(name: str = "llama"):
    """A model that is right until it reads token `BAD`."""
    model = toys.tiny_model(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = NAN
    return model


def naive(model, prompt: list[int]) -> tuple[list[int], str]:
    text = list(prompt)
    while len(text) < len(prompt) + NUM_TOKENS:
        logits_V = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        if not logits_V.isfinite().all():
            return text[len(prompt) :], "error"
        text.append(int(logits_V.argmax()))
    return text[len(prompt) :], "length"


def prompts_with_and_without(model) -> list[list[int]]:
    """Prompts of different lengths: of some the text reaches `BAD`, one has it inside, of some it never does."""
    found = toys.prompts(24, seed=3)
    found[5] = [*found[5], BAD, 7, 8]
    reasons = [naive(model, prompt)[1] for prompt in found]
    assert {"error", "length"} <= set(reasons)
    assert any(naive(model, p)[0] for p, reason in zip(found, reasons, strict=True) if reason == "error")
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_request_ends_where_the_scores_do_and_its_neighbours_go_on(method, batch):
    model = damaged()
    prompts = prompts_with_and_without(model)
    engine = Engine(model, METHODS[method], max_batch_size=batch)
    outputs = engine.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert (output.token_ids, output.finish_reason) == naive(model, prompt)
        assert (output.error is not None) == (output.finish_reason == "error")
        assert output.stats.num_tokens == len(output.token_ids)
    num_failed = sum(output.finish_reason == "error" for output in outputs)
    assert engine.stats.num_non_finite == num_failed
    failed = next(output for output in outputs if output.error is not None)
    num_read = len(failed.prompt_token_ids) + len(failed.token_ids)
    assert f"after {num_read} tokens the verifier's scores are not finite (97 of 97 are NaN)" in failed.error


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3", "gpt_oss"])
def test_windows_and_other_forwards_are_cleared_too(name):
    model = damaged(name)
    prompts = toys.prompts(10, seed=5)
    prompts[2], prompts[6] = [*prompts[2], BAD], [BAD, *prompts[6]]
    outputs = Engine(model, METHODS["early exit"], max_batch_size=2).generate(prompts, GREEDY)
    found = [(output.token_ids, output.finish_reason) for output in outputs]
    assert found == [naive(model, prompt) for prompt in prompts]
    assert "length" in [reason for _, reason in found]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad_draft_at", [0, 1, 2])
def test_a_rejected_draft_with_a_nan_embedding_leaves_no_trace(temperature, bad_draft_at):
    model, whole = damaged(), toys.tiny_model("llama")
    prompts = [prompt for prompt in toys.prompts(12, seed=3) if BAD not in prompt]
    params = [SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, seed=i) for i in range(len(prompts))]
    expected = Engine(whole, max_batch_size=1).generate(prompts, params)
    kept = [i for i, output in enumerate(expected) if BAD not in output.token_ids]
    assert len(kept) > 4
    texts = [expected[i].prompt_token_ids + expected[i].token_ids for i in kept]
    right = toys.oracle(texts)

    def draft(text: list[int], num_tokens: int) -> list[int]:
        tokens = right(text, num_tokens)
        if len(text) % 3 and bad_draft_at < len(tokens):  # not in every round: later rounds read what is left behind
            tokens[bad_draft_at] = BAD
        return tokens

    engine = Engine(model, toys.ScriptedProposer(draft), num_speculative_tokens=3, max_batch_size=3)
    outputs = engine.generate([prompts[i] for i in kept], [params[i] for i in kept])
    assert [output.token_ids for output in outputs] == [expected[i].token_ids for i in kept]
    assert engine.stats.num_accepted > 0


def test_padding_is_no_token_of_somebody_else():
    """Short rows and idle rows are padded: token 0's embedding is often never trained."""
    model, whole = toys.tiny_model("llama"), toys.tiny_model("llama")
    found = [(prompt, toys.generated(whole, prompt, NUM_TOKENS)) for prompt in toys.prompts(14, longest=40)]
    prompts, expected = zip(*[(prompt, text) for prompt, text in found if 0 not in text][:9], strict=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = NAN
    texts = [p + e for p, e in zip(prompts, expected, strict=True)]
    engine = Engine(
        model, toys.ScriptedProposer(toys.oracle(texts)), num_speculative_tokens=4, max_batch_size=4, prefill_chunk=6
    )
    params = [SamplingParams(max_tokens=NUM_TOKENS - i) for i in range(9)]
    assert [output.token_ids for output in engine.generate(prompts, params)] == [
        text[: NUM_TOKENS - i] for i, text in enumerate(expected)
    ]


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}, {"presence_penalty": 1.0}],
)
@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({5: NAN}, "1 of 97 are NaN"),
        ({5: INF, 6: INF}, "2 of 97 are inf"),
        (dict.fromkeys(range(97), -INF), "all 97 are -inf"),
    ],
    ids=["NaN", "inf", "all -inf"],
)
def test_no_token_is_made_of_scores_that_are_no_numbers(params, scores, words):
    verifier = toys.MarkovVerifier(torch.full((97, 97), 1 / 97))
    for token, score in scores.items():
        verifier.logits_VV[:, token] = score
    output = Engine(verifier).generate([[3, 4]], SamplingParams(seed=1, **params))[0]
    assert (output.token_ids, output.finish_reason) == ([], "error") and words in output.error


def test_tokens_that_a_verifier_rules_out_are_no_error():
    verifier = toys.MarkovVerifier(torch.full((97, 97), 1 / 97))
    verifier.logits_VV[:, 10:] = -INF
    for params in (SamplingParams(), SamplingParams(temperature=1.0, seed=1), SamplingParams(presence_penalty=0.5)):
        output = Engine(verifier).generate([[3, 4]], params)[0]
        assert output.finish_reason == "length" and max(output.token_ids) < 10


def test_penalties_that_leave_no_number_are_named():
    verifier = toys.MarkovVerifier(torch.full((97, 97), 1 / 97))
    verifier.logits_VV += 5.0
    params = SamplingParams(repetition_penalty=1e-42)
    output = Engine(verifier).generate([[3, 4]], params)[0]
    assert output.finish_reason == "error" and "penalties and temperature" in output.error


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-60])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    model = toys.tiny_model("llama")
    prompts = toys.prompts(3)
    outputs = Engine(model).generate(prompts, SamplingParams(max_tokens=8, temperature=temperature, seed=3))
    assert [output.token_ids for output in outputs] == [toys.generated(model, prompt, 8) for prompt in prompts]


def test_streams_end_with_the_error_and_a_stop_before_it_wins():
    table_VV = torch.full((97, 97), 1e-9)
    for here, there in ((3, 4), (4, 5), (5, 6)):
        table_VV[here, there] = 1.0
    verifier = toys.MarkovVerifier(table_VV)
    verifier.logits_VV[5] = NAN
    proposer = toys.ScriptedProposer(lambda text, num: [4, 5, 6][:num])
    engine = Engine(verifier, proposer, num_speculative_tokens=3)
    events = list(engine.stream([[3]], SamplingParams(max_tokens=9)))
    assert [token for event in events for token in event.token_ids] == [4, 5]
    assert (events[-1].finish_reason, "not finite" in events[-1].error) == ("error", True)
    assert engine.generate([[3]], SamplingParams(stop_token_ids=[5]))[0].finish_reason == "stop"
    assert engine.generate([[3]], SamplingParams(max_tokens=2))[0].finish_reason == "length"


def test_what_failed_is_named_and_counted():
    outputs = Engine(damaged()).generate([[5, 6], [BAD], [7, BAD]], SamplingParams(max_tokens=1))
    with pytest.raises(NonFiniteScoresError, match=r"prompt 1: after 1 tokens .*\(2 of 3 requests ended so\)"):
        raise_for_failed(outputs)
    raise_for_failed(outputs[:1])


# -- drafters


class BadDrafter(toys.MarkovDrafter):
    """Draws drafts; in some rounds of some rows its scores are damaged."""

    def __init__(self, damage):
        super().__init__(torch.full((97, 97), 1 / 97))
        self.damage = damage

    def propose(self, committed, num_tokens, sampling):
        proposal = super().propose(committed, num_tokens, sampling)
        self.damage(proposal)
        return proposal


def nan_in_one_entry(proposal):
    proposal.probs_BKV[::2, 1, 7] = NAN


def inf_everywhere(proposal):
    proposal.probs_BKV[:, 0] = INF


def token_outside(proposal):
    proposal.token_ids_BK[::2, 1] = 97


@pytest.mark.parametrize("damage", [nan_in_one_entry, inf_everywhere, token_outside])
@pytest.mark.parametrize("rule", ["strict", "standard", "block"])
def test_drafts_that_are_no_drafts_are_left_out_and_counted(damage, rule):
    model = toys.tiny_model("llama")
    prompts = toys.prompts(5)
    params = [SamplingParams(max_tokens=9, temperature=t, seed=i) for i, t in enumerate((0.0, 1.0, 0.0, 1.0, 0.0))]
    engine = Engine(model, BadDrafter(damage), num_speculative_tokens=3, rule=rule)
    outputs = engine.generate(prompts, params)
    assert all(output.finish_reason == "length" for output in outputs)
    for index in (0, 2, 4):
        assert outputs[index].token_ids == toys.generated(model, prompts[index], 9)
    if rule == "strict":
        plain = Engine(model).generate(prompts, params)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert engine.stats.num_dropped_drafts > 0
    assert engine.stats.num_drafted < 3 * engine.stats.num_rounds


@pytest.mark.parametrize("sample_method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_without_numbers_changes_nothing(sample_method, temperature, tmp_path):
    model, draft = toys.tiny_model("qwen3"), toys.tiny_model("llama_tied", seed=1)
    with torch.no_grad():
        draft.get_input_embeddings().weight[:] = NAN
    draft.save_pretrained(tmp_path)
    config = {
        "method": "draft_model",
        "model": str(tmp_path),
        "num_speculative_tokens": 3,
        "draft_sample_method": sample_method,
    }
    params = SamplingParams(max_tokens=9, temperature=temperature, seed=3)
    prompts = toys.prompts(4)
    outputs = Engine(model, config).generate(prompts, params)
    assert [output.finish_reason for output in outputs] == ["length"] * 4
    if temperature == 0 or sample_method == "greedy":
        plain = Engine(model).generate(prompts, params)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]


def test_a_rule_that_emits_no_token_is_named():
    class Outside(StandardRule):
        def __call__(self, proposal, target_probs_BK1V, generator):
            good = super().__call__(proposal, target_probs_BK1V, generator)
            return Verification(good.path_BK, good.num_accepted_B, torch.full_like(good.next_token_B, 97))

    engine = Engine(
        toys.tiny_model("llama"), toys.ScriptedProposer(toys.at_random(0)), num_speculative_tokens=2, rule=Outside()
    )
    with pytest.raises(ValueError, match="emitted token 97, outside the vocabulary of 97"):
        engine.generate([[5, 6]], SamplingParams(temperature=1.0))


def test_states_that_are_no_numbers_do_not_reach_a_drafter():
    model = damaged("qwen3")
    seen = []

    class Watching(toys.ScriptedProposer):
        def propose(self, committed, num_tokens, sampling):
            seen.append(bool(committed.states_BTD.isfinite().all()))
            return Proposal(torch.full((len(committed.num_new_B), num_tokens), BAD))

    watching = Watching(lambda text, num: [BAD] * num, CaptureSpec(aux_layer_ids=(1, 2)))
    prompts = [prompt for prompt in toys.prompts(8, seed=3) if naive(model, prompt)[1] == "length"]
    engine = Engine(model, watching, num_speculative_tokens=2, max_batch_size=3)
    outputs = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [naive(model, prompt)[0] for prompt in prompts]
    assert len(seen) > 3 and all(seen)
