"""The steps of a round on the host, by hand. Token 0 is a token like any other: only -1 means no draft."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.adaptive import AdaptiveLength
from speculators.decoding.request import ActiveRequest, RequestOutput
from speculators.decoding.round import Verified, on_host, to_score
from speculators.decoding.rows import Batch
from speculators.interfaces import Proposal, Verification

V = 4


def zeros_forever() -> toys.MarkovVerifier:
    """A verifier whose text is 0, 0, 0, ..."""
    probs_VV = torch.full((V, V), 1e-9)
    probs_VV[:, 0] = 1.0
    return toys.MarkovVerifier(probs_VV / probs_VV.sum(-1, keepdim=True))


def test_a_draft_of_token_0_is_offered_and_accepted():
    proposal = Proposal(torch.tensor([[0, 0, -1], [0, -1, -1], [-1, -1, -1]]))
    path_BK = torch.tensor([[0, 1, -1], [-1, -1, -1], [-1, -1, -1]])
    verification = Verification(path_BK, torch.tensor([2, 0, 0]), torch.tensor([0, 3, 0]))
    accepted = on_host(Verified(verification, torch.ones(3, 4, dtype=torch.bool)), proposal, rows=range(3))
    assert accepted.offered_by_row == {0: (2, 2), 1: (1, 1), 2: (0, 0)}
    assert accepted.token_ids_by_row == {0: [0, 0, 0], 1: [3], 2: [0]}
    assert accepted.columns_by_row == {0: [0, 1, 2], 1: [0], 2: [0]}


def test_a_tree_with_token_0_in_it_is_as_deep_as_it_is():
    proposal = Proposal(torch.tensor([[0, 1, 0], [2, -1, -1]]), parents_K=torch.tensor([-1, -1, 0]))
    verification = Verification(torch.tensor([[0, 2, -1], [-1, -1, -1]]), torch.tensor([2, 0]), torch.tensor([1, 1]))
    accepted = on_host(Verified(verification, torch.ones(2, 4, dtype=torch.bool)), proposal, rows=range(2))
    assert accepted.offered_by_row == {0: (3, 2), 1: (1, 1)}
    assert accepted.token_ids_by_row == {0: [0, 0, 1], 1: [1]}


def test_drafts_of_token_0_are_scored():
    request = ActiveRequest(0, SamplingParams(), 0, frozenset(), 64, RequestOutput([2], [3]), None, num_prefilled=1)
    batch = Batch([request], 1, V, torch.device("cpu"))
    batch.admit()
    token_ids_BT, num_valid_B = to_score(batch, Proposal(torch.tensor([[0, 0, -1]])))
    # the empty slot repeats the last token
    assert token_ids_BT.tolist() == [[3, 0, 0, 3]] and num_valid_B.tolist() == [3]


def test_states_that_no_request_waits_for_are_not_kept():
    requests = [
        ActiveRequest(i, SamplingParams(), 0, frozenset(), 64, RequestOutput([2], [3]), None, num_prefilled=1)
        for i in range(2)
    ]
    batch = Batch(requests, 2, V, torch.device("cpu"))
    batch.admit()
    states_BTD = torch.ones(2, 1, 4)
    kept = weakref.ref(states_BTD)
    batch.publish({0: [3], 1: [3]}, states_BTD)  # a round of an engine that drafts nothing when it is busy
    del states_BTD
    batch.release(0)
    assert kept() is not None
    batch.release(1)
    assert kept() is None


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_statistics_count_drafts_of_token_0(num_tokens):
    proposer = toys.ScriptedProposer(lambda text, num: [0] * num)
    engine = Engine(zeros_forever(), proposer, num_speculative_tokens=num_tokens)
    stats = engine.generate([[1]], SamplingParams(max_tokens=1 + 2 * (num_tokens + 1)))[0].stats
    assert stats.rounds == Counter({(num_tokens, num_tokens, num_tokens): 2})
    assert (stats.num_drafts, stats.num_drafted, stats.num_accepted) == (2, 2 * num_tokens, 2 * num_tokens)
    assert stats.acceptance_length == stats.acceptance_length_when_drafted == num_tokens + 1
    assert stats.drafted_per_position == stats.accepted_per_position == [2] * num_tokens


def test_the_adaptive_length_sees_drafts_of_token_0():
    controller = AdaptiveLength(2)
    while controller.num_tokens(1) != 2 or controller.is_probe:
        controller.observe([controller.num_requested], [controller.num_requested], verify_s=1.0, other_s=0.01)
    full = Proposal(torch.tensor([[0, 0]]))
    assert controller.shorten(full) is full
