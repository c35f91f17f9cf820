"""The law of sampled output, through the engine: drafts of any kind leave the verifier's law as it is.

A Markov-table verifier over 4 tokens, thousands of requests, and a chi-squared test of the joint of all emitted tokens
(first token, then two rounds or more) against a law computed by enumeration with its own, naive, sampling code.
False alarms: each test fails by chance with probability 1e-5 (seeds are fixed, so it does not come and go).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.verification import resolve_rule

V, NUM_TOKENS, NUM_REQUESTS, FALSE_ALARM = 4, 4, 2000, 1e-5
PROMPT = [1, 3]


def table(seed: int) -> torch.Tensor:
    probs_VV = torch.rand(V, V, generator=torch.Generator().manual_seed(seed)).pow(2) + 0.02
    return probs_VV / probs_VV.sum(-1, keepdim=True)


def letter(token: int) -> str:
    return "abcd"[token]


class Letters:
    """Tokens 0 .. 3 are a .. d."""

    eos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return ["abcd".index(letter) for letter in text.strip()]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(map(letter, token_ids))


def naive_law(row: list[float], text: list[int], params: SamplingParams) -> list[float]:
    """One step's law from the definitions of the parameters, in plain Python."""
    output = text[len(PROMPT) :]
    logits = [math.log(p) + (params.logit_bias or {}).get(token, 0.0) for token, p in enumerate(row)]
    for word in params.bad_words:
        if "".join(map(letter, output)).endswith(word[:-1]):
            logits["abcd".index(word[-1])] = -math.inf
    if len(output) < params.min_tokens:
        for token in params.stop_token_ids:
            logits[token] = -math.inf
    for token in range(V):
        if token in text and params.repetition_penalty != 1:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
    weights = [math.exp(x / params.temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    if params.min_p:
        probs = [p if p >= params.min_p * max(probs) else 0.0 for p in probs]
        probs = [p / sum(probs) for p in probs]
    order = sorted(range(V), key=lambda t: -probs[t])
    if params.top_k > 0:
        probs = [p if order.index(t) < params.top_k else 0.0 for t, p in enumerate(probs)]
        probs = [p / sum(probs) for p in probs]
    if params.top_p < 1:
        before = [sum(probs[u] for u in order[: order.index(t)]) for t in range(V)]
        probs = [p if before[t] < params.top_p else 0.0 for t, p in enumerate(probs)]
    return [p / sum(probs) for p in probs]


def joint_law(verifier_VV: torch.Tensor, params: SamplingParams) -> dict[tuple[int, ...], float]:
    law = {}
    for tokens in itertools.product(range(V), repeat=NUM_TOKENS):
        text, probability = list(PROMPT), 1.0
        for token in tokens:
            probability *= naive_law(verifier_VV[text[-1]].tolist(), text, params)[token]
            text.append(token)
            if token in params.stop_token_ids:
                break
        ended = tuple(text[len(PROMPT) :])
        if probability > 0:
            law[ended] = probability
    return law


def p_value(counts: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float]) -> float:
    """Chi-squared with rare cells pooled."""
    assert set(counts) <= set(law), "an impossible text was emitted"
    total = sum(counts.values())
    rare = {cell for cell, p in law.items() if p * total < 8}
    observed = [counts.get(cell, 0) for cell in law if cell not in rare] + [sum(counts.get(cell, 0) for cell in rare)]
    expected = [p * total for cell, p in law.items() if cell not in rare] + [sum(law[cell] for cell in rare) * total]
    cells = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 0]
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(statistic / 2)))


def tree_drafter() -> toys.ScriptedProposer:
    """A tree whose tokens depend on the text alone (distinct siblings)."""

    class Tree(toys.ScriptedProposer):
        def propose(self, committed, num_tokens, sampling):
            chain = super().propose(committed, 2, sampling).token_ids_BK
            first, second = chain.unbind(1)
            tokens = torch.stack([first, (first + 1) % V, second, (second + 2) % V, second], 1)
            tokens = tokens.masked_fill(first[:, None] < 0, -1)
            return toys.Proposal(tokens, parents_K=torch.tensor([-1, -1, 0, 0, 1]))

    return Tree(lambda text, num_tokens: [text[-1] % V, sum(text) % V])


