"""Drafting equals the formulas and training, whatever was accepted before; text of the engine."""

import pytest
import torch
from drafter_toys import VOCAB, Request, check_greedy_text, commit, sampled
from last_state_toys import packed_batch
from mlp_toys import NaiveMLP

from speculators.decoding import Engine
from speculators.interfaces import DraftSampling

SIZES = {"max_batch_size": 4, "max_length": 64}


def check(naive, requests, proposal):
    for b, request in enumerate(requests):
        state, tokens = request.states[len(request.tokens) - 2], request.tokens[-1:]
        for k in range(3):
            q = naive.logits(k, state, tokens).softmax(-1).float()
            torch.testing.assert_close(proposal.probs_BKV[b, k], q, atol=1e-5, rtol=1e-4)
            tokens = [*tokens, int(proposal.token_ids_BK[b, k])]


@pytest.mark.parametrize("arguments", [{}, {"tie_weights": False, "scale_input": True}])
def test_every_draft_equals_the_formulas_whatever_was_accepted(make_drafter, verifier, arguments):
    model = make_drafter(**arguments)
    naive, proposer = NaiveMLP(model), model.make_proposer(verifier, **SIZES)
    requests = [Request(seed, length) for seed, length in enumerate((5, 2, 9))]
    for num_accepted in ((0, 2, 3), (3, 0, 1), (3, 3, 3), (1, 1, 1)):
        proposal = proposer.propose(commit(requests), 3, sampled(3))
        check(naive, requests, proposal)
        for b, request in enumerate(requests):
            request.tokens += [*proposal.token_ids_BK[b, : num_accepted[b]].tolist(), 7]
    requests[1] = Request(9, 12)
    for b in (0, 2):
        requests[b].tokens += [b]
    check(naive, requests, proposer.propose(commit(requests), 3, sampled(3)))


def test_drafts_equal_the_logits_of_training_on_the_drafted_text(make_drafter, verifier):
    model, batch = make_drafter(), packed_batch([12])
    request = Request(0, 1)
    request.tokens, request.states = batch["input_ids"][0, :6].tolist(), batch["hidden_states"][0]
    proposal = model.make_proposer(verifier, **SIZES).propose(commit([request]), 3, sampled(1))
    batch["input_ids"][0, 6:9] = proposal.token_ids_BK[0]
    logits = model(**batch)[0]
    assert [x.shape for x in logits] == [(1, 9, VOCAB)] * 3
    expected = torch.stack([x[0, 4].softmax(-1) for x in logits])
    torch.testing.assert_close(proposal.probs_BKV[0], expected, atol=1e-5, rtol=1e-4)


def test_greedy_rows_and_a_request_of_one_token(make_drafter, verifier):
    proposer = make_drafter().make_proposer(verifier, **SIZES)
    cold = proposer.propose(commit([Request(1, 6), Request(2, 1)]), 4, sampled(2, 0.0))
    plain = proposer.propose(commit([Request(1, 6), Request(2, 1)]), 4, DraftSampling(torch.zeros(2)))
    assert plain.probs_BKV is None and torch.equal(plain.token_ids_BK, cold.token_ids_BK)
    assert cold.token_ids_BK[0, 3] == -1 and cold.token_ids_BK[1].tolist() == [-1] * 4


@pytest.mark.parametrize("random", [True, False])
def test_the_engine_gives_plain_greedy_text(make_drafter, verifier, tmp_path, random):
    make_drafter(random).save_pretrained(tmp_path)
    check_greedy_text(verifier, Engine(verifier, {"model": str(tmp_path)}, max_batch_size=2))
