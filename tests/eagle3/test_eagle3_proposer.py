"""Drafting equals training, and equals drafting from scratch, whatever was accepted, rejected or replaced before."""

import pytest
import torch
from drafter_toys import DRAFT_VOCAB, HIDDEN, VOCAB, check_that_drafts_follow_q, commit, draft_maps, sampled
from eagle3_toys import NUM_AUX, request

from speculators.interfaces import DraftSampling
from speculators.models.eagle3.training import unroll
from speculators.nn.routes import DENSE

CASES = {
    "llama": {},
    "qwen3, all tokens": {"arch": "qwen3", "draft_vocab_size": VOCAB},
    "norm_output, fc_norm": {"norm_output": True, "fc_norm": True, "norm_before_residual": False},
    "two layers": {"num_layers": 2, "norm_before_fc": True},
    "sliding window": {"nested": {"layer_types": ["sliding_attention"], "sliding_window": 4}},
    "two layers, one sliding": {
        "num_layers": 2,
        "nested": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
    },
}


def from_scratch(model, verifier, sequence, proposal, row):
    """q of each slot of `row`, were it drafted alone by a proposer that never saw anything else.

    The drafts are forced by committing them: slot k is the first draft after the sequence and k fed-back states, so it
    is compared through the training forward, which needs no cache at all."""
    drafts = proposal.token_ids_BK[row].tolist()
    tokens = torch.tensor([*sequence.tokens[1:], *drafts])[None]
    states = torch.zeros(1, tokens.shape[1], NUM_AUX * HIDDEN)
    column = len(sequence.tokens) - 2
    states[0, : column + 1] = sequence.states[: column + 1]
    batch = model.packed_batch(states, tokens)
    model.config.transformer_layer_config._attn_implementation = "eager"
    with torch.no_grad():
        steps = unroll(model.network, batch, torch.arange(tokens.shape[1]), len(drafts), DENSE)
        logits = model.lm_head(torch.stack([normed_TH[column] for normed_TH in steps]))
    probs = torch.zeros(len(drafts), VOCAB)
    kept = draft_maps()[0].nonzero().flatten() if logits.shape[1] == DRAFT_VOCAB else torch.arange(VOCAB)
    probs[:, kept] = logits.softmax(-1)
    return probs


@pytest.mark.parametrize("case", CASES)
def test_every_draft_step_equals_the_training_step_whatever_was_accepted(make_drafter, verifier, case):
    """Rows of different lengths, four rounds, every pattern of acceptance from none to all."""
    model = make_drafter(**CASES[case])
    proposer = model.make_proposer(verifier, max_batch_size=3, max_length=128)
    sequences = [request(seed, length) for seed, length in enumerate((5, 2, 9))]
    for num_accepted in ((0, 2, 4), (3, 0, 1), (4, 4, 4), (1, 1, 1)):
        proposal = proposer.propose(commit(sequences), 4, sampled(3))
        for b, sequence in enumerate(sequences):
            expected = from_scratch(model, verifier, sequence, proposal, b)
            torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=1e-5, rtol=1e-4)
        for b, sequence in enumerate(sequences):
            sequence.tokens += [*proposal.token_ids_BK[b, : num_accepted[b]].tolist(), 7]


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
        expected = from_scratch(model, verifier, sequence, proposal, b)
        torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=1e-5, rtol=1e-4)


def test_a_cache_that_grows_keeps_what_it_held(make_drafter, verifier):
    model = make_drafter()
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=4)
    sequence = request(0, 3)
    rounds = 0
    while proposer.cache.capacity < 300:
        proposal = proposer.propose(commit([sequence]), 2, sampled(1))
        sequence.tokens += [rounds % VOCAB] * 60
        sequence.states = torch.cat([sequence.states, sequence.states])
        rounds += 1
    proposal = proposer.propose(commit([sequence]), 2, sampled(1))
    expected = from_scratch(model, verifier, sequence, proposal, 0)
    torch.testing.assert_close(proposal.probs_BKV[0], expected, atol=1e-5, rtol=1e-4)


