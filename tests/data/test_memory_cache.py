"""States kept in memory: the same values, each computed once, and the same bits whatever was asked first."""

from __future__ import annotations

import torch

from speculators.data_generation.sources.cached import MemoryCachedSource, groups_of
from speculators.interfaces import CaptureSpec, VerifierStates


class Counting:
    """Gives states that say in which forward they were made."""

    capture = CaptureSpec((1,), True)

    def __init__(self):
        self.forwards: list[list[list[int]]] = []

    def read(self, token_ids):
        if not token_ids:
            return []
        self.forwards.append([ids.tolist() for ids in token_ids])
        mark = float(sum(map(sum, self.forwards[-1])))
        return [VerifierStates(ids, ids[:, None] * mark, -ids[:, None] * mark) for ids in token_ids]


ROWS = [torch.arange(1, 1 + length) + 10 * index for index, length in enumerate((3, 5, 4, 2))]


def test_groups_are_of_similar_length_and_of_what_fits():
    assert groups_of([3, 0, 5, 4, 9], max_tokens=12) == [[2, 3, 0]]
    assert groups_of([4096, 3, 2000], max_tokens=10**6) == [[0], [2, 1]]
    assert groups_of([3, 5], max_tokens=0) == []
    assert groups_of([300, 200, 120, 90], max_tokens=10**6, group_tokens=512) == [[0], [1, 2], [3]]


def cached(inner, **sizes) -> MemoryCachedSource:
    return MemoryCachedSource(inner, [len(row) for row in ROWS], ROWS.__getitem__, **sizes)


def test_each_row_is_computed_once_and_what_does_not_fit_every_time():
    inner = Counting()
    cache = cached(inner, bytes_per_token=10, budget_bytes=120)  # 12 tokens: rows 0, 1, 2
    for _ in range(3):
        states = cache.read([ROWS[3], ROWS[1], ROWS[0]])
        assert [len(of_row.token_ids_T) for of_row in states] == [2, 5, 3]
        assert torch.equal(states[1].token_ids_T, ROWS[1])
    of_row_3 = [ROWS[3].tolist()]
    assert inner.forwards == [[ROWS[row].tolist() for row in (1, 2, 0)], of_row_3, of_row_3, of_row_3]


def test_bits_do_not_depend_on_what_was_asked_first():
    def last_states(order):
        cache = cached(Counting(), bytes_per_token=1, budget_bytes=10**6)
        for row in order:
            cache.read([ROWS[row]])
        return [cache.read([ids])[0].aux_TD for ids in ROWS]

    for left, right in zip(last_states([0, 1, 2, 3]), last_states([3, 1]), strict=True):
        assert torch.equal(left, right)
