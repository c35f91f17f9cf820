"""Drafting equals training and the formulas, whatever was accepted before; trees; text of the engine."""

import pytest
import torch
from drafter_toys import VOCAB, Request, check_greedy_text, commit, sampled
from last_state_toys import packed_batch
from medusa_toys import NaiveMedusa
from transformers import LlamaForCausalLM

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.trees.static_tree import StaticTreeProposer
from speculators.decoding.trees.token_tree import MEDUSA_63, TokenTree
from speculators.interfaces import DraftSampling

SIZES = {"max_batch_size": 4, "max_length": 64}


def check(naive, requests, proposal):
    for b, request in enumerate(requests):
        state = request.states[len(request.tokens) - 2]
        for k in range(3):
            q = naive.logits(k, state).softmax(-1).float()
            torch.testing.assert_close(proposal.probs_BKV[b, k], q, atol=1e-5, rtol=1e-4)


def test_every_draft_equals_the_formulas_whatever_was_accepted(make_drafter, verifier):
    model = make_drafter()
    naive, proposer = NaiveMedusa(model), model.make_proposer(verifier, **SIZES)
    requests = [Request(seed, length) for seed, length in enumerate((5, 2, 9))]
    for num_accepted in ((0, 2, 3), (3, 0, 1), (3, 3, 3), (1, 1, 1)):
        proposal = proposer.propose(commit(requests), 3, sampled(3))
        check(naive, requests, proposal)
        for b, request in enumerate(requests):
            request.tokens += [*proposal.token_ids_BK[b, : num_accepted[b]].tolist(), 7]


def test_drafts_equal_the_logits_of_training(make_drafter, verifier):
    model, batch = make_drafter(), packed_batch([12])
    logits = model(**batch)[0]
    assert [x.shape for x in logits] == [(1, 9, VOCAB)] * 3
    proposer = model.make_proposer(verifier, **SIZES)
    for t in (0, 4, 8):
        request = Request(0, 1)
        request.tokens, request.states = batch["input_ids"][0, : t + 2].tolist(), batch["hidden_states"][0]
        proposal = proposer.propose(commit([request]), 3, sampled(1))
        expected = torch.stack([x[0, t].softmax(-1) for x in logits])
        torch.testing.assert_close(proposal.probs_BKV[0], expected, atol=1e-5, rtol=1e-4)


def test_rows_that_wait_are_replaced_or_start_with_one_token(make_drafter, verifier):
    model = make_drafter()
    naive, proposer = NaiveMedusa(model), model.make_proposer(verifier, **SIZES)
    requests = [Request(seed, length) for seed, length in enumerate((6, 30, 3, 1))]
    proposal = proposer.propose(commit(requests), 3, sampled(4))
    assert proposal.token_ids_BK[3].tolist() == [-1, -1, -1]
    check(naive, requests[:3], proposal)
    for request in requests:
        request.tokens += [4, 5]
    proposal = proposer.propose(commit(requests, active=[True, False, True, True]), 3, sampled(4))
    assert proposal.token_ids_BK[1].tolist() == [-1, -1, -1]
    requests[2] = Request(9, 12)
    for b in (0, 1, 3):
        requests[b].tokens += [b]
    check(naive, requests, proposer.propose(commit(requests), 3, sampled(4)))


def test_more_tokens_than_heads_leave_slots_empty_and_fewer_use_the_first_heads(make_drafter, verifier):
    proposer = make_drafter().make_proposer(verifier, **SIZES)
    proposal = proposer.propose(commit([Request(1, 6)]), 5, sampled(1, 0.0))
    assert proposal.token_ids_BK[0, 3:].tolist() == [-1, -1] and proposal.probs_BKV.shape == (1, 5, VOCAB)
    plain = proposer.propose(commit([Request(1, 6)]), 2, DraftSampling(torch.zeros(1)))
    assert plain.probs_BKV is None and torch.equal(plain.token_ids_BK, proposal.token_ids_BK[:, :2])
    assert proposer.propose(commit([Request(1, 6)]), 0, sampled(1)).token_ids_BK.shape == (1, 0)


def test_a_proposer_is_a_snapshot_in_the_verifiers_dtype(make_drafter, verifier):
    model = make_drafter()
    proposer = model.make_proposer(verifier, **SIZES)
    before = proposer.propose(commit([Request(2, 9)]), 3, sampled(1)).probs_BKV
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(proposer.propose(commit([Request(2, 9)]), 3, sampled(1)).probs_BKV, before)
    assert model.make_proposer(verifier.bfloat16(), **SIZES).dtype == torch.bfloat16
    other = LlamaForCausalLM(type(verifier.config)(**{**verifier.config.to_dict(), "vocab_size": 50}))
    with pytest.raises(ValueError, match="use the verifier it was trained for"):
        model.make_proposer(other, **SIZES)


def test_a_tree_has_each_heads_best_tokens_below_all_parents(make_drafter, verifier):
    model = make_drafter()
    naive, request = NaiveMedusa(model), Request(3, 7)
    proposer = StaticTreeProposer(model.make_tree_drafter(verifier, **SIZES), MEDUSA_63)
    proposal = proposer.propose(commit([request]), 3, DraftSampling(torch.zeros(1)))
    paths = [path for path in MEDUSA_63.paths if len(path) <= 3]
    best = [naive.logits(k, request.states[5]).argsort(descending=True).tolist() for k in range(3)]
    assert proposal.token_ids_BK[0].tolist() == [best[len(path) - 1][path[-1]] for path in paths]
    assert proposal.parents_K.tolist() == list(MEDUSA_63.parents[: len(paths)])
    assert proposer.propose(commit([Request(3, 7)]), 0, DraftSampling(torch.zeros(1))).token_ids_BK.shape == (1, 0)


@pytest.mark.parametrize("tree", [None, TokenTree.of([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])])
@pytest.mark.parametrize("random", [True, False])
def test_the_engine_gives_plain_greedy_text(make_drafter, verifier, tree, random):
    model = make_drafter(random)
    proposer = (
        model.make_proposer(verifier, **SIZES)
        if tree is None
        else StaticTreeProposer(model.make_tree_drafter(verifier, **SIZES), tree)
    )
    check_greedy_text(verifier, Engine(verifier, proposer, num_speculative_tokens=3, max_batch_size=2))


def test_the_engine_finds_a_saved_drafter_by_itself(make_drafter, verifier, verifier_path, tmp_path):
    make_drafter(False).save_pretrained(tmp_path)
    engine = Engine(verifier, {"model": str(tmp_path)}, max_batch_size=2)
    engine.generate([[5, 9, 3]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    assert engine.stats.num_drafted > 0 and len(engine.stats.drafted_per_position) <= 3
