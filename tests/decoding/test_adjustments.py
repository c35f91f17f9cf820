"""Biases, bad words and min_tokens: each scored column by a plain loop, and whole texts with any drafts and without."""

from __future__ import annotations

import math

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.adjustments import BatchAdjustments, adjustments_of
from speculators.interfaces import Proposal

V, EOS = 8, 7
PROMPT = [1, 3]


class WordTokenizer:
    """Ids 0 .. 7 are a .. h; after a space, a letter d or later is another token: " d" is 6 and " e" is 7."""

    eos_token_id = EOS

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return ["abcdefgh".index(letter) for letter in text.replace(" d", "g").replace(" e", "h").replace(" ", "")]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join("abcdefgh"[i] for i in token_ids if not (skip_special_tokens and i == EOS))


def banned_sequences(params: SamplingParams) -> list[list[int]]:
    """By hand, for the words used below."""
    sequences = {
        "b": [[1]],
        "ab": [[0, 1]],
        "ef": [[4, 5], [7, 5]],
        "aba": [[0, 1, 0]],
        "cc": [[2, 2]],
        "d": [[3], [6]],
    }
    return [ids for word in params.bad_words for ids in sequences[word]]


def naive_adjusted(logits: list[float], output: list[int], params: SamplingParams) -> list[float]:
    """One column from the definitions of the settings."""
    found = [logit + (params.logit_bias or {}).get(token, 0.0) for token, logit in enumerate(logits)]
    for ids in banned_sequences(params):
        if output[len(output) - len(ids) + 1 :] == ids[:-1] and len(output) >= len(ids) - 1:
            found[ids[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for token in (EOS, *params.stop_token_ids):
            found[token] = -math.inf
    return found


REQUESTS = {
    "bias": {"logit_bias": {0: 1.5, 2: -2.0, EOS: -100.0}},
    "a word of one token": {"bad_words": ["b"]},
    "words of several tokens": {"bad_words": ["ab", "cc", "aba", "ef", "d"]},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": [2, 4]},
    "min_tokens, end of sequence ignored": {"min_tokens": 6, "ignore_eos": True},
    "all, with penalties": {
        "logit_bias": {"0": 2.0, "1": 2.0},
        "bad_words": ["ab", "aba"],
        "min_tokens": 4,
        "stop_token_ids": [0],
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
    },
    "nothing": {},
}
TREE = [-1, -1, 0, 0, 1, 3]


def path_to(column: int, parents: list[int]) -> list[int]:
    """Slots from the root to a column."""
    slots = []
    slot = column - 1
    while slot >= 0:
        slots.insert(0, slot)
        slot = parents[slot]
    return slots


@pytest.mark.parametrize("parents", [[], [-1], [-1, 0, 1, 2], TREE], ids=str)
@pytest.mark.parametrize("name", list(REQUESTS))
def test_every_column_is_adjusted_by_its_own_context(name, parents):
    params = SamplingParams(max_tokens=30, **REQUESTS[name])
    adjustments = adjustments_of(params, {EOS, *params.stop_token_ids}, WordTokenizer(), V)
    generator = torch.Generator().manual_seed(0)
    outputs = [[], [0], [2, 0], [4, 4, 4, 0, 1], [0, 1, 0, 1, 0, 1]]
    rows = [adjustments, (), adjustments, adjustments, adjustments]
    drafts_BK = torch.randint(0, 3, (len(rows), len(parents)), generator=generator)
    logits_BTV = torch.randn(len(rows), len(parents) + 1, V, generator=generator)
    is_chain = parents == list(range(-1, len(parents) - 1))
    proposal = Proposal(drafts_BK, parents_K=None if is_chain else torch.tensor(parents))
    before = logits_BTV.clone()
    found_BTV = logits_BTV
    if any(rows):
        found_BTV = BatchAdjustments(rows, torch.device("cpu")).added(logits_BTV, outputs, proposal)
    for row, output in enumerate(outputs):
        for column in range(len(parents) + 1):
            text = output + [int(drafts_BK[row, slot]) for slot in path_to(column, parents)]
            own = SamplingParams() if row == 1 else params
            expected = naive_adjusted(logits_BTV[row, column].tolist(), text, own)
            torch.testing.assert_close(found_BTV[row, column], torch.tensor(expected))
    assert torch.equal(logits_BTV, before)  # log-probabilities are taken from the raw scores


def scores_table() -> torch.Tensor:
    """Flat enough for the settings to decide; tokens 0 and 1 are likely."""
    table = torch.rand(V, V, generator=torch.Generator().manual_seed(3)) + 0.4
    table[:, [0, 1]] += 0.4
    table[:, EOS] = 0.9
    return table / table.sum(-1, keepdim=True)


def naive_greedy(table: torch.Tensor, params: SamplingParams) -> list[int]:
    output: list[int] = []
    while len(output) < params.max_tokens:
        last = (PROMPT + output)[-1]
        scores = naive_adjusted(table[last].log().tolist(), output, params)
        for token in range(V):
            if token in PROMPT + output and params.repetition_penalty != 1:
                factor = params.repetition_penalty
                scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
            scores[token] -= params.frequency_penalty * output.count(token)
        output.append(max(range(V), key=lambda token: scores[token]))
        if output[-1] in params.stop_token_ids or (output[-1] == EOS and not params.ignore_eos):
            break
    return output


class RightTree(toys.ScriptedProposer):
    """The true continuation three deep, between siblings that are wrong."""

    def propose(self, committed, num_tokens, sampling):
        first, second, third = super().propose(committed, 3, sampling).token_ids_BK.unbind(1)
        tokens = torch.stack([(first + 1) % V, first, (first + 2) % V, (second + 3) % V, second, third], 1)
        drafts = tokens.masked_fill(torch.stack([first, first, first, second, second, third], 1) < 0, -1)
        return Proposal(drafts, parents_K=torch.tensor([-1, -1, 0, 1, 1, 4]))


def drafters(texts: list[list[int]]):
    """(proposer, K) by name."""

    def right(text: list[int], num_tokens: int) -> list[int]:
        return next((whole[len(text) :][:num_tokens] for whole in texts if whole[: len(text)] == text), [])

    return {
        "right, K = 1": (toys.ScriptedProposer(right), 1),
        "right, K = 4": (toys.ScriptedProposer(right), 4),
        "random, K = 1": (toys.ScriptedProposer(toys.at_random(1, V)), 1),
        "random, K = 4": (toys.ScriptedProposer(toys.at_random(2, V)), 4),
        "tree": (RightTree(right), 6),
    }


@pytest.mark.parametrize("drafter", ["right, K = 1", "right, K = 4", "random, K = 1", "random, K = 4", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_the_same_with_drafts_and_without(drafter, temperature):
    """Greedy: a plain loop's. Sampled from point-mass drafts: plain decoding's, which a seed decides."""
    table = scores_table()
    verifier = toys.MarkovVerifier(table)
    settings = {"max_tokens": 24, "temperature": temperature, "frequency_penalty": 0.1}  # texts that do not circle
    params = [SamplingParams(seed=seed, **(settings | own)) for seed, own in enumerate(REQUESTS.values())]
    prompts = [PROMPT] * len(params)
    plain = [o.token_ids for o in Engine(verifier, tokenizer=WordTokenizer()).generate(prompts, params)]
    if temperature == 0:
        assert plain == [naive_greedy(table, own) for own in params]
        assert len(set(map(tuple, plain))) > len(plain) - 2
    for batch in (1, 3, 8):
        proposer, num_tokens = drafters([PROMPT + ids for ids in plain])[drafter]
        engine = Engine(
            verifier, proposer, num_speculative_tokens=num_tokens, tokenizer=WordTokenizer(), max_batch_size=batch
        )
        assert [output.token_ids for output in engine.generate(prompts, params)] == plain
        if not drafter.startswith("random"):
            assert engine.stats.acceptance_length > 1.6
    for own, output in zip(params, plain, strict=True):
        assert not any(ids == output[i : i + len(ids)] for ids in banned_sequences(own) for i in range(len(output)))
        ends = {*own.stop_token_ids, EOS}
        assert not ends & set(output[: own.min_tokens])


class LetterTokenizer(WordTokenizer):
    """One letter per token of the tiny models: id i is chr(i + 33)."""

    eos_token_id = 2

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) - 33 for letter in text.replace(" ", "")]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(i + 33) for i in token_ids)


METHODS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2},
    "suffix": {"method": "suffix", "num_speculative_tokens": 3},
    "early exit": {"method": "early_exit", "num_speculative_tokens": 2, "early_exit_layer": 3},
    "early exit, K = 1": {"method": "early_exit", "num_speculative_tokens": 1, "early_exit_layer": 3},
    "early exit, tree": {
        "method": "early_exit",
        "early_exit_layer": 3,
        "speculative_token_tree": "[(0,), (1,), (0, 0), (0, 1), (1, 0)]",
    },
    "early exit, adaptive": {
        "method": "early_exit",
        "num_speculative_tokens": 3,
        "early_exit_layer": 3,
        "enable_adaptive_verification": True,
    },
}


