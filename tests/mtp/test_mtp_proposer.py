"""Drafting equals the formulas, and drafting from scratch, whatever was accepted, rejected or replaced before."""

import pytest
import torch
from drafter_toys import Request, check_greedy_text, commit, sampled
from mtp_naive import naive_of
from mtp_toys import packed_batch
from transformers import LlamaForCausalLM

from speculators.decoding import Engine
from speculators.interfaces import CaptureSpec

ARCHS = ["llama", "qwen3", "qwen2"]


def check(naive, requests, proposal, rows=None):
    for b, request in enumerate(requests):
        if rows is None or b in rows:
            expected = naive.draft_probs(request.tokens, request.states, proposal.token_ids_BK[b].tolist())
            torch.testing.assert_close(proposal.probs_BKV[b].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_every_draft_step_equals_the_formulas_whatever_was_accepted(drafter, verifier, arch):
    """Rows of different lengths, four rounds, every pattern of acceptance from none to all."""
    model, target = drafter(arch), verifier(arch)
    naive = naive_of(model, target)
    proposer = model.make_proposer(target, max_batch_size=3, max_length=128)
    requests = [Request(seed, length) for seed, length in enumerate((5, 2, 9))]
    for num_accepted in ((0, 2, 4), (3, 0, 1), (4, 4, 4), (1, 1, 1)):
        proposal = proposer.propose(commit(requests), 4, sampled(3))
        check(naive, requests, proposal)
        for b, request in enumerate(requests):
            request.tokens += [*proposal.token_ids_BK[b, : num_accepted[b]].tolist(), 7]


@torch.no_grad()
def test_rows_that_wait_are_replaced_or_start_with_one_token_do_not_disturb_each_other(drafter, verifier):
    model, target = drafter("qwen2"), verifier("qwen2")
    naive = naive_of(model, target)
    proposer = model.make_proposer(target, max_batch_size=4, max_length=4)
    requests = [Request(seed, length) for seed, length in enumerate((6, 40, 3, 1))]
    proposal = proposer.propose(commit(requests), 3, sampled(4))
    assert proposal.token_ids_BK[3].tolist() == [-1, -1, -1]  # one token has no state behind it
    check(naive, requests, proposal, rows=[0, 1, 2])
    requests[0].tokens += [1, 2]
    requests[2].tokens += [3]
    requests[3].tokens += [4]
    proposal = proposer.propose(commit(requests, active=[True, False, True, True]), 3, sampled(4))
    assert proposal.token_ids_BK[1].tolist() == [-1, -1, -1]
    check(naive, requests, proposal, rows=[0, 2, 3])
    requests[1].tokens += [4, 5, 6]  # back after a pause
    requests[2] = Request(9, 12)  # another request in row 2
    requests[0].tokens += [8]
    requests[3].tokens += [*range(35)]
    check(naive, requests, proposer.propose(commit(requests), 3, sampled(4)))


@torch.no_grad()
def test_the_first_draft_equals_the_logits_of_training(drafter, verifier):
    """Step 0 of training at column t is the first draft after t + 2 tokens. (Later steps differ by design: training
    gives each step keys of its own, decoding keeps those of step 0.)"""
    model, target = drafter("qwen2"), verifier("qwen2")
    batch = packed_batch([12], supervised=2.0)
    logits, _, _ = model(**batch)
    proposer = model.make_proposer(target, max_batch_size=1, max_length=64)
    for length in (2, 5, 8):
        request = Request(0, length)
        request.tokens, request.states = batch["input_ids"][0, :length].tolist(), batch["hidden_states"][0]
        probs_BKV = proposer.propose(commit([request]), 1, sampled(1)).probs_BKV
        torch.testing.assert_close(probs_BKV[0, 0], logits[0][0, length - 2].softmax(0), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_greedy_rows_and_temperatures(drafter, verifier):
    proposer = drafter().make_proposer(verifier(), max_batch_size=2, max_length=64)
    greedy = sampled(2, 0.0)
    first = proposer.propose(commit([Request(1, 6), Request(2, 6)]), 3, greedy)
    assert torch.equal(first.probs_BKV.argmax(-1), first.token_ids_BK) and first.probs_BKV.max() == 1
    assert proposer.propose(commit([Request(1, 6), Request(2, 6)]), 0, greedy).token_ids_BK.shape == (2, 0)


@torch.no_grad()
def test_a_proposer_is_a_snapshot_in_the_verifiers_dtype(drafter, verifier):
    model, target = drafter(), verifier()
    proposer = model.make_proposer(target, max_batch_size=1, max_length=64)
    before = proposer.propose(commit([Request(2, 9)]), 3, sampled(1)).probs_BKV
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    assert torch.equal(proposer.propose(commit([Request(2, 9)]), 3, sampled(1)).probs_BKV, before)
    wide = model.make_proposer(target.double(), max_batch_size=1, max_length=64)
    assert wide.dtype == torch.float64 and model.mtp_layers[0].input_proj.weight.dtype == torch.float32
    assert wide.capture == CaptureSpec(last_hidden=True) == model.capture


def test_a_verifier_of_another_shape_is_refused(drafter, verifier):
    other = LlamaForCausalLM(type(verifier().config)(**{**verifier().config.to_dict(), "vocab_size": 50}))
    with pytest.raises(ValueError, match="use the verifier it was trained for"):
        drafter().make_proposer(other, max_batch_size=1, max_length=8)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_engine_gives_plain_greedy_text(drafter, verifier, arch):
    target = verifier(arch)
    proposer = drafter(arch).make_proposer(target, max_batch_size=2, max_length=64)
    check_greedy_text(target, Engine(target, proposer, num_speculative_tokens=3, max_batch_size=2))
