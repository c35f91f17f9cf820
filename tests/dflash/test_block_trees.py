"""Candidate trees of block drafters: node by node what the training forward answers there, and the best of a budget."""

import itertools
import json

import pytest
import torch
from dflash_toys import NUM_AUX, make_drafter, save_verifier
from drafter_toys import HIDDEN, VOCAB
from transformers import LlamaForCausalLM

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.trees.dynamic_tree import DynamicTreeProposer, DynamicTreeShape
from speculators.decoding.trees.static_tree import StaticTreeProposer
from speculators.decoding.trees.token_tree import TokenTree
from speculators.interfaces import Committed, DraftSampling, VerifierStates

CASES = {
    "dflash": ("dflash", {}),
    "vanilla": ("dspark", {"markov_rank": 5}),
    "gated": ("dspark", {"markov_rank": 5, "markov_head_type": "gated"}),
    "rnn": ("dspark", {"markov_rank": 5, "markov_head_type": "rnn", "sample_from_anchor": True}),
    "no Markov head": ("dspark", {"markov_rank": 0, "confidence_head_with_markov": False}),
}
TREE = TokenTree.parse("[(0,), (1,), (3,), (0, 0), (0, 2), (1, 1), (3, 0), (0, 2, 1), (1, 1, 0), (3, 0, 0)]")
DEPTH = 3
PROMPT = [5, 9, 3, 1, 7, 20]
SIZES = {"max_batch_size": 2, "max_length": 64}


@pytest.fixture(scope="module")
def verifier_path(tmp_path_factory):
    return save_verifier(tmp_path_factory.mktemp("block_tree_verifier"))


@pytest.fixture(scope="module")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


@pytest.fixture(params=CASES)
def model(request, verifier_path):
    name, arguments = CASES[request.param]
    return make_drafter(name, verifier_path, **arguments).eval()


def states_of(prompt):
    """Row i made token i + 1; nobody knows the state of the last token yet."""
    states = torch.randn(len(prompt), NUM_AUX * HIDDEN, generator=torch.Generator().manual_seed(1))
    states[-1] = 0
    return states


def committed(prompt):
    before = torch.cat((torch.zeros(1, NUM_AUX * HIDDEN), states_of(prompt)[:-1]))
    length = torch.tensor([len(prompt)])
    return Committed(torch.tensor([prompt]), before[None], length, length)


def trained_log_probs(model, path):
    """[len(path) + 1, V] by the training forward with `path` after the prompt; the last row drafts what follows it.
    The block is as long as the tree is deep: a slot may see all of its block."""
    drafts = [*path, *[0] * (DEPTH - len(path))]
    states = torch.cat((states_of(PROMPT), torch.zeros(len(drafts), NUM_AUX * HIDDEN)))
    tokens = torch.tensor([*PROMPT, *drafts])
    with torch.no_grad():
        logits = model.draft_logits(VerifierStates(tokens, states, torch.zeros(len(tokens), HIDDEN)), DEPTH)
    return logits.log_softmax(-1)[: len(path) + 1]


def test_every_node_is_the_ranked_answer_of_the_training_forward(model, verifier):
    proposer = StaticTreeProposer(model.make_tree_drafter(verifier, **SIZES), TREE)
    drafts = proposer.propose(committed(PROMPT), DEPTH, DraftSampling(torch.zeros(1))).token_ids_BK[0].tolist()
    token_of = dict(zip(TREE.paths, drafts, strict=True))
    for path, token in token_of.items():
        before = [token_of[path[:depth]] for depth in range(1, len(path))]
        order = trained_log_probs(model, before)[-1].argsort(descending=True)
        assert token == int(order[path[-1]])


def test_the_law_a_node_is_drawn_from_is_the_training_forwards(model, verifier):
    """Of first siblings; those after them are drawn from what is left."""
    proposer = StaticTreeProposer(model.make_tree_drafter(verifier, **SIZES), TREE)
    sampling = DraftSampling(torch.ones(1), torch.Generator().manual_seed(5), probabilistic=True)
    proposal = proposer.propose(committed(PROMPT), DEPTH, sampling)
    token_of = dict(zip(TREE.paths, proposal.token_ids_BK[0].tolist(), strict=True))
    first_siblings = [(slot, path) for slot, path in enumerate(TREE.paths) if path[-1] == 0]
    assert [path for _, path in first_siblings if len(path) == DEPTH] == [(1, 1, 0), (3, 0, 0)]
    for slot, path in first_siblings:
        before = [token_of[path[:depth]] for depth in range(1, len(path))]
        expected = trained_log_probs(model, before)[-1].exp()
        torch.testing.assert_close(proposal.probs_BKV[0, slot], expected, atol=2e-6, rtol=1e-4)


def test_a_dynamic_tree_keeps_the_likeliest_nodes_of_its_budget(model, verifier):
    """All paths over the best 3 tokens of each node written out; the tree must be the 9 likeliest of them (with 9
    nodes, paths that begin outside the 3 best frontier nodes of a depth are not among them: the sums are checked)."""
    shape = DynamicTreeShape(total_token=10, depth=DEPTH - 1, top_k=9)
    proposal = DynamicTreeProposer(model.make_tree_drafter(verifier, **SIZES), shape).propose(
        committed(PROMPT), DEPTH, DraftSampling(torch.zeros(1))
    )
    tokens, parents = proposal.token_ids_BK[0].tolist(), proposal.parents_K.tolist()
    score_of = {}
    first = trained_log_probs(model, [])[0]
    kept = [t for t in range(VOCAB) if first[t] > -float("inf")]
    for length in range(1, DEPTH + 1):
        for path in itertools.product(kept, repeat=length) if length == 1 else extended(score_of, length, kept):
            score = score_of.get(path[:-1], 0.0)
            score_of[path] = score + float(trained_log_probs(model, list(path[:-1]))[-1][path[-1]])
    best = sorted(score_of.values(), reverse=True)[:9]
    paths = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == 9
    torch.testing.assert_close(sorted((score_of[path] for path in paths), reverse=True), best, atol=1e-4, rtol=1e-4)


def extended(score_of, length, kept):
    """Children of the 9 likeliest paths one shorter: no other can be among the 9 likeliest."""
    shorter = sorted((path for path in score_of if len(path) == length - 1), key=score_of.get, reverse=True)[:9]
    return [(*path, token) for path in shorter for token in kept]


@pytest.mark.parametrize(
    "tree",
    [
        {"dynamic_tree": {"total_token": 12, "depth": 2, "top_k": 4}},
        {"speculative_token_tree": "[(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]"},
    ],
)
def test_greedy_text_is_the_verifiers(model, tree, verifier, tmp_path):
    model.save_pretrained(tmp_path)
    sampling = SamplingParams(max_tokens=10)
    prompts = [PROMPT, [7, 7]]
    plain = Engine(verifier, max_batch_size=2).generate(prompts, sampling)
    engine = Engine(verifier, {"model": str(tmp_path), **tree}, max_batch_size=2)
    assert [o.token_ids for o in engine.generate(prompts, sampling)] == [o.token_ids for o in plain]
    assert engine.stats.num_drafted > 4 * engine.stats.num_drafts, json.dumps(tree)
