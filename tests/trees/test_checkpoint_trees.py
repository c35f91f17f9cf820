"""Draft trees of saved checkpoints, asked for in the config: node by node what the chain would have drafted there."""

from __future__ import annotations

import json

import pytest
import torch

from speculators.decoding import Engine, SamplingParams, parse_methods
from speculators.decoding.config import SpeculativeConfig
from speculators.decoding.trees.static_tree import Expansions, StaticTreeProposer
from speculators.decoding.trees.token_tree import TokenTree
from speculators.interfaces import Committed, DraftSampling
from speculators.model import SpeculatorModel

TYPES = ["eagle", "eagle3", "peagle", "mtp", "medusa", "mlp"]
TREE = "[(0,), (1,), (2,), (3,), (0, 0), (0, 1), (2, 0), (2, 1), (0, 1, 0), (2, 0, 0), (2, 1, 0), (2, 1, 1)]"
DYNAMIC = {"total_token": 14, "depth": 2, "top_k": 4}
PROMPTS = [[5, 9, 3], [7] * 12, [1, 2], [4, 4, 8, 1, 0, 30, 2], [11, 3], [8, 8, 1], [20, 21, 22, 23], [2, 9]]
GREEDY = SamplingParams(max_tokens=18)
SIZES = {"max_batch_size": 2, "max_length": 64}


@pytest.fixture(scope="module")
def plain(verifier):
    return [o.token_ids for o in Engine(verifier, max_batch_size=8).generate(PROMPTS, GREEDY)]


def committed(width: int) -> Committed:
    """Two prompts of different lengths, and what the verifier might have seen."""
    states_BTD = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(0))
    states_BTD[:, 0] = 0
    tokens_BT = torch.tensor([[5, 9, 3, 1, 7, 20], [4, 8, 2, 6, 0, 0]])
    return Committed(tokens_BT, states_BTD, torch.tensor([6, 4]), torch.tensor([6, 4]))


def chain_along(path, checkpoint, verifier, name, monkeypatch, states):
    """The chain's drafts when its draws are told to be the path's ranks."""
    step = iter(path)

    def ranked(probs, sampling):
        if probs.ndim == 3:  # all slots at once
            order = probs.sort(-1, descending=True).indices
            return torch.stack([order[:, k, rank] for k, rank in enumerate(path)], 1)
        return probs.sort(-1, descending=True).indices[:, next(step)]

    with monkeypatch.context() as patch:
        patch.setattr("speculators.nn.draft_tokens.draw_as", ranked)
        proposer = SpeculatorModel.from_pretrained(checkpoint).make_proposer(verifier, **SIZES)
        return proposer.propose(states, len(path), DraftSampling(torch.ones(2), None, True))


