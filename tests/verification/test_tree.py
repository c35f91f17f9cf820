"""Trees: static ones are validated, dynamic ones equal a naive search, sampled ones carry the law of each draw."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from speculators.decoding.trees.dynamic_tree import DynamicTreeShape, GrownTrees, grow_dynamic_tree, share_shape
from speculators.decoding.trees.static_tree import rank_tree, sample_tree
from speculators.decoding.trees.token_tree import EAGLE_25, MEDUSA_63, TokenTree, ancestor_mask, depths, expected_tokens
from speculators.decoding.verification import resolve_rule
from speculators.interfaces import Proposal


def test_paths_are_sorted_breadth_first_and_written_back():
    tree = TokenTree.parse("[(0, 1), (1,), (0,), (0, 0)]")
    assert str(tree) == "[(0,), (1,), (0, 0), (0, 1)]"
    assert tree.parents == (-1, -1, 0, 0)
    assert tree.ranks == (0, 1, 0, 1)
    assert (tree.depth, tree.is_chain) == (2, False)
    assert str(TokenTree.chain(3)) == "[(0,), (0, 0), (0, 0, 0)]"
    assert TokenTree.parse("[(0,), (0, 0)]").is_chain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "empty"),
        ("[(0, 0)]", r"has \(0, 0\) but not its parent \(0,\)"),
        ("[(0,), (-1,)]", "ranks >= 0"),
        ("[(0,), ('a',)]", "ranks >= 0"),
        ("[0, 1]", "list of tuples"),
        ("import os", "Python literal"),
        ("[()]", "non-empty"),
    ],
)
def test_trees_that_cannot_be_drafted_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TokenTree.parse(text)


def test_known_trees_have_their_published_sizes():
    assert (len(EAGLE_25.paths), EAGLE_25.depth) == (25, 5)
    assert (len(MEDUSA_63.paths), MEDUSA_63.depth) == (63, 4)


def test_the_mask_of_a_tree_you_can_see():
    parents = [-1, -1, 0, 0, 3]
    assert depths(parents) == [1, 1, 2, 2, 3]
    assert ancestor_mask(parents).long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    with pytest.raises(ValueError, match="parents come first"):
        depths([-1, 2, -1])


def test_the_best_static_tree_beats_every_other_of_its_size():
    accuracy = [[0.6, 0.25, 0.1], [0.5, 0.3], [0.45]]

    def value(tree: TokenTree) -> float:
        return expected_tokens(tree.parents, [accuracy[len(path) - 1][path[-1]] for path in tree.paths])

    every_node = [path for n in (1, 2, 3) for path in itertools.product(*(range(len(row)) for row in accuracy[:n]))]
    for size in (1, 2, 3, 4, 5):
        closed = [
            TokenTree.of(nodes)
            for nodes in itertools.combinations(every_node, size)
            if all(len(path) == 1 or path[:-1] in nodes for path in nodes)
        ]
        assert value(TokenTree.best(accuracy, size)) == pytest.approx(max(map(value, closed)))


def naive_dynamic_tree(table, shape):
    """EAGLE-2 by plain lists: every candidate with its path and score, frontier by frontier."""
    start = sorted(((-float(table(())[t]), t) for t in range(len(table(())))), key=lambda c: c[0])[: shape.top_k]
    candidates = [((t,), -score) for score, t in start]
    frontier = list(candidates)
    for _ in range(shape.depth):
        children = []
        for path, score in frontier:
            row = table(path)
            ranked = sorted(range(len(row)), key=lambda t: -row[t])[: shape.top_k]
            children += [((*path, t), score + float(row[t])) for t in ranked]
        candidates += children
        frontier = sorted(children, key=lambda c: -c[1])[: shape.top_k]
    return sorted(candidates, key=lambda c: -c[1])[: shape.total_token - 1]


@pytest.mark.parametrize(("depth", "top_k", "total"), [(0, 2, 3), (1, 2, 5), (3, 2, 8), (3, 3, 20), (2, 5, 31)])
def test_dynamic_trees_equal_a_naive_search(depth, top_k, total):
    generator = torch.Generator().manual_seed(depth)
    V, B = 5, 3
    tables = [torch.randn(V + 1, V, V, generator=generator).double().log_softmax(-1) for _ in range(B)]

    def table_of(row):
        return lambda path: tables[row][V if len(path) < 2 else path[-2], path[-1] if path else 0]

    histories: list[list[tuple[int, ...]]] = [[()] for _ in range(B)]
    run: list[list[tuple[int, ...]]] = [[] for _ in range(B)]

    def expand(frontier):
        rows = []
        for b in range(B):
            paths = [
                (*histories[b][parent], token)
                for parent, token in zip(frontier.parent_BF[b].tolist(), frontier.token_ids_BF[b].tolist(), strict=True)
            ]
            run[b] += paths
            histories[b] = paths
            for path, visible in zip(paths, frontier.visible_BFN[b], strict=True):
                seen = [other for other, sees in zip(run[b], visible.tolist(), strict=True) if sees]
                assert seen == [path[:n] for n in range(1, len(path) + 1)]  # its ancestors and itself
            rows.append(torch.stack([table_of(b)(path) for path in paths]))
        return torch.stack(rows)

    shape = DynamicTreeShape(total_token=total, depth=depth, top_k=top_k)
    root = torch.stack([table_of(b)(()) for b in range(B)])
    grown = grow_dynamic_tree(root, expand, shape)
    for b in range(B):
        expected = naive_dynamic_tree(table_of(b), shape)
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(grown.token_ids_BK[b].tolist(), grown.parents_BK[b].tolist(), strict=True):
            assert parent < len(paths)
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        assert sorted(paths) == sorted(path for path, _ in expected)
        assert sorted(grown.log_probs_BK[b].tolist()) == pytest.approx(sorted(score for _, score in expected))
    target = torch.randn(B, V, V, generator=generator)  # row by the last token, so both layouts can look it up
    alone = [emitted_by("greedy", own_tree(grown, b), target[b : b + 1]) for b in range(B)]
    assert emitted_by("greedy", share_shape(grown), target) == [row for rows in alone for row in rows]


def own_tree(grown, row):
    """A row's tree by itself, in its own shape."""
    return Proposal(grown.token_ids_BK[row : row + 1], None, grown.parents_BK[row])


