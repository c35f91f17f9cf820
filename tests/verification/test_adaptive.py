"""Draft length from confidence and cost: formulas by hand and brute force, control in simulation, losslessness."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from exact import Drafted, chain_parents, emitted_law, independent_drafts, largest_error, random_table

from speculators.decoding.adaptive import (
    AcceptanceRates,
    AdaptiveLength,
    best_num_tokens,
    expected_columns,
    expected_tokens,
    lengths_within_budget,
    speeds_by_num_tokens,
)
from speculators.decoding.measurements import ConfidenceFit, CostMeter, CostModel, interpolate, rising
from speculators.decoding.verification import resolve_rule
from speculators.interfaces import Proposal


def test_expected_tokens_by_hand():
    assert expected_tokens([]) == 1
    assert expected_tokens([0.5, 0.5]) == pytest.approx(1 + 0.5 + 0.25)
    assert expected_tokens([0.8] * 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))  # Leviathan's closed form
    assert expected_tokens([1.0] * 3) == 4


def test_costs_are_linear_between_measured_points():
    points = {1: 1.0, 5: 2.0, 9: 4.0}
    assert [interpolate(points, n) for n in (1, 3, 5, 7, 13)] == [1.0, 1.5, 2.0, 3.0, 6.0]
    assert interpolate({4: 2.0}, 100) == 2.0


def best(rates, cost, *sizes):
    return best_num_tokens(speeds_by_num_tokens(rates, cost, *sizes))


def test_the_best_k_includes_none_at_all():
    free = CostModel(other_s=(0.0,) * 5, verify_s={1: 1.0, 5: 1.0})
    assert best([0.9, 0.5, 0.1, 0.01], free) == 4
    assert best([0.0, 0.0], free) == 0  # the smallest of equals
    dear = CostModel(other_s=(0.0, 0.5, 1.0), verify_s={1: 1.0, 3: 1.0})
    assert best([0.4, 0.4], dear) == 0
    assert best([0.9, 0.1], dear) == 1
    # a batch that makes verification pay by the token
    compute_bound = CostModel(other_s=(0.0,) * 4, verify_s={1: 1.0, 8: 1.0, 64: 8.0})
    assert best([0.7] * 3, compute_bound, 1) == 3
    assert best([0.7] * 3, compute_bound, 16) == 0


def test_one_row_that_drafts_widens_the_forward_of_all():
    assert expected_columns([0.5, 0.5], 1) == 2
    assert expected_columns([0.5, 0.25], 2) == pytest.approx(1 + 3 / 4 + 7 / 16)
    assert expected_columns([1.0] * 3, 5) == 4
    by_the_token = CostModel(other_s=(0.0,) * 5, verify_s={1: 1.0, 5: 1.5, 8: 1.5, 40: 3.0})
    seldom_offered = [0.2, 1.0, 1.0, 1.0]  # a row that has a draft keeps it whole
    assert best(seldom_offered, by_the_token, 1, [0.2] * 4) == 4
    assert best(seldom_offered, by_the_token, 8, [0.2] * 4) == 0


def test_widths_equal_the_best_of_all_combinations_of_lengths():
    generator = torch.Generator().manual_seed(0)
    cost = CostModel((0.1, 0.2, 0.3, 0.4), {2: 1.0, 4: 1.1, 8: 3.0})
    for _ in range(50):
        confidence = torch.rand(2, 3, generator=generator)
        survival = confidence.double().cumprod(-1)

        def speed(lengths, survival=survival):
            tokens = 2 + sum(float(survival[row, :length].sum()) for row, length in enumerate(lengths))
            return tokens / cost.round_s(3, 2 * (1 + max(lengths)))

        most = max(map(speed, itertools.product(range(4), repeat=2)))
        assert speed(lengths_within_budget(confidence, cost).tolist()) == pytest.approx(most)
    absent = torch.tensor([[0.9, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    assert lengths_within_budget(absent, CostModel((0.0,) * 4, {2: 1.0, 8: 1.0})).tolist() == [1, 0]


def test_rates_are_conditional_and_forget():
    rates = AcceptanceRates(3, prior_tests=1e-9, memory_rounds=50)
    for _ in range(500):
        rates.observe(3, [3], [1])  # the first passes, the second fails, the third is never tested
    assert rates.conditional()[:2] == pytest.approx([1.0, 0.0], abs=1e-6)
    assert rates.tested[2] == 0
    for _ in range(500):
        rates.observe(3, [3], [0])
    assert rates.conditional()[0] == pytest.approx(0.0, abs=1e-3)


def test_a_draft_that_was_asked_for_and_not_offered_counts_as_refused():
    rates = AcceptanceRates(3, prior_tests=1e-9, memory_rounds=1e9)
    for _ in range(100):
        rates.observe(2, [0, 0, 0, 2], [0, 0, 0, 2])
    assert rates.conditional()[:2] == pytest.approx([0.25, 1.0])
    assert rates.offers() == pytest.approx([0.25, 0.25, 1.0])  # nobody asked for the third
    assert rates.when_offered()[:2] == pytest.approx([1.0, 1.0])


def test_confidence_is_calibrated_by_what_is_accepted():
    rng, fit = random.Random(0), ConfidenceFit()
    before = fit.rate(0.9)
    for _ in range(3000):
        prob = rng.uniform(0.05, 0.95)
        fit.observe(prob, rng.random() < prob)  # perfectly calibrated: slope 1, bias 0
    assert (fit.slope, fit.bias) == pytest.approx((1.0, 0.0), abs=0.25)
    assert abs(fit.rate(0.9) - 0.9) < abs(before - 0.9)


def test_drafts_of_few_rows_do_not_widen_the_forward_of_all():
    controller = AdaptiveLength(2)
    for _ in range(200):  # half of the drafts pass; a forward costs by the token
        asked = controller.num_tokens(8)
        accepted = [0, min(asked, 2)] * 4
        controller.observe([asked] * 8, accepted, verify_s=1.0 + 0.25 * asked, other_s=0.01 * asked)
    controller.is_probe = False
    one, most = torch.full((8, 2), -1), torch.full((8, 2), 5)
    one[3] = 5
    most[3] = -1
    assert controller.shorten(Proposal(one)).token_ids_BK.shape == (8, 0)
    assert torch.equal(controller.shorten(Proposal(most)).token_ids_BK, most)
    drawn = Proposal(one, probs_BKV=torch.full((8, 2, 10), 0.1))
    assert controller.shorten(drawn) is drawn  # a drawn token may not be dropped for what else was drawn


def test_idle_rows_cost_as_much_as_others():
    controller = AdaptiveLength(2)
    controller.num_tokens(8)
    controller.observe([2], [1], verify_s=1.0, other_s=0.1)
    assert controller.costs.verify_s == {8 * 3: 1.0}


def test_rounds_that_were_broken_off_teach_nothing():
    controller = AdaptiveLength(2)
    assert [controller.num_tokens(1) for _ in range(6)] == [2, 1, 0, 2, 2, 2]


def simulate(controller, rates, cost, num_rounds, batch_size, rng):
    """(tokens, seconds) of a decoder whose drafts are accepted at the given conditional rates."""
    tokens, seconds = 0, 0.0
    for _ in range(num_rounds):
        k = controller.num_tokens(batch_size)
        accepted = []
        for _ in range(batch_size):
            n = 0
            while n < k and rng.random() < rates[n]:
                n += 1
            accepted.append(n)
        noise = rng.uniform(0.9, 1.2)
        draft_s, verify_s = cost.other_s[k] * noise, interpolate(cost.verify_s, batch_size * (k + 1)) * noise
        controller.observe([k] * batch_size, accepted, verify_s=verify_s, other_s=draft_s)
        tokens, seconds = tokens + sum(accepted) + batch_size, seconds + draft_s + verify_s
    return tokens, seconds


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_adapted_length_is_near_the_best_fixed_one_and_never_much_slower_than_plain(rate, batch_size):
    rates = [rate * 0.95**i for i in range(5)]
    cost = CostModel(tuple(0.15 * k for k in range(6)), {1: 1.0, 8: 1.0, 48: 3.0})
    tokens, seconds = simulate(AdaptiveLength(5), rates, cost, 3000, batch_size, random.Random(1))
    speeds = [
        batch_size * expected_tokens(rates[:k]) / (cost.round_s(k, batch_size * (k + 1)) * 1.05) for k in range(6)
    ]
    assert tokens / seconds > 0.93 * max(speeds)
    assert tokens / seconds > 0.96 * speeds[0]


@pytest.mark.parametrize("num_broken_off", [0, 1, 5])
def test_a_drafter_that_becomes_good_is_noticed(num_broken_off):
    cost = CostModel(tuple(0.1 * k for k in range(5)), {1: 1.0, 5: 1.1})
    controller, rng = AdaptiveLength(4), random.Random(2)
    for _ in range(num_broken_off):  # first rounds of which nothing was learnt
        controller.num_tokens(1)
    simulate(controller, [0.0] * 4, cost, 400, 1, rng)
    assert controller.current == 0
    simulate(controller, [0.95] * 4, cost, 2000, 1, rng)
    assert controller.current >= 3


def test_one_slow_round_changes_costs_by_less_than_its_share():
    meter = CostMeter()
    for seconds in (1.0, 1.0, 50.0, 1.0):
        meter.observe(2, 3, verify_s=seconds, other_s=0.1)
    assert meter.model(3).round_s(2, 3) < 1.5
    assert CostMeter().model(3) is None


def test_more_never_costs_less_and_the_newer_measurement_is_right():
    assert rising({1: 3.0, 5: 2.0}) == {1: 2.0, 5: 2.0}  # 5 was measured last
    assert rising({5: 2.0, 1: 3.0}) == {1: 3.0, 5: 3.0}
    assert rising({1: 1.0, 8: 9.0, 2: 4.0, 4: 2.0}) == {1: 1.0, 2: 2.0, 4: 2.0, 8: 9.0}
    assert rising({1: 1.0, 2: 1.5, 3: 2.5}) == {1: 1.0, 2: 1.5, 3: 2.5}
    meter = CostMeter()
    meter.observe(2, 3, verify_s=1.0, other_s=0.1)
    meter.observe(0, 1, verify_s=1.0, other_s=0.3)
    assert meter.model(2).other_s == (0.3, 0.3, 0.3)


@pytest.mark.parametrize("slow_rounds", [[5], [1, 2, 3, 4, 5, 6]])
def test_a_slow_start_does_not_make_useless_drafts_look_free(slow_rounds):
    """A model's first rounds are slow; round 5 is the first plain one. Drafts that cost 4 % and are never right."""
    cost = CostModel(tuple(0.01 * k for k in range(5)), {1: 1.0, 5: 1.0})
    controller, seconds = AdaptiveLength(4), 0.0
    for number in range(1, 1001):
        k = controller.num_tokens(1)
        slowness = 4.0 if number in slow_rounds else 1.0
        draft_s, verify_s = cost.other_s[k] * slowness, interpolate(cost.verify_s, k + 1) * slowness
        controller.observe([k], [0], verify_s=verify_s, other_s=draft_s)
        seconds += draft_s + verify_s if number not in slow_rounds else 0.0
    assert seconds / (1000 - len(slow_rounds)) < 1.006  # 1.04 where plain rounds are thought to be slow


