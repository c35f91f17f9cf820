"""Both acceptance lengths of a run, by hand: five rounds of a drafter that finds nothing in two of them."""

from collections import Counter

from speculators.decoding.stats import DecodeStats


def test_rounds_without_a_draft_count_for_one_length_and_not_for_the_other():
    stats = DecodeStats()
    for drafted, accepted in [(0, 0), (3, 3), (3, 0), (0, 0), (2, 1)]:
        stats.record(drafted, drafted, accepted)
    assert (stats.num_rounds, stats.num_drafts, stats.num_accepted) == (5, 3, 4)
    assert stats.acceptance_length == 1 + 4 / 5
    assert stats.acceptance_length_when_drafted == 1 + 4 / 3
    assert DecodeStats().acceptance_length_when_drafted == 1.0


def test_a_tree_counts_as_one_draft():
    stats = DecodeStats()
    stats.record(12, 3, 2)
    assert (stats.num_drafts, stats.num_drafted, stats.acceptance_length_when_drafted) == (1, 12, 3.0)
    assert stats.drafted_per_position == [1, 1, 1] and stats.accepted_per_position == [1, 1, 0]


def test_a_position_that_was_not_drafted_is_no_rejection_of_it():
    # two rounds drafted one token and kept it, one drafted three and kept two, four found nothing to draft
    stats = DecodeStats(Counter({(1, 1, 1): 2, (3, 3, 2): 1, (0, 0, 0): 4}))
    assert stats.drafted_per_position == [3, 1, 1]
    assert stats.accepted_per_position == [3, 1, 0]
    assert stats.conditional_rates == [1.0, 1.0, 0.0]
    assert stats.accepted_histogram == [4, 2, 1, 0]
    assert stats.acceptance_rate == 4 / 5