def emitted_by(rule, proposal, target_BVV):
    """The tokens each row emits: accepted ones and the one after them. `target_BVV`: a row's law by the last token."""
    B = len(target_BVV)
    token_BK1 = torch.cat([torch.zeros(B, 1, dtype=torch.int64), proposal.token_ids_BK.clamp_min(0)], 1)
    result = resolve_rule(rule)(proposal, target_BVV[torch.arange(B)[:, None], token_BK1], None)
    return [
        [*proposal.token_ids_BK[b, result.path_BK[b, : result.num_accepted_B[b]]].tolist(), int(result.next_token_B[b])]
        for b in range(B)
    ]


def test_sampled_siblings_are_distinct_and_carry_the_law_they_were_drawn_from():
    parents = [-1, -1, -1, 0, 0]
    base = torch.tensor([0.5, 0.3, 0.15, 0.05])

    def law(slots, token_ids_BK):
        return base.expand(len(token_ids_BK), len(slots), 4)

    uniform = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    proposal = sample_tree(parents, law, uniform)
    tokens, probs = proposal.token_ids_BK, proposal.probs_BKV
    assert all(len(set(row[:3])) == 3 and row[3] != row[4] for row in tokens.tolist())
    assert torch.allclose(probs.sum(-1), torch.ones(4000, 5))
    assert (probs.gather(2, tokens[..., None]) > 0).all()
    assert (probs[:, 1].gather(1, tokens[:, :1]) == 0).all()  # the first sibling's token is out of the second's law
    second_given_first_is_0 = tokens[tokens[:, 0] == 0, 1]
    share = torch.bincount(second_given_first_is_0, minlength=4) / len(second_given_first_is_0)
    assert torch.allclose(share, torch.tensor([0.0, 0.6, 0.3, 0.1]), atol=0.05)
    assert torch.equal(sample_tree(parents, law, uniform, replacement=True).probs_BKV, base.expand(4000, 5, 4))


