"""Verifier states kept in memory, so that later epochs of a small dataset cost no verifier forwards.

A row's states depend in their last bits on which rows share its forward. A run that is resumed must see the bits the
whole run saw, so the rows that are kept, and the groups they are computed in, follow from the dataset and the budget
alone: never from the order in which they are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speculators.interfaces import HiddenStateSource, VerifierStates

MAX_GROUP_TOKENS = 4096
"""Tokens computed together. More saves little; the first batch waits for its groups."""


class KeptInMemory:
    """A `HiddenStateSource` over one that computes."""

    def __init__(
        self,
        inner: HiddenStateSource,
        lengths: Sequence[int],
        row: Callable[[int], Tensor],
        *,
        bytes_a_token: int,
        budget_bytes: int,
    ):
        """`row(i)` are the `lengths[i]` tokens of a sequence that will be asked for; the first that fit are kept."""
        self.inner = inner
        self.capture = inner.capture
        self.groups = groups_of(lengths, budget_bytes // max(1, bytes_a_token))
        self.rows = {index: row(index) for group in self.groups for index in group}
        self.row_of = {key_of(ids): index for index, ids in self.rows.items()}
        self.group_of = {index: group for group in self.groups for index in group}
        self.kept: dict[int, VerifierStates] = {}
        self.lock = threading.Lock()

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        wanted = [self.row_of.get(key_of(ids)) for ids in token_ids]
        for row in wanted:
            if row is not None:
                self.keep(self.group_of[row], row)
        rest = iter(self.inner.read([ids for ids, row in zip(token_ids, wanted, strict=True) if row is None]))
        return [next(rest) if row is None else self.kept[row] for row in wanted]

    def keep(self, group: list[int], row: int) -> None:
        with self.lock:  # threads that read ahead: a second one asking for this group waits for the first
            if row not in self.kept:
                computed = self.inner.read([self.rows[member] for member in group])
                self.kept |= {member: detached(states) for member, states in zip(group, computed, strict=True)}


def groups_of(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The first rows that fit `max_tokens`, grouped by similar length (least padding), empty rows left out."""
    kept, total = [], 0
    for row, length in enumerate(lengths):
        total += length
        if total > max_tokens:
            break
        if length:
            kept.append(row)
    groups: list[list[int]] = []
    for row in sorted(kept, key=lambda row: (-lengths[row], row)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= MAX_GROUP_TOKENS:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def key_of(token_ids: Tensor) -> bytes:
    return token_ids.to("cpu", torch.int64).numpy().tobytes()


def detached(states: VerifierStates) -> VerifierStates:
    """On the CPU, and no view into the batch it was computed in."""
    aux_TD, last_TH = (
        None if values is None else values.cpu().clone() for values in (states.aux_TD, states.last_hidden_TH)
    )
    return VerifierStates(states.token_ids_T.cpu(), aux_TD, last_TH)
