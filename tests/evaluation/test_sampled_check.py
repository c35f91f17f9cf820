"""The two-sample test: silent for one law, loud for two, also where only the joint law differs."""

from __future__ import annotations

import numpy as np
import pytest

from speculators.evaluation.statistics import similarity, two_sample_p_value


def draws(rng: np.random.Generator, probs: list[float], num_answers: int = 64, length: int = 6) -> list[list[int]]:
    return rng.choice(len(probs), p=probs, size=(num_answers, length)).tolist()


def test_likeness_counts_agreeing_positions_and_the_common_beginning():
    # "1 2 3" and "1 9 3" agree at two positions, and begin alike for one
    assert similarity([[1, 2, 3], [1, 9, 3]]).tolist() == [[6, 3], [3, 6]]


def test_p_values_of_one_law_are_uniform():
    rng = np.random.default_rng(0)
    probs = [0.5, 0.3, 0.2]
    p_values = [
        two_sample_p_value([draws(rng, probs, 20)], [draws(rng, probs, 20)], num_permutations=200, seed=i)
        for i in range(200)
    ]
    # Kolmogorov-Smirnov distance to the uniform law, critical value at 0.001
    distance = np.abs(np.sort(p_values) - (np.arange(200) + 0.5) / 200).max()
    assert distance < 1.95 / np.sqrt(200) + 0.01


def test_another_law_is_found():
    rng = np.random.default_rng(0)
    plain = [draws(rng, [0.5, 0.3, 0.2]) for _ in range(4)]
    other = [draws(rng, [0.35, 0.45, 0.2]) for _ in range(4)]
    assert two_sample_p_value(plain, other) < 0.001


def test_equal_marginals_with_another_joint_law_are_found():
    rng = np.random.default_rng(0)
    independent = [draws(rng, [0.5, 0.5], 128, 2)]
    first = rng.integers(0, 2, 128)
    copied = [np.stack([first, first], axis=1).tolist()]
    assert two_sample_p_value(independent, copied) < 0.001


def test_answers_of_different_lengths_are_compared():
    rng = np.random.default_rng(0)
    plain = [draws(rng, [0.5, 0.5])]
    stopping_early = [[answer[:3] for answer in draws(rng, [0.5, 0.5])]]
    assert two_sample_p_value(plain, stopping_early) == pytest.approx(1 / 2001)
