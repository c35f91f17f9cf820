"""Drafting equals training, and equals drafting from scratch, whatever was accepted, rejected or replaced before."""

import dataclasses

import pytest
import torch
from dflash_toys import MIXED, SLIDING, BlockRequest
from drafter_toys import DRAFT_VOCAB, VOCAB, check_greedy_text, commit, draft_maps, sampled
from transformers import LlamaForCausalLM

from speculators.decoding import Engine
from speculators.interfaces import DraftSampling
from speculators.models.dflash.training import fill_sampled_blocks

CASES = {
    "full": {},
    "all tokens, from the anchor": {"draft_vocab_size": VOCAB, "sample_from_anchor": True},
    "sliding, causal": SLIDING,
    "sliding, not causal": {**SLIDING, "sliding_window_non_causal": True},
    "mixed": {**MIXED, "sample_from_anchor": True},
}


@pytest.fixture(scope="module")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


def trained_probs(model, request, num_drafts):
    """q of a block anchored at the request's last token, [K, V], by the training forward on the reference route."""
    batch = request.as_batch([0] * num_drafts)
    model.config.transformer_layer_config._attn_implementation = "eager"
    row, args = model.packed_batch(**batch), model.loss_args({"max_anchors": 100})
    with torch.no_grad():
        filled = fill_sampled_blocks(model.network, row, args)
        block = filled.blocks.anchors_P.tolist().index(len(request.tokens) - 1)
        logits = model.lm_head(filled.hidden_PSH[block, model.config.first_slot :])
    probs = torch.zeros(num_drafts, VOCAB)
    kept = draft_maps()[0].nonzero().flatten() if logits.shape[1] == DRAFT_VOCAB else torch.arange(VOCAB)
    probs[:, kept] = logits.softmax(-1)
    return probs


@pytest.mark.parametrize("case", CASES)
def test_drafts_equal_the_training_forward_whatever_was_accepted(drafter, verifier, case):
    """Three ragged rows, random numbers of accepted drafts, a row that pauses, a row that gets a new request."""
    model = drafter(**CASES[case])
    proposer = model.make_proposer(verifier, max_batch_size=4, max_length=64)
    num_drafts = model.config.num_drafts
    requests = [BlockRequest(1, 1), BlockRequest(2, 9), BlockRequest(3, 17)]
    random = torch.Generator().manual_seed(7)
    for step in range(6):
        active = [step != 3, True, True]
        proposal = proposer.propose(commit(requests, active), num_drafts, sampled(3, seed=step))
        for b, request in enumerate(requests):
            drafts = proposal.token_ids_BK[b].tolist()
            if not active[b]:
                assert drafts == [-1] * num_drafts
                continue
            expected = trained_probs(model, request, num_drafts)
            torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=2e-6, rtol=1e-4)
            assert all(expected[k, token] > 0 for k, token in enumerate(drafts))
            num_accepted = int(torch.randint(0, num_drafts + 1, (), generator=random))
            request.tokens += [*drafts[:num_accepted], int(torch.randint(0, VOCAB, (), generator=random))]
        if step == 4:
            requests[1] = BlockRequest(8, 5)


def test_fewer_drafts_than_a_block_are_the_causal_blocks_first_ones(drafter, verifier):
    model = drafter(**SLIDING)
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    request = BlockRequest(2, 9)
    expected = trained_probs(model, request, 3)[:2]
    proposal = proposer.propose(commit([request]), 2, sampled(1))
    torch.testing.assert_close(proposal.probs_BKV[0], expected, atol=2e-6, rtol=1e-4)
    request.tokens.append(1)
    assert proposer.propose(commit([request]), 0, sampled(1)).token_ids_BK.shape == (1, 0)


def test_greedy_drafts_are_the_most_likely_ones_in_verifier_ids(drafter, verifier):
    model, request = drafter(), BlockRequest(2, 9)
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    committed = commit([request])
    proposal = proposer.propose(committed, 3, DraftSampling(torch.zeros(1)))
    assert proposal.probs_BKV is None
    assert proposal.token_ids_BK[0].tolist() == trained_probs(model, request, 3).argmax(-1).tolist()
    cold = proposer.propose(committed, 3, dataclasses.replace(sampled(1), temperature_B=torch.zeros(1)))
    assert cold.token_ids_BK.equal(proposal.token_ids_BK) and bool((cold.probs_BKV.max(-1).values == 1).all())


def test_drafts_follow_q(drafter, verifier):
    """4000 rows of the same request: frequencies within 5 standard deviations of q."""
    model = drafter()
    num_rows = 4000
    proposer = model.make_proposer(verifier, max_batch_size=num_rows, max_length=8)
    proposal = proposer.propose(commit([BlockRequest(2, 4) for _ in range(num_rows)]), 3, sampled(num_rows))
    q = proposal.probs_BKV[0]
    for k in range(3):
        seen = proposal.token_ids_BK[:, k].bincount(minlength=VOCAB) / num_rows
        assert bool(((seen - q[k]).abs() <= 5 * (q[k] * (1 - q[k]) / num_rows).sqrt() + 1e-9).all())


def test_the_proposer_is_a_snapshot(drafter, verifier):
    model = drafter()
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    committed = commit([BlockRequest(2, 9)])
    before = proposer.propose(committed, 3, sampled(1)).probs_BKV
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    assert torch.equal(proposer.propose(committed, 3, sampled(1)).probs_BKV, before)


def test_a_verifier_of_another_shape_is_refused(drafter, verifier):
    model = drafter()
    other = LlamaForCausalLM(type(verifier.config)(**{**verifier.config.to_dict(), "vocab_size": 50}))
    with pytest.raises(ValueError, match="use the verifier it was trained for"):
        model.make_proposer(other, max_batch_size=1, max_length=8)


@pytest.mark.parametrize("case", CASES)
def test_the_engine_gives_plain_greedy_text(drafter, verifier, case):
    model = drafter(**CASES[case])
    proposer = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    engine = Engine(verifier, proposer, num_speculative_tokens=model.config.num_drafts, max_batch_size=2)
    check_greedy_text(verifier, engine)
