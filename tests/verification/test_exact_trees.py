"""Sampled and dynamic trees as production grows them, verified as production does: the exact joint law, by enumeration.

Every outcome of the draws is reached by aiming each uniform at the middle of a token's cell. A wrong treatment of the
same trees must fail the same test.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from exact import Drafted, emitted_law, largest_error, paths, random_table

from speculators.decoding.trees.dynamic_tree import DynamicTreeShape, grow_dynamic_tree, share_shape
from speculators.decoding.trees.static_tree import sample_tree
from speculators.decoding.verification import resolve_rule

V, TOLERANCE = 3, 1e-10
TREES = [[-1, -1], [-1, -1, 0], [-1, -1, 0, 0], [-1, -1, 1, 0]]


def aimed(draft, parents, replacement):
    """(tokens, uniforms, weight) of every tree that can be drawn, by the words of the rule."""
    for tokens in itertools.product(range(V), repeat=len(parents)):
        uniforms, weight, own = [], 1.0, paths(tokens, parents)
        for slot, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            q = draft[own[slot][:-1]].clone()
            if not replacement:
                q[[tokens[other] for other in range(slot) if parents[other] == parent]] = 0
            q = q / q.sum()
            uniforms.append(float(q[:token].sum() + q[token] / 2))
            weight *= float(q[token])
        if weight > 0:
            yield tokens, uniforms, weight


def drawn_trees(draft, parents, replacement=False):
    """What `sample_tree` makes of every outcome, with its probability."""
    outcomes = list(aimed(draft, parents, replacement))

    def law(slots, token_ids_BK):
        rows = []
        for tokens in token_ids_BK.tolist():
            own = [*paths(tuple(tokens), parents), ()]  # index -1: the root
            rows.append(torch.stack([draft[own[slot]] for slot in slots]))
        return torch.stack(rows)

    uniform_BK = torch.tensor([uniforms for _, uniforms, _ in outcomes], dtype=torch.float64)
    proposal = sample_tree(parents, law, uniform_BK, replacement=replacement)
    assert proposal.token_ids_BK.tolist() == [list(tokens) for tokens, _, _ in outcomes]
    assert proposal.parents_K.tolist() == parents
    return [Drafted(tokens, proposal.probs_BKV[row], weight) for row, (tokens, _, weight) in enumerate(outcomes)]


@pytest.mark.parametrize("parents", TREES)
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_trees_keep_the_verifiers_joint_law(parents, replacement, seed):
    generator = torch.Generator().manual_seed(seed)
    depth = max(map(len, paths((0,) * len(parents), parents)))
    target, draft = (random_table(V, depth + 1, "dense", generator) for _ in range(2))
    drafts = drawn_trees(draft, parents, replacement)
    assert sum(d.weight for d in drafts) == pytest.approx(1, abs=TOLERANCE)
    for rule in ("standard", "strict"):
        law, _ = emitted_law(resolve_rule(rule), drafts, target, V, parents)
        assert largest_error(law, target, V, depth + 1) < TOLERANCE


def test_drawn_siblings_tested_best_first_are_caught():
    generator = torch.Generator().manual_seed(0)
    target, draft = (random_table(V, 2, "dense", generator) for _ in range(2))
    reranked = []
    for d in drawn_trees(draft, [-1, -1], replacement=True):
        order = sorted(range(2), key=lambda slot: -draft[()][d.tokens[slot]])
        reranked.append(Drafted(tuple(d.tokens[slot] for slot in order), d.probs_KV[order], d.weight))
    law, _ = emitted_law(resolve_rule("standard"), reranked, target, V, [-1, -1])
    assert largest_error(law, target, V, 2) > 1e-3


def test_drawn_trees_of_which_the_best_nodes_are_kept_are_caught():
    """EAGLE-2's reranking applied to drawn tokens: keep the drawn sibling that the draft likes most."""
    generator = torch.Generator().manual_seed(0)
    target, draft = (random_table(V, 2, "dense", generator) for _ in range(2))
    kept = []
    for d in drawn_trees(draft, [-1, -1], replacement=True):
        best = max(range(2), key=lambda slot: draft[()][d.tokens[slot]])
        kept.append(Drafted((d.tokens[best],), d.probs_KV[best, None], d.weight))
    law, _ = emitted_law(resolve_rule("standard"), kept, target, V, [-1])
    assert largest_error(law, target, V, 2) > 1e-3
    # as a point mass it may stay: any candidates are lossless when the verifier's own draw decides
    law, _ = emitted_law(resolve_rule("strict"), kept, target, V, [-1])
    assert largest_error(law, target, V, 2) < TOLERANCE


def test_rows_without_temperature_take_ranked_point_masses():
    probs = torch.tensor([0.2, 0.5, 0.3]).double()
    proposal = sample_tree(
        [-1, -1, -1],
        lambda slots, _: probs.expand(2, 1, V),
        torch.full((2, 3), 0.01).double(),
        is_greedy_B=torch.tensor([True, False]),
    )
    assert proposal.token_ids_BK.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert proposal.probs_BKV[0].tolist() == torch.eye(V)[[1, 2, 0]].tolist()
    assert proposal.probs_BKV[1].tolist() == [
        pytest.approx([0.2, 0.5, 0.3]),
        pytest.approx([0, 0.625, 0.375]),
        pytest.approx([0, 0, 1]),
    ]


@pytest.mark.parametrize("shape", [DynamicTreeShape(4, 1, 2), DynamicTreeShape(5, 1, 3), DynamicTreeShape(4, 2, 2)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dynamic_trees_keep_the_verifiers_joint_law(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    target, draft = (random_table(V, shape.max_depth + 1, "dense", generator) for _ in range(2))
    frontier_paths = {0: [()]}

    def expand(frontier):
        above = frontier_paths[frontier.depth - 1]
        own = [
            (*above[parent], token)
            for token, parent in zip(frontier.token_ids_BF[0].tolist(), frontier.parent_BF[0].tolist(), strict=True)
        ]
        frontier_paths[frontier.depth] = own
        return torch.stack([draft[path] for path in own])[None].log()

    proposal = share_shape(grow_dynamic_tree(draft[()][None].log(), expand, shape))
    parents, tokens = proposal.parents_K.tolist(), tuple(proposal.token_ids_BK[0].tolist())
    assert len(tokens) == shape.total_token - 1
    for path in paths(tokens, parents):
        assert len(path) <= shape.max_depth
    depth = max(map(len, paths(tokens, parents)))
    for rule in ("standard", "strict"):
        law, accepted = emitted_law(resolve_rule(rule), [Drafted(tokens, None, 1.0)], target, V, parents)
        assert largest_error(law, target, V, depth + 1) < TOLERANCE
    # its value: the probability of each of its paths
    value = sum(
        torch.stack([target[path[:i]][path[i]] for i in range(len(path))]).prod() for path in paths(tokens, parents)
    )
    assert accepted == pytest.approx(float(value))