def test_greedy_drafts_are_the_argmax_of_q_and_a_point_mass(make_drafter, verifier):
    model = make_drafter()
    q = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    greedy = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    pair = [request(0, 8), request(1, 8)]
    committed = commit(pair)
    cold = q.propose(committed, 4, sampled(2, temperature=0.0))
    plain = greedy.propose(committed, 4, DraftSampling(torch.zeros(2)))
    assert plain.probs_BKV is None
    assert torch.equal(plain.token_ids_BK, cold.token_ids_BK)
    one_hot = torch.nn.functional.one_hot(cold.token_ids_BK, VOCAB).float()
    assert torch.equal(cold.probs_BKV, one_hot)


def test_drafts_are_drawn_from_q(make_drafter, verifier):
    proposer = make_drafter().make_proposer(verifier, max_batch_size=2000, max_length=16)
    check_that_drafts_follow_q(proposer, request(0, 4), num_tokens=1)


def test_drafts_are_ids_of_the_verifier(make_drafter, verifier):
    """Only kept ids are drafted, and each is the verifier's id of the draft id: nonzero(t2d)[draft id]."""
    model = make_drafter()
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    t2d, _ = draft_maps()
    for seed in range(10):
        proposal = proposer.propose(commit([request(seed, 5)]), 5, DraftSampling(torch.zeros(1)))
        assert t2d[proposal.token_ids_BK].all()


def test_a_request_of_one_token_gets_no_draft(make_drafter, verifier):
    """It has no entry yet: the state that its first draft needs comes with the second token."""
    model = make_drafter()
    proposer = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    sequences = [request(0, 1), request(1, 4)]
    proposal = proposer.propose(commit(sequences), 2, sampled(2))
    assert proposal.token_ids_BK[0].tolist() == [-1, -1]
    sequences[0].tokens += [5]
    sequences[1].tokens += [6]
    proposal = proposer.propose(commit(sequences), 2, sampled(2))
    for b in range(2):
        expected = from_scratch(model, verifier, sequences[b], proposal, b)
        torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=1e-5, rtol=1e-4)


def test_no_tokens_asked_still_takes_the_commit_in(make_drafter, verifier):
    model = make_drafter()
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    sequence = request(0, 6)
    assert proposer.propose(commit([sequence]), 0, sampled(1)).token_ids_BK.shape == (1, 0)
    sequence.tokens += [3]
    proposal = proposer.propose(commit([sequence]), 2, sampled(1))
    expected = from_scratch(model, verifier, sequence, proposal, 0)
    torch.testing.assert_close(proposal.probs_BKV[0], expected, atol=1e-5, rtol=1e-4)


def test_a_proposer_is_a_snapshot(make_drafter, verifier):
    """Training on does not change drafts half way through; a new proposer sees the new weights."""
    model = make_drafter()
    old = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    before = old.propose(commit([request(0, 6)]), 2, sampled(1)).probs_BKV
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(-1.5)
    new = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    assert torch.equal(old.propose(commit([request(0, 6)]), 2, sampled(1)).probs_BKV, before)
    assert (new.propose(commit([request(0, 6)]), 2, sampled(1)).probs_BKV - before).abs().max() > 1e-3


def test_a_bf16_checkpoint_drafts_in_the_verifiers_precision(make_drafter, verifier):
    model = make_drafter().bfloat16()
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    assert proposer.dtype == torch.float32
    assert model.fc.weight.dtype == torch.bfloat16
    wide = make_drafter().bfloat16().float()
    sequence = request(0, 6)
    proposal = proposer.propose(commit([sequence]), 3, sampled(1))
    expected = from_scratch(wide, verifier, sequence, proposal, 0)
    torch.testing.assert_close(proposal.probs_BKV[0], expected, atol=1e-5, rtol=1e-4)


def test_another_verifier_is_refused(make_drafter):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"\(50, 16\).*\(40, 16\)"):
        make_drafter().make_proposer(other, max_batch_size=1, max_length=8)
