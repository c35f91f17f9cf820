"""Penalties: what each scored column counts as emitted, for any number of drafts, compared with plain Python."""

from __future__ import annotations

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.round import drafted_tokens
from speculators.decoding.sampling import BatchSampling, SeenTokens
from speculators.interfaces import Proposal

V = 5
PROMPT = [1, 3]
OUTPUT = [3, 4]
PENALTIES = {"repetition_penalty": 1.6, "presence_penalty": 0.7, "frequency_penalty": 0.9}


def naive_penalised(logits: list[float], output: list[int], params: SamplingParams) -> list[float]:
    """From the definitions: repetition looks at the prompt too, presence and frequency at the output alone."""
    found = []
    for token, logit in enumerate(logits):
        if token in PROMPT or token in output:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        found.append(
            logit - params.frequency_penalty * output.count(token) - params.presence_penalty * (token in output)
        )
    return found


@pytest.mark.parametrize("drafts", [[2], [0], [4], [-1], [0, 0], [2, 4, 0]], ids=str)
@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty", "all"])
def test_each_column_counts_the_drafts_before_it_as_emitted(drafts, penalty):
    params = SamplingParams(**(PENALTIES if penalty == "all" else {penalty: PENALTIES[penalty]}))
    logits_1TV = torch.randn(1, len(drafts) + 1, V, generator=torch.Generator().manual_seed(0))
    seen = SeenTokens(1, V, torch.device("cpu"))
    seen.start(0, PROMPT)
    seen.add({0: OUTPUT})
    sampling = BatchSampling([params], [0], torch.device("cpu"))
    found_1TV = sampling.penalised(logits_1TV, seen, drafted_tokens(Proposal(torch.tensor([drafts]))))
    expected = [
        naive_penalised(logits, OUTPUT + [token for token in drafts[:column] if token >= 0], params)
        for column, logits in enumerate(logits_1TV[0].tolist())
    ]
    torch.testing.assert_close(found_1TV[0], torch.tensor(expected))


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_penalised_text_is_the_same_with_drafts_and_without(num_tokens):
    """A seed decides the text. Drafts are right, so the column after each of them decides the next token."""
    table = torch.rand(V, V, generator=torch.Generator().manual_seed(0)) + 0.3  # flat: penalties decide
    verifier = toys.MarkovVerifier(table / table.sum(-1, keepdim=True))
    params = [
        SamplingParams(max_tokens=24, temperature=temperature, seed=seed, presence_penalty=1.5, frequency_penalty=0.4)
        for seed, temperature in enumerate((0.0, 0.7, 1.0, 1.3))
    ]
    plain = Engine(verifier).generate([PROMPT] * 4, params)
    assert all(len(set(output.token_ids)) == V for output in plain)
    for output, own in zip(plain, params, strict=True):
        proposer = toys.ScriptedProposer(toys.oracle([PROMPT + output.token_ids + [0] * num_tokens]))
        engine = Engine(verifier, proposer, num_speculative_tokens=num_tokens)
        drafted = engine.generate([PROMPT], own)[0]
        assert drafted.token_ids == output.token_ids
        assert drafted.stats.acceptance_length > num_tokens + 0.5
