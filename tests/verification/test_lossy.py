"""Rules that are not lossless do what their formulas say, and say that they are not lossless."""

from __future__ import annotations

import math

import pytest
import torch

from speculators.decoding.verification import UniformDraws, resolve_rule
from speculators.interfaces import Proposal


def rows(*distributions: list[float]) -> torch.Tensor:
    return torch.tensor([distributions])


def test_every_rule_says_whether_it_is_lossless():
    lossless = {
        name: resolve_rule(name).lossless for name in ("greedy", "strict", "standard", "probabilistic", "block")
    }
    assert all(lossless.values())
    assert not resolve_rule("typical").lossless
    assert not resolve_rule("synthetic", acceptance_rates=(1.0,)).lossless
    assert resolve_rule("tolerance").lossless
    assert resolve_rule("tolerance", verifier_accept_k=3).lossless
    assert not resolve_rule("tolerance", verifier_accept_k=3, accept_tolerance=0.1).lossless


def test_unknown_names_and_options_are_named():
    with pytest.raises(ValueError, match=r"'stricter' does not exist.*'block'.*'strict'"):
        resolve_rule("stricter")
    with pytest.raises(ValueError, match="temperature"):
        resolve_rule("strict", temperature=1)
    with pytest.raises(ValueError, match="posterior_alpha=0"):
        resolve_rule("typical", posterior_alpha=0)
    with pytest.raises(ValueError, match="verifier_accept_k=0"):
        resolve_rule("tolerance", verifier_accept_k=0)
    with pytest.raises(ValueError, match="chains only"):
        resolve_rule("block")(Proposal(torch.tensor([[0]]), None, torch.tensor([-1])), rows([1.0], [1.0]), None)


def test_typical_accepts_above_the_smaller_of_threshold_and_scaled_exp_entropy():
    p = [0.85, 0.08, 0.07]
    entropy = -sum(value * math.log(value + 1e-5) for value in p)
    bound = min(0.09, 0.3 * math.exp(-entropy))
    assert bound > 0.08
    for token, accepted in ((0, 1), (1, 0), (2, 0)):
        result = resolve_rule("typical")(Proposal(torch.tensor([[token]])), rows(p, [0.0, 1.0, 0.0]), None)
        assert result.num_accepted_B.tolist() == [accepted]
        assert result.next_token_B.tolist() == [1 if accepted else 0]  # tokens below the bound are never drawn
    flat = [0.34, 0.33, 0.33]  # bound = 0.3 * exp(-log 3) = 0.1 > 0.09: everything is typical
    result = resolve_rule("typical")(Proposal(torch.tensor([[2]])), rows(flat, [1.0, 0.0, 0.0]), None)
    assert result.num_accepted_B.tolist() == [1]


@pytest.mark.parametrize(
    ("p", "accepted"),
    [
        # sure: exp(-H) is large, the threshold 0.09 decides (0.3 * exp(-0.54) = 0.18 would refuse both)
        ([0.85, 0.095, 0.055], [1, 1, 0]),
        # flat: 0.3 * exp(-H) = 0.3 / 16 decides, below the threshold
        ([1 / 16] * 16, [1] * 16),
        ([0.94 / 15] * 15 + [0.06], [1] * 16),
    ],
)
def test_typical_takes_the_smaller_of_its_two_bounds(p, accepted):
    for token, is_accepted in enumerate(accepted):
        result = resolve_rule("typical")(Proposal(torch.tensor([[token]])), rows(p, p), None)
        assert result.num_accepted_B.tolist() == [is_accepted]


def test_typical_never_emits_a_token_below_the_bound():
    p = [0.05, 0.85, 0.055, 0.045]  # in cumulative order: either end would be drawn by an extreme uniform
    for uniform in (0.0, 0.03, 0.5, 0.97, 1 - 2**-53):
        draws = UniformDraws(torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), uniform, dtype=torch.float64))
        result = resolve_rule("typical")(Proposal(torch.tensor([[0]])), rows(p, p), draws)
        assert (result.num_accepted_B.tolist(), result.next_token_B.tolist()) == ([0], [1])