@pytest.mark.parametrize("method", list(METHODS))
def test_greedy_texts_of_a_model_are_a_plain_loops_whatever_drafts(method):
    model = toys.tiny_model("llama")
    prompt = toys.prompts(1, shortest=9, longest=9)[0] * 2
    free = toys.generated(model, prompt, 12)
    first, second, third = free[:3]
    params = SamplingParams(
        max_tokens=20,
        min_tokens=12,
        stop_token_ids=[third],
        logit_bias={free[4]: -1.0, free[0]: 0.5},
        bad_words=[chr(33 + first) + chr(33 + second), chr(33 + second)],
        ignore_eos=True,
    )
    output: list[int] = []
    while len(output) < 20 and not (len(output) > 12 and output[-1] == third):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + output])).logits[0, -1].clone()
        scores[free[4]] -= 1.0
        scores[free[0]] += 0.5
        scores[second] = -math.inf
        if len(output) < 12:
            scores[[third, 2]] = -math.inf
        output.append(int(scores.argmax()))
    assert output[:12] != free
    engine = Engine(model, METHODS[method], tokenizer=LetterTokenizer())
    assert engine.generate([prompt], params)[0].token_ids == output
    assert engine.stats.num_drafted > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {V: 1.0}}, f"logit_bias: token {V} is outside the verifier's vocabulary of {V}"),
        ({"bad_words": "xyz"}, "bad_words: token 87 is outside"),
        ({"prompt_logprobs": V + 1}, f"prompt_logprobs={V + 1} exceeds"),
    ],
)
def test_settings_that_the_verifier_cannot_follow_are_named(settings, message):
    engine = Engine(toys.MarkovVerifier(scores_table()), tokenizer=LetterTokenizer())
    with pytest.raises(ValueError, match=message):
        engine.generate([PROMPT], SamplingParams(**settings))