def test_a_drafter_with_much_to_catch_up_on_is_seldom_asked():
    """Its probes cost a tenth of a plain round for each round that it was left alone."""
    controller, asked_at, seconds = AdaptiveLength(4), 0, 0.0
    for number in range(1, 3001):
        k = controller.num_tokens(1)
        draft_s = 0.05 * k + 0.1 * (number - asked_at) if k else 0.0
        asked_at = number if k else asked_at
        controller.observe([k], [0], verify_s=1.0 + 0.1 * k, other_s=draft_s)
        seconds += 1.0 + 0.1 * k + draft_s
    # it has to read each of the 3000 tokens at a tenth of a round to be asked to the end
    assert seconds < 1.1 * 3000


def test_a_cheap_drafter_is_tried_again_soon():
    """N-gram lookup finds nothing in a new text, and all the more once the text repeats itself."""
    cost = CostModel(tuple(0.01 * k for k in range(5)), {1: 1.0, 5: 1.1})
    controller, rng = AdaptiveLength(4), random.Random(5)
    simulate(controller, [0.0] * 4, cost, 100, 1, rng)
    assert controller.current == 0
    simulate(controller, [0.95] * 4, cost, 100, 1, rng)
    assert controller.current >= 3


def test_plain_decoding_that_became_cheap_is_noticed():
    """A neighbour leaves the machine: what a plain round cost before is no measure of it now."""
    rates, rng, controller = [0.5] * 4, random.Random(3), AdaptiveLength(4)
    crowded = CostModel(tuple(0.05 * k for k in range(5)), {1: 1.0, 5: 1.05})
    simulate(controller, rates, crowded, 1000, 1, rng)
    assert controller.current >= 2
    simulate(controller, rates, CostModel(crowded.other_s, {1: 0.2, 5: 1.05}), 1000, 1, rng)
    assert controller.current == 0


