"""The production draws, sampled: chi-squared on the joint law of tokens emitted over several rounds.

Shapes: B rows, K draft slots, V vocabulary, L tokens compared. Rows come in batches of four kinds: draft lengths 3, 2,
0 and one drawn anew each round. The verifier is a Markov table under temperature, top-p and a presence penalty that
counts accepted drafts; a wrong cut inside a round would shift it.

False alarms: `ALPHA` for the whole file, split evenly (Bonferroni) over its `NUM_CHECKS` chi-squared checks.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from scipy.stats import chi2

from speculators.decoding.verification import (
    DRAFT_STREAM,
    UniformDraws,
    inverse_cdf,
    keyed_draws,
    keyed_uniform,
    resolve_rule,
    uniform_draws,
)
from speculators.interfaces import Proposal

V, L, K = 4, 4, 3
NUM_ROWS = 150_000
ALPHA, NUM_CHECKS = 1e-3, 20
CHAIN = [-1, 0, 1]
TREE = [-1, -1, 0, 0]


@cache
def tables(role: str) -> list[torch.Tensor]:
    """[V^n, V] next-token distributions for every prefix of length n < L + K + 1, indexed by the prefix in base V."""
    generator = torch.Generator().manual_seed(7)
    bigram_VV = torch.randn(V + 1, V, generator=generator, dtype=torch.float64) * 0.6
    if role == "draft":  # similar, not equal; blind to the penalty; never proposes token 3 after token 0
        bigram_VV = bigram_VV + torch.randn(V + 1, V, generator=generator, dtype=torch.float64) * 0.7
        bigram_VV[0, 3] = -torch.inf
    levels = []
    for length in range(L + K + 1):
        rows = []
        for prefix in itertools.product(range(V), repeat=length):
            logits = bigram_VV[prefix[-1] if prefix else V].clone()
            if role == "target":
                logits[list(set(prefix))] -= 0.6
            rows.append(torch.softmax(logits / 0.8, 0))
        probs = torch.stack(rows)
        levels.append(top_p(probs, 0.92) if role == "target" else probs)
    return levels


def top_p(probs: torch.Tensor, mass: float) -> torch.Tensor:
    ordered, order = probs.sort(-1, descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < mass, ordered, 0.0)
    return torch.zeros_like(probs).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


def lookup(role: str, prefix_B: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    """[B, V] rows of the tables, fp32 as production has them."""
    out = torch.empty(len(prefix_B), V)
    for length, table in enumerate(tables(role)):
        at = length_B == length
        out[at] = table[prefix_B[at]].float()
    return out


def draw_drafts(prefix_B, length_B, parents, num_drafts_B, uniform_BK, replace):
    """Slots drawn from q given their own path (replace=False: without the tokens of earlier siblings)."""
    prefixes, lengths, tokens, probs = [], [], [], []
    for slot, parent in enumerate(parents):
        at, n = (prefix_B, length_B) if parent < 0 else (prefixes[parent], lengths[parent])
        q_BV = lookup("draft", at, n)
        if not replace:
            for other in range(slot):
                if parents[other] == parent:
                    q_BV = q_BV.scatter(1, tokens[other][:, None], 0.0)
            q_BV = q_BV / q_BV.sum(-1, keepdim=True)
        token_B = inverse_cdf(q_BV[:, None], uniform_BK[:, slot, None])[:, 0]
        tokens.append(token_B)
        probs.append(q_BV)
        prefixes.append(at * V + token_B)
        lengths.append(n + 1)
    target = [lookup("target", prefix_B, length_B)]
    target += [lookup("target", at, n) for at, n in zip(prefixes, lengths, strict=True)]
    token_BK = torch.stack(tokens, 1)
    token_BK = torch.where(torch.arange(len(parents)) < num_drafts_B[:, None], token_BK, -1)
    return token_BK, torch.stack(probs, 1), torch.stack(target, 1)


def emitted(rule_name: str, *, parents=CHAIN, with_q=True, replace=True, draws_of=None, seed=0, num_rows=NUM_ROWS):
    """First L tokens of every row, as one base-V number, decoded round by round."""
    rule, generator = resolve_rule(rule_name), torch.Generator().manual_seed(seed)
    prefix_B, length_B = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)
    while (length_B < L).any():
        active_B = (length_B < L).nonzero()[:, 0]
        at, n = prefix_B[active_B], length_B[active_B]
        num_drafts_B = torch.tensor([3, 2, 0, -1])[active_B % 4]
        drawn_B = torch.randint(0, 5, num_drafts_B.shape, generator=generator)
        num_drafts_B = torch.where(num_drafts_B < 0, drawn_B, num_drafts_B)
        if draws_of is None:
            draws = generator
            uniform_BK = torch.rand(len(at), len(parents), dtype=torch.float64, generator=generator)
        else:
            draws = draws_of(active_B, n, len(parents) + 1)
            slot_K = torch.arange(len(parents))
            uniform_BK = keyed_uniform(active_B[:, None], DRAFT_STREAM, n[:, None], slot_K)
        token_BK, probs_BKV, target_BK1V = draw_drafts(at, n, parents, num_drafts_B, uniform_BK, replace)
        tree = None if parents == CHAIN else torch.tensor(parents)
        result = rule(Proposal(token_BK, probs_BKV if with_q else None, tree), target_BK1V, draws)
        for step in range(len(parents) + 1):
            slot_B = result.path_BK[:, step].clamp_min(0) if step < len(parents) else torch.zeros_like(at)
            drafted_B = token_BK.gather(1, slot_B[:, None])[:, 0]
            token_B = torch.where(result.num_accepted_B > step, drafted_B, result.next_token_B)
            writes_B = (result.num_accepted_B >= step) & (n < L)
            at, n = torch.where(writes_B, at * V + token_B, at), n + writes_B
        prefix_B[active_B], length_B[active_B] = at, n
    return prefix_B


def p_value(sequence_B: torch.Tensor) -> float:
    """Chi-squared of the counts of all V^L sequences against the verifier's law; rare ones pooled."""
    law = torch.ones(1, dtype=torch.float64)
    for length in range(L):
        law = (law[:, None] * tables("target")[length].float().double()).reshape(-1)
    expected = law / law.sum() * len(sequence_B)
    observed = torch.bincount(sequence_B, minlength=V**L).double()
    assert observed[expected == 0].sum() == 0, "a token of probability 0 was emitted"
    assert (expected >= 8).sum() > 60, "too few possible sequences to compare anything"
    rare = expected < 8
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    return float(chi2.sf(((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum().item(), len(expected) - 1))


SETTINGS = {
    "strict": {"rule_name": "strict"},
    "standard": {"rule_name": "standard"},
    "standard, point-mass drafts": {"rule_name": "standard", "with_q": False},
    "block": {"rule_name": "block"},
    "sample-and-match tree": {"rule_name": "strict", "parents": TREE},
    "multi-round tree": {"rule_name": "standard", "parents": TREE},
    "multi-round tree, no replacement": {"rule_name": "standard", "parents": TREE, "replace": False},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("source", ["generator", "keyed"])
def test_joint_tokens_over_rounds_have_the_verifiers_law(name, source):
    draws_of = keyed_draws if source == "keyed" else None
    assert p_value(emitted(**SETTINGS[name], draws_of=draws_of)) > ALPHA / NUM_CHECKS


def test_the_same_statistic_catches_wrong_randomness_and_wrong_laws():
    """Accept uniforms keyed by position alone: block verification has seen them, so the next round is conditioned."""

    def accept_keyed_by_position(seed_B, first_position_B, num_columns):
        position_BN = first_position_B[:, None] + torch.arange(num_columns)
        return UniformDraws(
            keyed_uniform(seed_B[:, None], 1, position_BN), keyed_uniform(seed_B[:, None], 2, position_BN)
        )

    assert p_value(emitted("block", draws_of=accept_keyed_by_position, num_rows=400_000)) < 1e-8

    def draft_noise_again(seed_B, first_position_B, num_columns):
        column_N = torch.arange(num_columns)
        uniform_BN = keyed_uniform(seed_B[:, None], DRAFT_STREAM, first_position_B[:, None], column_N)
        return UniformDraws(uniform_BN, uniform_BN)

    assert p_value(emitted("standard", draws_of=draft_noise_again)) < 1e-12
    assert p_value(emitted("typical")) < 1e-12


def test_sample_and_match_with_keyed_draws_is_reproducible_whatever_is_drafted():
    plain = emitted("strict", parents=[-1], draws_of=keyed_draws, seed=1, num_rows=20_000)
    for setting in ({}, {"parents": TREE}, {"rule_name": "standard", "with_q": False}):
        again = emitted(**{"rule_name": "strict", **setting}, draws_of=keyed_draws, seed=2, num_rows=20_000)
        assert torch.equal(again, plain)


def test_picks_fill_the_cells_of_the_distribution_and_never_a_token_of_probability_zero():
    probs_V = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    picked = inverse_cdf(probs_V.expand(1, 1000, 6), grid[None])[0]
    assert torch.bincount(picked, minlength=6).tolist() == [0, 250, 0, 500, 250, 0]
    ends = torch.tensor([[0.0, 1 - 2.0**-53, 1.0]], dtype=torch.float64)
    assert inverse_cdf(probs_V.expand(1, 3, 6), ends)[0].tolist() == [1, 4, 4]
    draws = UniformDraws(grid[:, None], grid[:, None])
    assert draws.accept(torch.full((1000, 1), 0.3, dtype=torch.float64)).sum() == 300
    assert not draws.accept(torch.zeros(1000, 1)).any()
    assert uniform_draws(1000, 2, None, torch.device("cpu")).accept(torch.ones(1000, 2)).all()


def test_keyed_uniforms_are_uniform_and_independent_across_seeds_positions_and_streams():
    seed = torch.arange(300)[:, None, None]
    uniform = keyed_uniform(seed, torch.tensor([1, 2, 3])[:, None], torch.arange(300))
    for pair in ((uniform[:-1], uniform[1:]), (uniform[:, :-1], uniform[:, 1:]), (uniform[..., :-1], uniform[..., 1:])):
        cell = (pair[0] * 10).long() * 10 + (pair[1] * 10).long()
        count = torch.bincount(cell.reshape(-1), minlength=100).double()
        statistic = ((count - count.mean()) ** 2 / count.mean()).sum().item()
        assert chi2.sf(statistic, 99) > ALPHA / NUM_CHECKS