def test_bad_words_need_a_tokenizer_and_at_least_one_token():
    with pytest.raises(ValueError, match="bad_words were given but the engine has no tokenizer"):
        Engine(toys.MarkovVerifier(scores_table())).generate([PROMPT], SamplingParams(bad_words=["b"]))


def test_a_request_that_bans_every_token_ends_with_the_reason():
    params = SamplingParams(bad_words=list("abcdefgh"))
    output = Engine(toys.MarkovVerifier(scores_table()), tokenizer=WordTokenizer()).generate([PROMPT], params)[0]
    assert (output.token_ids, output.finish_reason) == ([], "error")
    assert "bad words" in output.error and "no token with a finite score" in output.error


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"n": 0}, "n=0 must be an integer, at least 1"),
        ({"n": 2}, "n=2 at temperature 0 gives equal samples"),
        ({"n": 2, "temperature": 1, "seed": 2**63 - 1}, r"sample i has seed \+ i"),
        ({"min_tokens": -1}, "min_tokens=-1 must be an integer, 0 or more"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 must be at most max_tokens=8"),
        ({"logit_bias": {"x": 1}}, "must map token ids to numbers"),
        ({"logit_bias": [1]}, "must map token ids to numbers"),
        ({"logit_bias": {3: math.nan}}, "finite"),
        ({"logit_bias": {-3: 1}}, "ids are 0 or more"),
        ({"bad_words": ["a", " "]}, r"bad_words=\('a', ' '\) must be made of words"),
        ({"prompt_logprobs": -2}, "prompt_logprobs=-2 must be an integer, 0 or more, -1 for all tokens, or None"),
    ],
)
def test_settings_of_another_kind_are_refused(values, rule):
    with pytest.raises(ValueError, match=rule):
        SamplingParams(**values)
