from __future__ import annotations

import pytest

from speculators.train.schedulers import Schedule, make_schedule


def test_linear_rises_over_the_warmup_then_falls_to_zero():
    scales = [Schedule("linear", 2, 6).scale(step) for step in range(7)]
    assert scales == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_is_half_at_half_way_and_none_stays():
    assert [Schedule("cosine", 0, 4).scale(step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert [Schedule("none", 0, 4).scale(step) for step in (0, 2, 9)] == [1.0, 1.0, 1.0]


def test_it_stays_at_zero_past_the_end():
    assert Schedule("linear", 0, 4).scale(10) == 0.0


@pytest.mark.parametrize(
    ("options", "warmup", "total"),
    [
        ({}, 10, 1000),
        ({"warmup_ratio": 0.2}, 200, 1000),
        ({"warmup_steps": 7}, 7, 1000),
        ({"total_steps": 500}, 5, 500),
    ],
)
def test_where_the_numbers_come_from(options, warmup, total):
    schedule = make_schedule("linear", 1000, **options)
    assert (schedule.num_warmup_steps, schedule.num_steps) == (warmup, total)


def test_steps_win_over_the_ratio_and_a_ratio_is_a_share():
    with pytest.warns(UserWarning, match="the steps count"):
        assert make_schedule("linear", 100, warmup_steps=3, warmup_ratio=0.5).num_warmup_steps == 3
    with pytest.raises(ValueError, match=r"scheduler_warmup_ratio=1\.5 .* within 0\.\.1"):
        make_schedule("linear", 100, warmup_ratio=1.5)
