from __future__ import annotations

import pytest
import torch

from speculators.losses.metrics import MetricSums, expected_acceptance_length, normalize_counted_metrics


def test_pairs_are_divided_orphans_dropped_and_the_rest_averaged():
    metrics = {"acc_sum": 3, "acc_total": 4, "none_sum": 5, "none_total": 0, "lonely_total": 7, "loss_step_0": 6.0}
    assert normalize_counted_metrics(metrics, world_size=2) == {"acc": 0.75, "none": 0.0, "loss_step_0": 3.0}


def test_a_pair_wins_over_a_plain_key_of_the_same_name():
    for metrics in ({"loss": 8.0, "loss_sum": 1, "loss_total": 2}, {"loss_sum": 1, "loss_total": 2, "loss": 8.0}):
        assert normalize_counted_metrics(metrics) == {"loss": 0.5}


def test_steps_add_up_by_numerator_and_denominator():
    sums = MetricSums()
    sums.add({"acc_sum": torch.tensor(1.0), "acc_total": torch.tensor(1), "loss": torch.tensor(2.0)})
    sums.add({"acc_sum": torch.tensor(0.0), "acc_total": torch.tensor(3), "loss": torch.tensor(4.0)})
    assert sums.values() == {"acc": 0.25, "loss": 3.0}  # 1 of 4 tokens right, not the mean of 1 and 0


def test_acceptance_length_counts_the_bonus_token():
    assert expected_acceptance_length({"full_acc_0": 0.8, "full_acc_1": 0.5, "cond_acc_0": 0.8}) == pytest.approx(2.3)
    assert expected_acceptance_length({"eal": 3.25, "full_acc": 0.9}) == 3.25
    assert expected_acceptance_length({"loss": 1.0}) is None
