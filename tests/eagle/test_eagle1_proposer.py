"""Drafting equals the formulas and drafting from scratch, whatever was accepted; engine and `generate` equal plain."""

import pytest
import torch
from drafter_toys import Request, check_greedy_text, commit, sampled
from eagle1_drafting import PROMPTS, trained
from naive_eagle1 import NaiveEagle

from speculators.decoding import Engine

CASES = {
    "eagle": {},
    "layernorms, qwen3": {"layernorms": True, "fusion_bias": True, "arch": "qwen3"},
    "biases": {"nested": {"attention_bias": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_draft_step_equals_the_training_step_whatever_was_accepted(make_drafter, verifier, case):
    model = make_drafter(**CASES[case])
    proposer = model.make_proposer(verifier, max_batch_size=3, max_length=128)
    requests = [Request(seed, length) for seed, length in enumerate((5, 2, 40))]
    for num_accepted in ((0, 2, 4), (3, 0, 1), (4, 4, 4), (1, 1, 1)):
        proposal = proposer.propose(commit(requests), 4, sampled(3))
        for b, request in enumerate(requests):
            expected = trained(model, request, proposal.token_ids_BK[b].tolist())
            torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=1e-5, rtol=1e-4)
            request.tokens += [*proposal.token_ids_BK[b, : num_accepted[b]].tolist(), 7]


def test_drafts_equal_loops_over_the_formulas(make_drafter, verifier):
    """Independent of the training code: entries on true features, then on predicted ones."""
    model = make_drafter(layernorms=True)
    request = Request(4, 5)
    proposal = model.make_proposer(verifier, max_batch_size=1, max_length=64).propose(commit([request]), 3, sampled(1))
    naive = NaiveEagle(
        model.state_dict(),
        model.config.transformer_layer_config,
        verifier.model.embed_tokens.weight,
        verifier.lm_head.weight,
        verifier.model.norm.weight,
    )
    tokens = [*request.tokens[1:], *proposal.token_ids_BK[0].tolist()]
    features = [naive.feature(state) for state in request.states[:4]]
    entries, q = [], []
    for t in range(6):
        h = naive.entry(tokens[t], features[t])
        entries.append(naive.key_value(h, t))
        if t >= 3:
            features.append(naive.layer(h, t, entries))
            q.append(naive.logits(features[-1]).softmax(-1).float().detach())
    torch.testing.assert_close(proposal.probs_BKV[0], torch.stack(q), atol=1e-5, rtol=1e-4)


def test_rows_that_wait_or_are_replaced_do_not_disturb_each_other(make_drafter, verifier):
    model = make_drafter()
    proposer = model.make_proposer(verifier, max_batch_size=3, max_length=128)
    requests = [Request(seed, length) for seed, length in enumerate((6, 20, 1))]
    proposer.propose(commit(requests), 3, sampled(3))
    requests[0].tokens += [1, 2]
    requests[2].tokens += [3]
    assert proposer.propose(commit(requests, [True, False, True]), 3, sampled(3)).token_ids_BK[1].tolist() == [-1] * 3
    requests[1].tokens += [4, 5, 6]
    requests[2] = Request(9, 12)
    requests[0].tokens += [8]
    proposal = proposer.propose(commit(requests), 3, sampled(3))
    for b, request in enumerate(requests):
        expected = trained(model, request, proposal.token_ids_BK[b].tolist())
        torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=1e-5, rtol=1e-4)


def test_a_proposer_is_a_snapshot_in_the_verifiers_precision(make_drafter, verifier):
    model = make_drafter().bfloat16()
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    before = proposer.propose(commit([Request(0, 6)]), 2, sampled(1)).probs_BKV
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.5)
    assert torch.equal(proposer.propose(commit([Request(0, 6)]), 2, sampled(1)).probs_BKV, before)
    assert proposer.dtype == torch.float32 and model.fusion_fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_verifiers_with_a_random_drafter(make_drafter, verifier, batch_size):
    proposer = make_drafter().make_proposer(verifier, max_batch_size=batch_size, max_length=128)
    engine = Engine(verifier, proposer, num_speculative_tokens=3, max_batch_size=batch_size)
    check_greedy_text(verifier, engine, PROMPTS)


def test_generate_is_the_verifiers_own_greedy_text(make_drafter, verifier):
    model = make_drafter()
    model.attach_verifier(verifier)
    for prompt in PROMPTS[:1] + PROMPTS[3:]:
        ids = torch.tensor([prompt])
        expected = verifier.generate(ids, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(model.generate(ids, max_new_tokens=15, eos_token_id=[]), expected)
        assert torch.equal(model.generate(ids, max_length=len(prompt) + 15, eos_token_id=[]), expected)


def test_generate_takes_left_padded_batches_stops_and_samples(make_drafter, verifier):
    model = make_drafter()
    model.attach_verifier(verifier)
    ids, mask = torch.tensor([[0, 0, 3, 5], [9, 8, 7, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=[])
    alone = model.generate(torch.tensor([[3, 5]]), max_new_tokens=8, eos_token_id=[])
    assert out.shape == (2, 12) and torch.equal(out[0, 4:], alone[0, 2:])
    stop = int(out[1, 6])
    stopped = model.generate(ids[1:], max_new_tokens=8, eos_token_id=stop, pad_token_id=0)
    assert stopped[0, -1] == stop and stop not in stopped[0, 4:-1]
    sampled = [model.generate(ids[1:], max_new_tokens=8, do_sample=True, seed=1, eos_token_id=[]) for _ in range(2)]
    assert torch.equal(*sampled)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(ids, num_beams=2)