def test_siblings_beyond_the_last_token_are_absent():
    proposal = sample_tree([-1, -1, -1], lambda slots, tokens: torch.tensor([[[0.5, 0.5]]]), torch.rand(1, 3).double())
    assert sorted(proposal.token_ids_BK[0].tolist()) == [-1, 0, 1]


def test_rows_of_different_shapes_accept_together_what_each_accepts_alone():
    """Trees 1(2) 0 and 1 0(2); the shared shape has both kinds of child, so slot 1 is the second child of the root."""
    parents = torch.tensor([[-1, 0, -1], [-1, -1, 1]])
    tokens = torch.tensor([[1, 2, 0], [1, 0, 2]])
    grown = GrownTrees(tokens, parents, torch.zeros(2, 3))
    alone_target = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 0], [0, 1, 2, 1]]), 3).float()
    shared = share_shape(grown)
    assert shared.parents_K.tolist() == [-1, -1, 0, 1]
    assert shared.token_ids_BK.tolist() == [[1, 0, 2, -1], [1, 0, -1, 2]]
    shared_target = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 0, 0], [0, 1, 2, 0, 1]]), 3).float()
    for name in ("greedy", "strict", "standard"):
        rule = resolve_rule(name)
        for row, path, next_token in ((0, [0, 1, -1], 0), (1, [1, 2, -1], 1)):
            result = rule(with_point_laws(own_tree(grown, row), name), alone_target[row : row + 1], None)
            assert result.path_BK.tolist() == [path] and result.next_token_B.tolist() == [next_token]
        result = rule(with_point_laws(shared, name), shared_target, None)
        assert result.path_BK.tolist() == [[0, 2, -1, -1], [1, 3, -1, -1]]
        assert result.next_token_B.tolist() == [0, 1]


def with_point_laws(proposal, rule):
    """q written out, for the rule that reads it on trees (else it draws and matches)."""
    if rule != "standard":
        return proposal
    one_hot_BKV = torch.nn.functional.one_hot(proposal.token_ids_BK.clamp_min(0), 3).float()
    return replace(proposal, probs_BKV=one_hot_BKV)


def test_nothing_is_drafted_below_a_slot_that_stays_empty():
    tree = TokenTree.of([(0,), (1,), (2,), (0, 0), (2, 0), (2, 0, 0)])
    law = torch.tensor([0.7, 0.3])  # two tokens: no third best
    proposal = rank_tree(tree, lambda slots, _: law.expand(1, len(slots), 2), 1, torch.device("cpu"))
    assert proposal.token_ids_BK.tolist() == [[0, 1, -1, 0, -1, -1]]
    drawn = sample_tree(tree.parents, lambda slots, _: law.expand(1, len(slots), 2), torch.full((1, 6), 0.1).double())
    assert drawn.token_ids_BK.tolist() == [[0, 1, -1, 0, -1, -1]]


def test_of_a_parent_and_a_child_as_likely_the_parent_is_kept():
    root = torch.tensor([[0.6, 0.4, 0.0]]).log()

    def certain(frontier):
        return torch.tensor([0.0, 0.0, 1.0]).log().expand(1, 2, 3)

    for total_token, tokens, parents in ((2, [0], [-1]), (3, [0, 2], [-1, 0]), (4, [0, 1, 2], [-1, -1, 0])):
        grown = grow_dynamic_tree(root, certain, DynamicTreeShape(total_token, 1, 2))
        assert grown.token_ids_BK.tolist() == [tokens]
        assert grown.parents_BK.tolist() == [parents]