DRAFTERS = {
    "none": lambda: None,
    "point mass, ragged": lambda: toys.ScriptedProposer(toys.at_random(0, V)),
    "drawn, ragged": lambda: toys.MarkovDrafter(table(5), ragged=True),
    "drawn from the verifier's own table": lambda: toys.MarkovDrafter(table(0)),
    "tree": tree_drafter,
}
PARAMS = {
    "temperature": {"temperature": 1.7},
    "top-p": {"temperature": 0.8, "top_p": 0.75},
    "top-k and min-p": {"temperature": 1.3, "top_k": 3, "min_p": 0.15},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.5},
    "adjustments": {
        "temperature": 1.2,
        "logit_bias": {0: 1.0, 2: -0.5},
        "bad_words": ("ab", "aa", "cdc", "cd"),
        "min_tokens": 2,
        "stop_token_ids": (3,),
        "presence_penalty": 0.3,
        "top_k": 3,
    },
}
CASES = [
    *(("none", "strict", params) for params in ("top-p", "penalties", "adjustments")),
    *(("point mass, ragged", "standard", params) for params in PARAMS),
    *(
        ("drawn, ragged", rule, params)
        for rule in ("standard", "block")
        for params in ("top-p", "penalties", "adjustments")
    ),
    ("drawn from the verifier's own table", "standard", "temperature"),
    ("drawn, ragged", "strict", "temperature"),
    ("tree", "standard", "penalties"),
    ("tree", "standard", "top-p"),
    ("tree", "standard", "adjustments"),
]


def sampled_counts(drafter: str, rule, params: SamplingParams, batch: int) -> dict[tuple[int, ...], int]:
    proposer = DRAFTERS[drafter]()
    engine = Engine(
        toys.MarkovVerifier(table(0)),
        proposer,
        num_speculative_tokens=2 if proposer else None,
        rule=resolve_rule(rule) if isinstance(rule, str) else rule,
        tokenizer=Letters(),
        max_batch_size=batch,
    )
    counts: dict[tuple[int, ...], int] = {}
    for output in engine.generate([PROMPT] * NUM_REQUESTS, params):
        counts[tuple(output.token_ids)] = counts.get(tuple(output.token_ids), 0) + 1
    return counts


@pytest.mark.parametrize(("drafter", "rule", "params"), CASES)
def test_the_joint_law_of_the_output_is_the_verifiers(drafter, rule, params):
    sampling = SamplingParams(max_tokens=NUM_TOKENS, **PARAMS[params])
    counts = sampled_counts(drafter, rule, sampling, batch=120)
    assert p_value(counts, joint_law(table(0), sampling)) > FALSE_ALARM


