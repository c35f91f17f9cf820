"""EAGLE-2's dynamic trees equal brute-force ones made of chains from scratch, and the text stays the same."""

import pytest
import torch
from drafter_toys import Request, commit
from eagle1_drafting import PROMPTS, trained

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.trees.dynamic_tree import DynamicTreeProposer, DynamicTreeShape
from speculators.interfaces import DraftSampling

GREEDY = DraftSampling(torch.zeros(2))


def best_paths(model, request, shape):
    """EAGLE-2 by its words: expand the top k nodes a depth, keep the best of all seen. Laws of the training."""
    seen, frontier = {}, {(): 0.0}
    for _ in range(shape.depth + 1):
        children = {}
        for path, score in frontier.items():
            log_probs = trained(model, request, [*path, 0])[len(path)].log()
            for token in log_probs.topk(shape.top_k).indices.tolist():
                children[(*path, token)] = score + log_probs[token].item()
        seen |= children
        frontier = dict(sorted(children.items(), key=lambda item: -item[1])[: shape.top_k])
    return set(sorted(seen, key=lambda path: -seen[path])[: shape.total_token - 1])


def paths_of(proposal, row):
    paths = {-1: ()}
    for slot, (token, parent) in enumerate(
        zip(proposal.token_ids_BK[row].tolist(), proposal.parents_K.tolist(), strict=True)
    ):
        if token >= 0:
            paths[slot] = (*paths[parent], token)
    return {path for slot, path in paths.items() if slot >= 0}


def test_trees_are_those_of_the_algorithm_whatever_was_accepted(make_drafter, verifier):
    """Two rows of different lengths, three rounds; tokens and structure compared as paths."""
    model = make_drafter(layernorms=True)
    shape = DynamicTreeShape(total_token=19, depth=2, top_k=3)  # room for nodes of every depth
    drafter = model.make_tree_drafter(verifier, max_batch_size=2, max_length=64)
    proposer = DynamicTreeProposer(drafter, shape)
    requests = [Request(0, 4), Request(1, 7)]
    for grown in ([[3], [5, 6, 7]], [[8, 9], [2]], [[1], [1]]):
        proposal = proposer.propose(commit(requests), 5, GREEDY)
        for b, request in enumerate(requests):
            assert paths_of(proposal, b) == best_paths(model, request, shape)
            assert {len(path) for path in paths_of(proposal, b)} == {1, 2, 3}
            request.tokens += grown[b]


def test_the_depth_is_bounded_by_the_tokens_asked(make_drafter, verifier):
    drafter = make_drafter().make_tree_drafter(verifier, max_batch_size=2, max_length=64)
    proposer = DynamicTreeProposer(drafter, DynamicTreeShape(total_token=30, depth=4, top_k=3))
    requests = [Request(0, 4), Request(1, 1)]
    proposal = proposer.propose(commit(requests), 2, GREEDY)
    assert max(len(path) for path in paths_of(proposal, 0)) == 2
    assert paths_of(proposal, 1) == set()  # one token has no state yet
    requests[0].tokens += [3]
    requests[1].tokens += [4]
    assert proposer.propose(commit(requests), 0, GREEDY).token_ids_BK.shape == (2, 0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_verifiers(make_drafter, verifier, batch_size):
    biases = dict.fromkeys(range(0, 24, 3), -1.0)
    params = SamplingParams(max_tokens=14, ignore_eos=True, logit_bias=biases, min_tokens=9, stop_token_ids=[4, 5, 7])
    drafter = make_drafter().make_tree_drafter(verifier, max_batch_size=batch_size, max_length=128)
    proposer = DynamicTreeProposer(drafter, DynamicTreeShape(total_token=12, depth=2, top_k=4))
    plain = Engine(verifier, max_batch_size=batch_size).generate(PROMPTS, params)
    engine = Engine(verifier, proposer, num_speculative_tokens=4, max_batch_size=batch_size)
    assert [o.token_ids for o in engine.generate(PROMPTS, params)] == [o.token_ids for o in plain]
    alone = Engine(verifier, proposer, num_speculative_tokens=4, max_batch_size=1)
    alone.generate(PROMPTS, params)
    assert engine.stats.num_accepted == alone.stats.num_accepted > 0
