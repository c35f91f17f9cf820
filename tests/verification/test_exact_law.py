"""The joint law of each rule, enumerated: every draft, every decision. Also that the same test catches wrong rules."""

from __future__ import annotations

import itertools

import pytest
import torch
from exact import (
    Drafted,
    Table,
    chain_parents,
    disjoint_tables,
    drafts_without_replacement,
    emitted_law,
    independent_drafts,
    largest_error,
    paths,
    random_table,
)

from speculators.decoding.verification import resolve_rule
from speculators.decoding.verification.chain import BlockRule, chain_verification, leading_run, residual_at
from speculators.interfaces import Proposal

TOLERANCE = 1e-10
KINDS = ["random", "sparse", "one-hot q", "one-hot p", "equal", "disjoint"]
TREES = [[-1, -1, -1], [-1, -1, 0], [-1, 0, -1, 2], [-1, -1, 0, 0], [-1, -1, 1, 0]]


def tables(kind: str, num_tokens: int, depth: int, seed: int) -> tuple[Table, Table]:
    """Verifier and draft conditionals; the verifier's are one token deeper."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "disjoint":
        return disjoint_tables(num_tokens, depth + 1, generator)
    p_kind = {"sparse": "sparse", "one-hot p": "one-hot"}.get(kind, "dense")
    q_kind = {"sparse": "sparse", "one-hot q": "one-hot"}.get(kind, "dense")
    target = random_table(num_tokens, depth + 1, p_kind, generator)
    draft = target if kind == "equal" else random_table(num_tokens, depth, q_kind, generator)
    return target, draft


@pytest.mark.parametrize("rule", ["strict", "standard", "block"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tokens", "num_slots"), [(3, 1), (3, 2), (3, 3), (4, 2)])
def test_chain_rules_emit_exactly_the_verifiers_joint_law(rule, kind, num_tokens, num_slots):
    target, draft = tables(kind, num_tokens, num_slots, seed=num_slots)
    drafts = independent_drafts(draft, chain_parents(num_slots), num_tokens)
    law, _ = emitted_law(resolve_rule(rule), drafts, target, num_tokens, None)
    assert sum(law.values()) == pytest.approx(1, abs=TOLERANCE)
    assert largest_error(law, target, num_tokens, num_slots + 1) < TOLERANCE


@pytest.mark.parametrize("rule", ["strict", "standard", "block"])
def test_ragged_drafts_keep_the_law(rule):
    target, draft = tables("random", 3, 3, seed=5)
    full = independent_drafts(draft, chain_parents(3), 3)
    for num_kept in range(3):
        drafts = [Drafted((*d.tokens[:num_kept], -1, *d.tokens[num_kept + 1 :]), d.probs_KV, d.weight) for d in full]
        law, _ = emitted_law(resolve_rule(rule), drafts, target, 3, None)
        assert largest_error(law, target, 3, 4) < TOLERANCE


@pytest.mark.parametrize(
    ("rule", "parents"), [("block", None), *itertools.product(["strict", "standard"], [None, *TREES])]
)
def test_drafts_without_a_draft_law_are_verified_as_point_masses(rule, parents):
    target, _ = tables("random", 3, 4, seed=6)
    tokens = (2, 0, 1) if parents is None else tuple(distinct_siblings(parents))
    law, accepted = emitted_law(resolve_rule(rule), [Drafted(tokens, None, 1.0)], target, 3, parents)
    assert largest_error(law, target, 3, 4) < TOLERANCE
    own_paths = paths(tokens, parents or chain_parents(3))
    value = sum(torch.stack([target[path[:i]][path[i]] for i in range(len(path))]).prod() for path in own_paths)
    assert accepted == pytest.approx(float(value))  # the value of a tree: the sum of its nodes' path probabilities


def test_a_point_mass_written_out_as_probabilities_changes_nothing():
    target, _ = tables("random", 3, 3, seed=6)
    one_hot = torch.nn.functional.one_hot(torch.tensor([2, 0, 1]), 3).double()
    results = [
        emitted_law(resolve_rule(rule), [Drafted((2, 0, 1), probs, 1.0)], target, 3, None)
        for rule in ("standard", "block")
        for probs in (None, one_hot)
    ]
    for law, accepted in results:
        assert accepted == pytest.approx(results[0][1])  # block verification gains nothing on point masses
        assert {k: v for k, v in law.items() if v > 1e-15} == pytest.approx(results[0][0])


def test_greedy_emits_the_argmax_path_and_sampling_rules_agree_on_one_hot_rows():
    generator = torch.Generator().manual_seed(3)
    target = random_table(3, 4, "one-hot", generator)
    best: tuple[int, ...] = ()
    for _ in range(4):
        best = (*best, int(target[best].argmax()))
    for parents in (None, *TREES):
        draft = random_table(3, 4, "dense", generator)
        num_slots = 3 if parents is None else len(parents)
        drafts = independent_drafts(draft, parents or chain_parents(num_slots), 3)
        greedy, length = emitted_law(resolve_rule("greedy"), drafts, target, 3, parents)
        assert all(tokens == best[: len(tokens)] for tokens in greedy)
        for rule in ("strict", "standard") if parents else ("strict", "standard", "block"):
            law, accepted = emitted_law(resolve_rule(rule), drafts, target, 3, parents)
            assert all(tokens == best[: len(tokens)] for tokens in law)
            assert accepted == pytest.approx(length)


# Without replacement a law must have as many tokens as there are siblings: no one-hot, disjoint or (3 wide) sparse q.
TREE_CASES = [
    *itertools.product([independent_drafts], KINDS, TREES),
    *itertools.product([drafts_without_replacement], ["random", "one-hot p", "equal"], TREES),
    *itertools.product([drafts_without_replacement], ["sparse"], TREES[1:]),
]


@pytest.mark.parametrize(("drawn", "kind", "parents"), TREE_CASES)
def test_tree_rules_are_exact_when_q_is_the_law_each_sibling_was_drawn_from(drawn, kind, parents):
    depth = max(len(path) for path in paths((0,) * len(parents), parents))
    target, draft = tables(kind, 3, depth, seed=len(parents))
    drafts = drawn(draft, parents, 3)
    for rule in ("standard", "strict"):
        law, _ = emitted_law(resolve_rule(rule), drafts, target, 3, parents)
        assert largest_error(law, target, 3, depth + 1) < TOLERANCE


def test_expected_acceptance_is_the_papers():
    for num_slots in (1, 2, 3):
        for seed in range(5):
            target, draft = tables("random", 3, num_slots, seed=seed)
            drafts = independent_drafts(draft, chain_parents(num_slots), 3)
            expected = {
                name: emitted_law(resolve_rule(name), drafts, target, 3, None)[1] for name in ("standard", "block")
            }
            formula = 0.0
            for d in drafts:
                survival = 1.0
                for i, token in enumerate(d.tokens):
                    survival *= min(1.0, float(target[d.tokens[:i]][token] / draft[d.tokens[:i]][token]))
                    formula += d.weight * survival
            assert expected["standard"] == pytest.approx(formula)
            assert expected["block"] >= expected["standard"] - 1e-12
            if num_slots == 1:
                assert expected["block"] == pytest.approx(expected["standard"])


def test_block_verification_accepts_strictly_more_on_the_papers_example():
    """Sun et al. section 2: p = (1/3, 2/3), q = (2/3, 1/3) whatever the context, two drafts: 10/9 against 11/9."""
    prefixes = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    target = {prefix: torch.tensor([1.0, 2.0]).double() / 3 for prefix in prefixes}
    draft = {prefix: torch.tensor([2.0, 1.0]).double() / 3 for prefix in prefixes}
    drafts = independent_drafts(draft, chain_parents(2), 2)
    assert emitted_law(resolve_rule("standard"), drafts, target, 2, None)[1] == pytest.approx(10 / 9)
    assert emitted_law(resolve_rule("block"), drafts, target, 2, None)[1] == pytest.approx(11 / 9)


# Wrong rules: each must be far outside the tolerance that the right ones meet.


def wrong_standard(recover):
    def rule(proposal: Proposal, target_probs_BK1V, draws):
        standard = resolve_rule("standard")
        num_accepted_B = leading_run(draws.accept(standard.accept_probs(proposal, target_probs_BK1V)))
        row_B = torch.arange(len(num_accepted_B))
        p_BV = target_probs_BK1V[row_B, num_accepted_B]
        q_BV = proposal.probs_BKV[row_B, num_accepted_B.clamp(max=proposal.token_ids_BK.shape[1] - 1)]
        is_bonus_B1 = (num_accepted_B == proposal.token_ids_BK.shape[1])[:, None]
        next_BV = torch.where(is_bonus_B1, p_BV, recover(p_BV, q_BV))
        return chain_verification(num_accepted_B, next_BV, proposal.token_ids_BK.shape[1], draws)

    return rule


def block_stopping_at_the_first_failure(proposal: Proposal, target_probs_BK1V, draws):
    block = BlockRule()
    prefix_BK1 = block.prefix_weights(proposal, target_probs_BK1V)
    num_accepted_B = leading_run(draws.accept(block.accept_probs(proposal, target_probs_BK1V, prefix_BK1)))
    kept_B = prefix_BK1.gather(1, num_accepted_B[:, None])[:, 0]
    next_BV = residual_at(num_accepted_B, proposal, target_probs_BK1V, target_scale_B=kept_B)
    return chain_verification(num_accepted_B, next_BV, proposal.token_ids_BK.shape[1], draws)


@pytest.mark.parametrize(
    "rule",
    [
        wrong_standard(lambda p, q: (p - q).clamp_min(0)),  # not normalised
        wrong_standard(lambda p, q: p),  # recovered from p
        wrong_standard(lambda p, q: (p - q).abs() / (p - q).abs().sum(-1, keepdim=True)),
        block_stopping_at_the_first_failure,
    ],
)
def test_wrong_chain_rules_are_caught(rule):
    target, draft = tables("random", 3, 2, seed=2)
    law, _ = emitted_law(rule, independent_drafts(draft, chain_parents(2), 3), target, 3, None)
    assert largest_error(law, target, 3, 3) > 1e-3


def test_a_draft_law_other_than_the_one_drawn_from_is_caught():
    target, draft = tables("random", 3, 2, seed=2)
    drafts = independent_drafts(draft, chain_parents(2), 3)
    flat = torch.full((2, 3), 1 / 3).double()
    law, _ = emitted_law(resolve_rule("standard"), [Drafted(d.tokens, flat, d.weight) for d in drafts], target, 3, None)
    assert largest_error(law, target, 3, 3) > 1e-3


def test_siblings_drawn_without_replacement_but_tested_as_independent_are_caught():
    target, draft = tables("random", 3, 1, seed=2)
    drafts = drafts_without_replacement(draft, [-1, -1], 3)
    as_if = torch.stack([draft[()], draft[()]])
    law, _ = emitted_law(
        resolve_rule("standard"), [Drafted(d.tokens, as_if, d.weight) for d in drafts], target, 3, [-1, -1]
    )
    assert largest_error(law, target, 3, 2) > 1e-3


def test_reranked_samples_are_caught_and_sample_and_match_survives_them():
    target, draft = tables("random", 3, 1, seed=2)
    drafts = [
        Drafted(tuple(sorted(d.tokens, key=lambda token: -draft[()][token])), d.probs_KV, d.weight)
        for d in independent_drafts(draft, [-1, -1, -1], 3)
    ]
    law, _ = emitted_law(resolve_rule("standard"), drafts, target, 3, [-1, -1, -1])
    assert largest_error(law, target, 3, 2) > 1e-3
    law, _ = emitted_law(resolve_rule("strict"), drafts, target, 3, [-1, -1, -1])
    assert largest_error(law, target, 3, 2) < TOLERANCE


def distinct_siblings(parents: list[int]) -> list[int]:
    return [sum(parents[other] == parent for other in range(slot)) for slot, parent in enumerate(parents)]