def test_typical_takes_the_longest_path_and_the_likelier_of_equals():
    parents = torch.tensor([-1, -1, -1, 0, 1])
    tokens = torch.tensor([[0, 1, 2, 1, 1]])
    even, sure = [0.4, 0.5, 0.1], [0.0, 1.0, 0.0]
    target = rows(even, sure, sure, sure, sure, sure)
    result = resolve_rule("typical")(Proposal(tokens, None, parents), target, None)
    assert result.path_BK.tolist() == [[1, 4, -1, -1, -1]]  # as deep as 0 -> 3, and 0.5 * 1 > 0.4 * 1
    shallow = Proposal(torch.tensor([[0, 1, 2, 1, -1]]), None, parents)
    assert resolve_rule("typical")(shallow, target, None).path_BK.tolist() == [[0, 3, -1, -1, -1]]


@pytest.mark.parametrize(
    ("k", "tolerance", "token", "accepted"),
    [
        (1, 0.0, 0, 1),
        (1, 9.0, 1, 0),  # k = 1 is the argmax whatever the tolerance
        (2, 0.0, 1, 0),  # tolerance 0 behaves like k = 1
        (2, 0.5, 1, 1),
        (2, 0.4, 1, 0),
        (2, 9.0, 2, 0),  # third best
        (3, 9.0, 2, 1),
        (3, 9.0, 3, 0),
    ],
)
def test_tolerance_needs_rank_and_gap(k, tolerance, token, accepted):
    logits = rows([3.0, 2.5, 2.0, 2.0], [0.0, 9.0, 0.0, 0.0])
    rule = resolve_rule("tolerance", verifier_accept_k=k, accept_tolerance=tolerance)
    for scores in (logits, logits.log_softmax(-1)):  # scores up to a constant
        result = rule(Proposal(torch.tensor([[token]])), scores, None)
        assert result.num_accepted_B.tolist() == [accepted]
        assert result.next_token_B.tolist() == [1 if accepted else 0]


def test_tolerance_at_its_defaults_is_greedy_on_chains_and_trees():
    generator = torch.Generator().manual_seed(0)
    for parents in (None, torch.tensor([-1, -1, 0, 0])):
        logits = torch.randint(0, 3, (200, 5, 3), generator=generator).float()  # many ties
        proposal = Proposal(torch.randint(-1, 3, (200, 4), generator=generator), None, parents)
        ours, greedy = resolve_rule("tolerance")(proposal, logits, None), resolve_rule("greedy")(proposal, logits, None)
        assert torch.equal(ours.num_accepted_B, greedy.num_accepted_B)
        assert torch.equal(ours.next_token_B, greedy.next_token_B)


def test_synthetic_accepts_at_the_prescribed_rates():
    rates = (0.9, 0.45, 0.45, 0.0)
    target = torch.full((50_000, 5, 3), 1 / 3)
    proposal = Proposal(torch.zeros(50_000, 4, dtype=torch.int64))
    rule = resolve_rule("synthetic", acceptance_rates=rates)
    accepted_B = rule(proposal, target, torch.Generator().manual_seed(0)).num_accepted_B
    for i, rate in enumerate(rates):
        sigma = math.sqrt(rate * (1 - rate) / 50_000)
        assert float((accepted_B > i).double().mean()) == pytest.approx(rate, abs=4 * sigma + 1e-12)
    ended = Proposal(torch.tensor([[0, -1, 0, 0]]))
    assert rule(ended, target[:1], torch.Generator().manual_seed(0)).num_accepted_B <= 1
    with pytest.raises(ValueError, match="5 draft slots but 4"):
        rule(Proposal(torch.zeros(1, 5, dtype=torch.int64)), target[:1], None)
