"""Drafting equals training with the drafts as true tokens, whatever was accepted before; confidence; greedy text."""

import pytest
import torch
from dflash_toys import MIXED, BlockRequest
from drafter_toys import DRAFT_VOCAB, VOCAB, check_greedy_text, commit, draft_maps, sampled
from transformers import LlamaForCausalLM

from speculators.decoding import Engine
from speculators.interfaces import DraftSampling
from speculators.models.dflash.training import fill_sampled_blocks
from speculators.models.dspark.training import markov_features

CASES = {
    "vanilla": {},
    "gated, all tokens": {"markov_head_type": "gated", "draft_vocab_size": VOCAB},
    "rnn, anchor slot unused": {"markov_head_type": "rnn", "sample_from_anchor": False},
    "rnn, mixed layers": {**MIXED, "markov_head_type": "rnn"},
    "no Markov head": {"markov_rank": 0, "confidence_head_with_markov": False},
}


@pytest.fixture(scope="module")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


def trained(model, request, drafts):
    """(q [K, V], confidence [K]) of a block whose true tokens are `drafts`, by the training forward, dense route."""
    batch = request.as_batch(drafts)
    model.config.transformer_layer_config._attn_implementation = "eager"
    row, args = model.packed_batch(**batch), model.loss_args({"max_anchors": 100})
    with torch.no_grad():
        filled = fill_sampled_blocks(model.network, row, args)
        block = filled.blocks.anchors_P.tolist().index(len(request.tokens) - 1)
        embedded, features = markov_features(model.network, filled)
        logits = model.lm_head(filled.hidden_PSH[block])
        if model.markov_head is not None:
            logits = logits + model.markov_head.markov_w2(features[block])
        kappa = model.confidence_head(filled.hidden_PSH, embedded)[block]
    first = model.config.first_slot
    probs = torch.zeros(len(drafts), VOCAB)
    kept = draft_maps()[0].nonzero().flatten() if logits.shape[1] == DRAFT_VOCAB else torch.arange(VOCAB)
    probs[:, kept] = logits[first:].softmax(-1)
    return probs, kappa[first:].sigmoid()


@pytest.mark.parametrize("case", CASES)
def test_drafts_equal_the_training_forward_whatever_was_accepted(drafter, verifier, case):
    model = drafter(**CASES[case])
    proposer = model.make_proposer(verifier, max_batch_size=4, max_length=64)
    num_drafts = model.config.num_drafts
    requests = [BlockRequest(1, 1), BlockRequest(2, 9), BlockRequest(3, 17)]
    random = torch.Generator().manual_seed(7)
    for step in range(5):
        active = [step != 3, True, True]
        proposal = proposer.propose(commit(requests, active), num_drafts, sampled(3, seed=step))
        for b, request in enumerate(requests):
            drafts = proposal.token_ids_BK[b].tolist()
            if not active[b]:
                assert drafts == [-1] * num_drafts and proposer.confidence_BK[b].tolist() == drafts
                continue
            expected, confidence = trained(model, request, drafts)
            torch.testing.assert_close(proposal.probs_BKV[b], expected, atol=2e-6, rtol=1e-4)
            torch.testing.assert_close(proposer.confidence_BK[b], confidence, atol=2e-6, rtol=1e-4)
            num_accepted = int(torch.randint(0, num_drafts + 1, (), generator=random))
            request.tokens += [*drafts[:num_accepted], int(torch.randint(0, VOCAB, (), generator=random))]


def test_greedy_drafts_are_the_argmax_given_the_drafts_before(drafter, verifier):
    model, request = drafter(), BlockRequest(2, 9)
    proposer = model.make_proposer(verifier, max_batch_size=1, max_length=64)
    proposal = proposer.propose(commit([request]), 4, DraftSampling(torch.zeros(1)))
    drafts = proposal.token_ids_BK[0].tolist()
    assert proposal.probs_BKV is None and trained(model, request, drafts)[0].argmax(-1).tolist() == drafts


def test_drafts_end_where_survival_is_too_small(drafter, verifier):
    model = drafter()
    proposer = model.make_proposer(verifier, max_batch_size=3, max_length=64)
    requests = [BlockRequest(seed, 9) for seed in range(3)]
    committed = commit(requests)
    whole = proposer.propose(committed, 4, sampled(3))
    survival = proposer.confidence_BK.cumprod(-1)
    proposer.min_survival = float(survival.flatten().median())
    short = proposer.propose(committed, 4, sampled(3))
    kept = survival >= proposer.min_survival
    assert 0 < int(kept.sum()) < 12
    assert torch.equal(short.token_ids_BK, whole.token_ids_BK.where(kept, -1))
    assert bool((kept.long().diff(dim=1) <= 0).all())  # a prefix of each row
    assert torch.equal(proposer.confidence_BK >= 0, kept)


@pytest.mark.parametrize("case", CASES)
def test_the_engine_gives_plain_greedy_text(drafter, verifier, case):
    model = drafter(**CASES[case])
    proposer = model.make_proposer(verifier, max_batch_size=2, max_length=64)
    engine = Engine(verifier, proposer, num_speculative_tokens=model.config.num_drafts, max_batch_size=2)
    check_greedy_text(verifier, engine)
