"""Drafting equals training, and equals drafting from scratch, whatever was accepted, rejected or replaced before."""

import pytest
import torch
from drafter_toys import DRAFT_VOCAB, VOCAB, check_greedy_text, check_that_drafts_follow_q, commit, draft_maps, sampled
from naive_peagle import NaivePEagle
from peagle_toys import request

from speculators.decoding import Engine
from speculators.interfaces import DraftSampling
from speculators.models.peagle.training import Chains, Supervision, run_elements
from speculators.nn.routes import DENSE

CASES = {
    "qwen3": {},
    "llama, all tokens": {"arch": "llama", "draft_vocab_size": VOCAB},
    "fc_norm, ignored norm_output": {"norm_output": True, "fc_norm": True},
    "two layers": {"num_layers": 2, "norm_before_fc": True, "norm_before_residual": True},
    "sliding window": {"nested": {"layer_types": ["sliding_attention"], "sliding_window": 4}},
    "two layers, one sliding": {
        "num_layers": 2,
        "nested": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
    },
}


def over_verifier(logits):
    probs = torch.zeros(len(logits), VOCAB)
    kept = draft_maps()[0].nonzero().flatten() if logits.shape[1] == DRAFT_VOCAB else torch.arange(VOCAB)
    probs[:, kept] = logits.softmax(-1).float()
    return probs


def trained(model, sequence, num_tokens):
    """q of each draft by the training forward: the last column and the chain that hangs on it."""
    last = len(sequence.tokens) - 2
    batch = model.packed_batch(sequence.states[None, : last + 1], torch.tensor([sequence.tokens[1:]]))
    depths = torch.arange(1, num_tokens)
    chains = Chains(torch.full_like(depths, last), depths)
    column = torch.tensor([last])
    supervision = Supervision(column, chains, column, column, column)  # what is answered; targets are not looked at
    with torch.no_grad():
        return over_verifier(model.lm_head(run_elements(model.network, batch, supervision, DENSE)))


@pytest.mark.parametrize("case", CASES)
def test_every_draft_equals_the_training_forward_whatever_was_accepted(make_drafter, verifier, case):
    """Rows of different lengths, four rounds, every pattern of acceptance from none to all."""
    model = make_drafter(**CASES[case])
    proposer = model.make_proposer(verifier, max_batch_size=3, max_length=128)
    sequences = [request(seed, length) for seed, length in enumerate((5, 2, 9))]
    for num_accepted in ((0, 2, 4), (3, 0, 1), (4, 4, 4), (1, 1, 1)):
        proposal = proposer.propose(commit(sequences), 4, sampled(3))
        for b, sequence in enumerate(sequences):
            expected = trained(model, sequence, 4)
            torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=1e-5, rtol=1e-4)
        for b, sequence in enumerate(sequences):
            sequence.tokens += [*proposal.token_ids_BK[b, : num_accepted[b]].tolist(), 7]


def test_drafts_equal_loops_over_the_formulas(make_drafter, verifier):
    """Independent of the training code: one row, K = 4."""
    model = make_drafter(num_layers=2, fc_norm=True)
    sequence = request(4, 6)
    proposal = model.make_proposer(verifier, max_batch_size=1, max_length=64).propose(commit([sequence]), 4, sampled(1))
    batch = {
        "input_ids": torch.tensor([sequence.tokens[1:]]),
        "document_ids": torch.zeros(1, 5, dtype=torch.int64),
        "hidden_states": sequence.states[None, :5],
    }
    slots = [(4, 1), (4, 2), (4, 3)]
    logits = NaivePEagle(model.state_dict(), model.config).logits(batch, slots)
    expected = over_verifier(torch.stack([logits[element].detach() for element in [(4, 0), *slots]]))
    torch.testing.assert_close(proposal.probs_BKV[0], expected, atol=1e-5, rtol=1e-4)


def test_rows_alone_and_rows_of_equal_length_take_their_own_paths_to_the_same_drafts(make_drafter, verifier):
    """A long prompt beside short commits is read alone; rows of equal counts go through slices."""
    model = make_drafter(num_layers=2)
    proposer = model.make_proposer(verifier, max_batch_size=2, max_length=128)
    sequences = [request(0, 6), request(1, 6)]
    for grown in ([3], [3, 4]):
        proposal = proposer.propose(commit(sequences), 3, sampled(2))
        for b, sequence in enumerate(sequences):
            torch.testing.assert_close(proposal.probs_BKV[b], trained(model, sequence, 3), atol=1e-5, rtol=1e-4)
            sequence.tokens += grown
    sequences[1] = request(5, 60)
    proposal = proposer.propose(commit(sequences), 3, sampled(2))
    for b, sequence in enumerate(sequences):
        torch.testing.assert_close(proposal.probs_BKV[b], trained(model, sequence, 3), atol=1e-5, rtol=1e-4)