@pytest.mark.parametrize("params", ["temperature", "top-p", "penalties"])
def test_the_joint_law_holds_in_small_batches(params):
    """Four rows, refilled whenever one ends: rows are at different depths all the time."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, **PARAMS[params])
    counts = sampled_counts("drawn, ragged", "standard", sampling, batch=4)
    assert p_value(counts, joint_law(table(0), sampling)) > FALSE_ALARM


def test_a_rule_that_accepts_a_little_too_much_is_caught():
    standard = resolve_rule("standard")

    class Careless:
        lossless, reads_logits = True, False

        def __call__(self, proposal, target_probs_BK1V, generator):
            flattened = 0.75 * target_probs_BK1V + 0.25 / V
            return standard(proposal, flattened, generator)

    sampling = SamplingParams(max_tokens=NUM_TOKENS, **PARAMS["temperature"])
    counts = sampled_counts("drawn, ragged", Careless(), sampling, batch=120)
    assert p_value(counts, joint_law(table(0), sampling)) < FALSE_ALARM


def test_rows_of_one_batch_keep_their_own_parameters():
    names = list(PARAMS)
    params = [SamplingParams(max_tokens=NUM_TOKENS, **PARAMS[names[i % 5]]) for i in range(5 * NUM_REQUESTS // 2)]
    engine = Engine(
        toys.MarkovVerifier(table(0)),
        toys.MarkovDrafter(table(5), ragged=True),
        num_speculative_tokens=2,
        tokenizer=Letters(),
        max_batch_size=120,
    )
    outputs = engine.generate([PROMPT] * len(params), params)
    for i, name in enumerate(names):
        counts: dict[tuple[int, ...], int] = {}
        for output in outputs[i::5]:
            counts[tuple(output.token_ids)] = counts.get(tuple(output.token_ids), 0) + 1
        law = joint_law(table(0), SamplingParams(**PARAMS[name]))
        assert p_value(counts, law) > FALSE_ALARM


def law_until_the_scores_end(
    verifier_VV: torch.Tensor, params: SamplingParams, last: int
) -> dict[tuple[int, ...], float]:
    """The joint law of texts that end with the first token `last`: no score after it is a number."""
    law: dict[tuple[int, ...], float] = {}
    for tokens, probability in joint_law(verifier_VV, params).items():
        seen = tokens[: tokens.index(last) + 1] if last in tokens else tokens
        law[seen] = law.get(seen, 0.0) + probability
    return law


@pytest.mark.parametrize(
    ("drafter", "rule", "params"),
    [
        ("point mass, ragged", "standard", "top-p"),
        ("drawn, ragged", "standard", "temperature"),
        ("drawn, ragged", "block", "temperature"),
        ("drawn from the verifier's own table", "block", "penalties"),
        ("tree", "standard", "temperature"),
    ],
)
def test_the_law_up_to_the_first_score_that_is_no_number_is_the_verifiers(drafter, rule, params):
    """Columns behind a NaN must not decide about the tokens before it: block verification reads all of them."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, **PARAMS[params])
    last = 2  # of PROMPT and this token, only the latter is followed by NaN
    verifier = toys.MarkovVerifier(table(0))
    verifier.logits_VV[last] = math.nan
    proposer = DRAFTERS[drafter]()
    engine = Engine(verifier, proposer, num_speculative_tokens=2, rule=resolve_rule(rule), max_batch_size=120)
    counts: dict[tuple[int, ...], int] = {}
    for output in engine.generate([PROMPT] * NUM_REQUESTS, sampling):
        tokens = tuple(output.token_ids)
        counts[tokens] = counts.get(tokens, 0) + 1
        assert (output.finish_reason == "error") == (
            last in tokens[:-1] or (last in tokens and len(tokens) < NUM_TOKENS)
        )
    assert p_value(counts, law_until_the_scores_end(table(0), sampling, last)) > FALSE_ALARM


@pytest.mark.parametrize(
    ("params", "rule"), [("top-p", "standard"), ("penalties", "standard"), ("temperature", "block")]
)
def test_the_joint_law_holds_where_requests_say_their_own_number_and_method(params, rule):
    """Drawn drafts, point masses and none in one forward, each request with its own number of them."""
    said = [
        {"num_speculative_tokens": 0},
        {"num_speculative_tokens": 1},
        {"method": "points", "num_speculative_tokens": 2},
        {"method": "drawn", "num_speculative_tokens": 3},
        {},
    ]
    first, points = toys.MarkovDrafter(table(5), ragged=True), toys.ScriptedProposer(toys.at_random(0, V))
    engine = Engine(
        toys.MarkovVerifier(table(0)),
        first,
        num_speculative_tokens=3,
        other_methods={"points": points, "drawn": toys.MarkovDrafter(table(0))},
        rule=rule,
        max_batch_size=40,
    )
    base = SamplingParams(max_tokens=NUM_TOKENS, **PARAMS[params])
    requests = [replace(base, **said[i % len(said)]) for i in range(NUM_REQUESTS)]
    outputs = engine.generate([PROMPT] * NUM_REQUESTS, requests)
    law = joint_law(table(0), base)
    for kind in range(len(said)):
        counts = Counter(tuple(output.token_ids) for output in outputs[kind :: len(said)])
        assert p_value(counts, law) > FALSE_ALARM, said[kind]
    drafted = [max(len(o.stats.drafted_per_position) for o in outputs[kind :: len(said)]) for kind in range(len(said))]
    assert drafted == [0, 1, 2, 3, 3]