def cut_by(decide):
    """Drafts of which slot i is kept while `decide(q_i, d_i)` holds for it and all before it."""

    def cut(draft: Drafted) -> Drafted:
        keep = 0
        while keep < len(draft.tokens) and decide(draft.probs_KV[keep], draft.tokens[keep]):
            keep += 1
        tokens = draft.tokens[:keep] + (-1,) * (len(draft.tokens) - keep)
        return Drafted(tokens, draft.probs_KV, draft.weight)

    return cut


@pytest.mark.parametrize("rule", ["standard", "block", "strict"])
def test_stopping_by_the_law_is_lossless_and_stopping_by_the_drawn_token_is_not(rule):
    generator = torch.Generator().manual_seed(7)
    target, draft = random_table(3, 3, "dense", generator), random_table(3, 2, "dense", generator)
    drafts = independent_drafts(draft, chain_parents(2), 3)
    bar = float(draft[()].max()) - 1e-9
    by_law = [cut_by(lambda q, token: float(q.max()) > bar)(d) for d in drafts]
    assert len({sum(token >= 0 for token in d.tokens) for d in by_law}) > 1  # some are cut, some are not
    law, _ = emitted_law(resolve_rule(rule), by_law, target, 3, None)
    assert largest_error(law, target, 3, 3) < 1e-10
    by_token = [cut_by(lambda q, token: float(q[token]) > 0.4)(d) for d in drafts]
    law, _ = emitted_law(resolve_rule(rule), by_token, target, 3, None)
    if rule == "strict":  # emits the verifier's own draws whatever was drafted
        assert largest_error(law, target, 3, 3) < 1e-10
    else:
        assert largest_error(law, target, 3, 3) > 1e-3