def test_rows_that_wait_or_are_replaced_do_not_disturb_each_other(make_drafter, verifier):
    model = make_drafter()
    proposer = model.make_proposer(verifier, max_batch_size=3, max_length=128)
    sequences = [request(seed, length) for seed, length in enumerate((6, 40, 3))]
    proposer.propose(commit(sequences), 3, sampled(3))
    sequences[0].tokens += [1, 2]
    sequences[2].tokens += [3]
    proposal = proposer.propose(commit(sequences, active=[True, False, True]), 3, sampled(3))
    assert proposal.token_ids_BK[1].tolist() == [-1, -1, -1]
    sequences[1].tokens += [4, 5, 6]  # back after a pause
    sequences[2] = request(9, 12)  # another request in row 2
    sequences[0].tokens += [8]
    proposal = proposer.propose(commit(sequences), 3, sampled(3))
    for b, sequence in enumerate(sequences):
        torch.testing.assert_close(proposal.probs_BKV[b], trained(model, sequence, 3), atol=1e-5, rtol=1e-4)


def test_any_number_of_tokens_may_be_asked(make_drafter, verifier):
    model = make_drafter()
    proposer = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    sequences = [request(0, 6), request(1, 3)]
    assert proposer.propose(commit(sequences), 0, sampled(2)).token_ids_BK.shape == (2, 0)
    for num_tokens in (1, 6, 2):
        for sequence in sequences:
            sequence.tokens += [num_tokens]
        proposal = proposer.propose(commit(sequences), num_tokens, sampled(2))
        for b, sequence in enumerate(sequences):
            expected = trained(model, sequence, num_tokens)
            torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=1e-5, rtol=1e-4)


def test_a_request_of_one_token_gets_no_draft(make_drafter, verifier):
    """It has no entry yet: the state that its first draft needs comes with the second token."""
    model = make_drafter()
    proposer = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    alone = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    assert alone.propose(commit([request(0, 1)]), 2, sampled(1)).token_ids_BK.tolist() == [[-1, -1]]
    sequences = [request(0, 1), request(1, 4)]
    assert proposer.propose(commit(sequences), 2, sampled(2)).token_ids_BK[0].tolist() == [-1, -1]
    for sequence in sequences:
        sequence.tokens += [5]
    proposal = proposer.propose(commit(sequences), 2, sampled(2))
    for b, sequence in enumerate(sequences):
        torch.testing.assert_close(proposal.probs_BKV[b], trained(model, sequence, 2), atol=1e-5, rtol=1e-4)


def test_greedy_drafts_are_the_argmax_of_q_and_ids_of_the_verifier(make_drafter, verifier):
    model = make_drafter()
    q = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    greedy = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    committed = commit([request(0, 8), request(1, 8)])
    cold = q.propose(committed, 4, sampled(2, temperature=0.0))
    plain = greedy.propose(committed, 4, DraftSampling(torch.zeros(2)))
    assert plain.probs_BKV is None and draft_maps()[0][plain.token_ids_BK].all()
    assert torch.equal(plain.token_ids_BK, cold.token_ids_BK)
    assert torch.equal(cold.probs_BKV, torch.nn.functional.one_hot(cold.token_ids_BK, VOCAB).float())


def test_drafts_are_drawn_from_q(make_drafter, verifier):
    proposer = make_drafter().make_proposer(verifier, max_batch_size=2000, max_length=16)
    check_that_drafts_follow_q(proposer, request(0, 4), num_tokens=2)


def test_a_proposer_is_a_snapshot_and_drafts_in_the_verifiers_precision(make_drafter, verifier):
    model = make_drafter()
    old = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    before = old.propose(commit([request(0, 6)]), 3, sampled(1)).probs_BKV
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(-1.5)
    assert torch.equal(old.propose(commit([request(0, 6)]), 3, sampled(1)).probs_BKV, before)
    narrow = make_drafter().bfloat16()
    proposer = narrow.make_proposer(verifier, max_batch_size=1, max_length=64)
    assert proposer.dtype == torch.float32 and narrow.fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_verifiers_with_a_random_drafter(make_drafter, verifier, batch_size):
    prompts = [[3, 5, 7], [11] * 45, [2], [9, 8, 7, 6, 5, 4]]
    proposer = make_drafter(num_layers=2).make_proposer(verifier, max_batch_size=batch_size, max_length=128)
    engine = Engine(verifier, proposer, num_speculative_tokens=4, max_batch_size=batch_size)
    check_greedy_text(verifier, engine, prompts)
