"""Sampled output with trees, through the engine: the joint law of the emitted tokens is the verifier's.

A Markov-table verifier over 4 tokens, a tree drafter with a table of its own, and a chi-squared test of the joint of
all emitted tokens. False alarms: 1e-5 a test (seeds are fixed, so one does not come and go).
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.trees.dynamic_tree import DynamicTreeProposer, DynamicTreeShape
from speculators.decoding.trees.static_tree import StaticTreeProposer
from speculators.decoding.trees.token_tree import TokenTree
from speculators.decoding.verification import resolve_rule
from speculators.interfaces import CaptureSpec, Proposal

V, NUM_TOKENS, NUM_REQUESTS, FALSE_ALARM = 4, 4, 3000, 1e-5
PROMPT, TEMPERATURE = [1, 3], 1.4
TREE = TokenTree.of([(0,), (1,), (0, 0), (0, 1), (1, 0)])


def table(seed: int) -> torch.Tensor:
    probs_VV = torch.rand(V, V, generator=torch.Generator().manual_seed(seed)).pow(2) + 0.02
    return probs_VV / probs_VV.sum(-1, keepdim=True)


class MarkovTreeDrafter:
    """p(next | last token) from a table, behind the seam of tree drafters."""

    capture, max_depth = CaptureSpec(), None

    def __init__(self, probs_VV: torch.Tensor):
        self.log_probs_VV, self.last_by_row = probs_VV.log(), {}

    def start(self, committed, depth):
        for row, new in enumerate(committed.num_new_B.tolist()):
            if new:
                self.last_by_row[row] = int(committed.token_ids_BT[row, new - 1])
        return self.log_probs_VV[[self.last_by_row.get(row, 0) for row in range(len(committed.num_new_B))]]

    def expand(self, token_ids_BF, parent_BF, visible_BFN):
        return self.log_probs_VV[token_ids_BF]

    def to_verifier_ids(self, draft_ids):
        return draft_ids

    def to_verifier_probs(self, draft_probs):
        return draft_probs


class BestFirst:
    """The wrong treatment: drawn siblings are sorted by the draft's probability before they are tested."""

    def __init__(self, inner):
        self.inner, self.capture = inner, inner.capture

    def propose(self, committed, num_tokens, sampling):
        proposal = self.inner.propose(committed, 1, sampling)
        q_BK = (
            proposal.probs_BKV[:, :1]
            .expand_as(proposal.probs_BKV)
            .gather(2, proposal.token_ids_BK.clamp_min(0)[..., None])
        )
        order_BK = q_BK[..., 0].argsort(dim=1, descending=True)
        probs_BKV = proposal.probs_BKV.gather(1, order_BK[..., None].expand_as(proposal.probs_BKV))
        return Proposal(proposal.token_ids_BK.gather(1, order_BK), probs_BKV, proposal.parents_K)


def p_value(outputs) -> float:
    """Chi-squared of the joint of all tokens; the law is the table's at the temperature."""
    logits = table(0).log() / TEMPERATURE
    law_VV = logits.softmax(-1).double()
    counts = Counter(tuple(output.token_ids) for output in outputs)
    cells, rare = [], [0.0, 0.0]
    for tokens in itertools.product(range(V), repeat=NUM_TOKENS):
        probability, last = 1.0, PROMPT[-1]
        for token in tokens:
            probability, last = probability * float(law_VV[last, token]), token
        observed, expected = counts[tokens], probability * len(outputs)
        if expected < 8:
            rare = [rare[0] + observed, rare[1] + expected]
        else:
            cells.append((observed, expected))
    cells.append(tuple(rare))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(statistic / 2)))


def sampled(proposer, num_tokens=2, greedy_rows=0):
    engine = Engine(
        toys.MarkovVerifier(table(0)),
        proposer,
        num_speculative_tokens=num_tokens,
        rule=resolve_rule("standard"),
        max_batch_size=150,
    )
    hot = SamplingParams(max_tokens=NUM_TOKENS, temperature=TEMPERATURE)
    cold = SamplingParams(max_tokens=NUM_TOKENS)
    outputs = engine.generate([PROMPT] * (NUM_REQUESTS + greedy_rows), [hot] * NUM_REQUESTS + [cold] * greedy_rows)
    assert engine.stats.num_accepted > 0
    return outputs


@pytest.mark.parametrize("draft_seed", [0, 5])
def test_trees_of_drawn_tokens(draft_seed):
    outputs = sampled(StaticTreeProposer(MarkovTreeDrafter(table(draft_seed)), TREE), greedy_rows=20)
    assert p_value(outputs[:NUM_REQUESTS]) > FALSE_ALARM
    plain = Engine(toys.MarkovVerifier(table(0))).generate([PROMPT], SamplingParams(max_tokens=NUM_TOKENS))
    assert all(output.token_ids == plain[0].token_ids for output in outputs[NUM_REQUESTS:])


def test_dynamic_trees():
    proposer = DynamicTreeProposer(MarkovTreeDrafter(table(5)), DynamicTreeShape(6, 1, 3))
    assert p_value(sampled(proposer)) > FALSE_ALARM


def test_a_drawn_tree_beside_a_drawn_chain():
    """Both draft in every round, each for half of the rows."""
    engine = Engine(
        toys.MarkovVerifier(table(0)),
        StaticTreeProposer(MarkovTreeDrafter(table(5)), TREE),
        num_speculative_tokens=3,
        other_methods={"chain": toys.MarkovDrafter(table(5))},
        rule=resolve_rule("standard"),
        max_batch_size=150,
    )
    hot = SamplingParams(max_tokens=NUM_TOKENS, temperature=TEMPERATURE)
    outputs = engine.generate([PROMPT] * NUM_REQUESTS, [hot, replace(hot, method="chain")] * (NUM_REQUESTS // 2))
    for half in (outputs[::2], outputs[1::2]):
        assert p_value(half) > FALSE_ALARM and sum(output.stats.num_accepted for output in half) > 0


def test_drawn_tokens_tested_best_first_are_caught():
    proposer = BestFirst(StaticTreeProposer(MarkovTreeDrafter(table(5)), TokenTree.of([(0,), (1,), (2,)])))
    assert p_value(sampled(proposer)) < FALSE_ALARM