@pytest.mark.parametrize("name", TYPES)
def test_every_node_is_what_the_chain_drafts_along_its_path(name, checkpoints, verifier, monkeypatch):
    model, tree = SpeculatorModel.from_pretrained(checkpoints[name]), TokenTree.parse(TREE)
    capture = model.capture if name in ("eagle3", "peagle") else None
    states = committed(16 * (len(capture.aux_layer_ids) if capture is not None else 1))
    proposer = StaticTreeProposer(model.make_tree_drafter(verifier, **SIZES), tree)
    proposal = proposer.propose(states, 5, DraftSampling(torch.zeros(2)))
    assert proposal.parents_K.tolist() == list(tree.parents) and proposal.probs_BKV is None
    drawn = proposer.propose(states, 5, DraftSampling(torch.ones(2), torch.Generator().manual_seed(3), True))
    for slot, path in enumerate(tree.paths):
        chain = chain_along(path, checkpoints[name], verifier, name, monkeypatch, states)
        assert proposal.token_ids_BK[:, slot].tolist() == chain.token_ids_BK[:, len(path) - 1].tolist()
        if path[-1] == 0 and len(path) == 1:  # the law a first sibling is drawn from is the chain's
            torch.testing.assert_close(drawn.probs_BKV[:, slot], chain.probs_BKV[:, 0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("tree", [{"speculative_token_tree": TREE}, {"dynamic_tree": DYNAMIC}])
@pytest.mark.parametrize("name", TYPES)
def test_greedy_text_is_the_verifiers(name, tree, batch, checkpoints, verifier, plain):
    engine = Engine(verifier, {"model": str(checkpoints[name]), **tree}, max_batch_size=batch)
    prompts = PROMPTS if batch == 8 else PROMPTS[:3]
    assert [o.token_ids for o in engine.generate(prompts, GREEDY)] == plain[: len(prompts)]
    assert engine.stats.num_accepted > 0
    assert len(engine.stats.drafted_per_position) == 3 or (name == "mlp" and "dynamic_tree" in tree)
    # more drafts than the longest path: it was a tree
    assert engine.stats.num_drafted > 3 * engine.stats.num_drafts


def test_a_number_of_tokens_cuts_the_tree(checkpoints, verifier):
    config = {"model": str(checkpoints["eagle3"]), "dynamic_tree": True, "num_speculative_tokens": 2}
    engine = Engine(verifier, config, max_batch_size=1)
    engine.generate(PROMPTS[:1], GREEDY)
    assert len(engine.stats.drafted_per_position) == 2
    config = SpeculativeConfig(model=str(checkpoints["eagle3"]), speculative_token_tree=TREE)
    assert (config.num_speculative_tokens, config.num_tokens_at(1)) == (3, 3)
    assert SpeculativeConfig(model="o/d", dynamic_tree=True).num_speculative_tokens == 8
    chain = SpeculativeConfig(model="o/d", num_speculative_tokens=5, speculative_token_tree="[(0,), (0, 0)]")
    assert chain.num_tokens_at(1) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "ngram", "speculative_token_tree": "[(0,), (1,)]"}, "method='ngram' drafts chains only"),
        ({"method": "early_exit", "dynamic_tree": True}, "method='early_exit' cannot grow one"),
        ({"model": "o/d", "speculative_token_tree": "[(0,), (1,)]", "dynamic_tree": True}, "both given"),
        ({"model": "o/d", "dynamic_tree": {"total_token": 1}}, "total_token >= 2"),
        ({"model": "o/d", "dynamic_tree": {"top": 1}}, "top"),
        ({"model": "o/d", "dynamic_tree": True, "rejection_sample_method": "block"}, "verifies chains only"),
        ({"model": "o/d", "dynamic_tree": True, "draft_sample_method": "probabilistic"}, "cannot draw them"),
    ],
)
def test_trees_that_cannot_be_drafted_are_refused(fields, message, verifier):
    with pytest.raises(ValueError, match=message):
        config = SpeculativeConfig(num_speculative_tokens=3, **fields)
        assert "model" not in fields, "the config should have refused it"
        Engine(verifier, config)


def test_dynamic_trees_are_named_as_what_vllm_would_not_accept():
    config = SpeculativeConfig(model="o/d", dynamic_tree={"depth": 3})
    assert "dynamic_tree" in config.vllm_unsupported()
    assert json.loads(config.to_vllm_json(drop_unsupported=True)) == {
        "model": "o/d",
        "method": "draft_model",
        "num_speculative_tokens": 4,
    }


def test_the_command_line_asks_speculators_for_trees(checkpoints):
    path = str(checkpoints["eagle"])
    plain, ngram, drafter = parse_methods(["none", "ngram", path], None, {"speculative_token_tree": TREE})
    assert plain.speculative_config is None and "speculative_token_tree" not in ngram.speculative_config
    assert drafter.speculative_config == {"model": path, "speculative_token_tree": TREE}
    with pytest.raises(ValueError, match="none of the methods"):
        parse_methods(["ngram"], None, {"dynamic_tree": {}})


@pytest.mark.parametrize("name", ["eagle3", "medusa"])
@pytest.mark.parametrize("tree", [{"speculative_token_tree": TREE}, {"dynamic_tree": DYNAMIC}])
@pytest.mark.parametrize("asked", [1, 2, 3])
def test_trees_are_drafted_no_deeper_than_the_schedule_says(checkpoints, verifier, plain, name, tree, asked):
    config = {"model": str(checkpoints[name]), **tree, "num_speculative_tokens_per_batch_size": [(1, 8, asked)]}
    engine = Engine(verifier, config, max_batch_size=8)
    assert [output.token_ids for output in engine.generate(PROMPTS, GREEDY)] == plain
    assert len(engine.stats.drafted_per_position) == asked


@pytest.mark.parametrize("tree", [TREE, "[(0,), (1,), (0, 0), (1, 0), (1, 1), (1, 0, 0)]"])
def test_each_node_of_a_fixed_tree_sees_every_ancestor_once(tree):
    expansions = Expansions(TokenTree.parse(tree))
    for depth in range(1, expansions.tree.depth):
        assert expansions.visible_at(depth).sum(1).tolist() == [depth] * len(expansions.slots_by_depth[0])
