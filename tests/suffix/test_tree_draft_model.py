"""Trees drafted by a model: greedy output identical to plain decoding, and a wider tree is accepted longer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.proposers.draft_model import DraftModelProposer
from speculators.decoding.trees.static_tree import TreeDraftModelProposer
from speculators.decoding.trees.token_tree import TokenTree

PROMPTS = [[1, 2, 3, 4, 1, 2], [5, 6, 7], [9] * 4, [3, 1, 4, 1, 5]]


def tiny(seed: int, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def engine(verifier, draft, tree: TokenTree, rows: int) -> Engine:
    proposer = TreeDraftModelProposer(DraftModelProposer(draft, max_batch_size=rows), tree)
    return Engine(verifier, proposer, num_speculative_tokens=tree.depth, max_batch_size=rows)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("same", [True, False])
def test_greedy_trees_reproduce_plain_decoding(rows, same):
    verifier = tiny(0)
    draft = verifier if same else tiny(1, layers=1)
    tree = TokenTree.parse("[(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]")
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    plain = [output.token_ids for output in Engine(verifier, max_batch_size=rows).generate(PROMPTS, sampling)]
    with_tree = engine(verifier, draft, tree, rows)
    assert [output.token_ids for output in with_tree.generate(PROMPTS, sampling)] == plain
    if same:  # an oracle is accepted to the tree's full depth, but for the last round
        assert with_tree.stats.acceptance_length > 3.4


def test_a_wider_tree_is_accepted_longer_than_its_chain():
    verifier, draft, sampling = tiny(0), tiny(1, layers=1), SamplingParams(max_tokens=40, ignore_eos=True)
    lengths = []
    for tree in (TokenTree.chain(2), TokenTree.of([(0,), (1,), (2,), (3,), (0, 0), (1, 0), (2, 0), (3, 0)])):
        decoder = engine(verifier, draft, tree, 4)
        decoder.generate(PROMPTS, sampling)
        lengths.append(decoder.stats.acceptance_length)
    assert lengths[1] > lengths[0]


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_tree_is_drafted_no_deeper_than_asked(asked):
    verifier, tree = tiny(0), TokenTree.parse("[(0,), (1,), (0, 0), (1, 0), (0, 0, 0)]")
    proposer = TreeDraftModelProposer(DraftModelProposer(verifier, max_batch_size=4), tree)
    decoder = Engine(verifier, proposer, num_speculative_tokens=asked, max_batch_size=4)
    decoder.generate(PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))
    assert len(decoder.stats.drafted_per_position) == asked
    assert decoder.stats.num_drafted == decoder.stats.num_drafts * sum(len(path) <= asked for path in tree.paths)
