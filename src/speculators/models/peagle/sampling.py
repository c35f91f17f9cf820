"""Conditional-on-distribution sampling: which masked slots are trained, fewer the deeper they lie.

Shapes: T columns of the packed row (after `shift_batch`), M slots, S seeds, D depths.

    column       0   1   2   3   4   5        supervised: 1 .. 5
    depth 0      0   1   2   3   4   5        every column, with its true token and state
    depth 1          1   .   3   4   5        a share r of the seeds: slot at s, hanging on anchor s - 1
    depth 2              .   .   4   5        a share r^2, among the columns after those of depth 1: anchor s - 2

A slot at depth d continues one at depth d - 1, so a chain has no gaps. Columns a + 1 .. a + d of a chain are supervised
and of the anchor's document: a chain that began in another document would be taught what it cannot know.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speculators.interfaces import PackedBatch
from speculators.model_training import LossArgs
from speculators.models.peagle.config import PEagleTrainingArgs


class Chains(NamedTuple):
    """Sampled slots, by anchor and depth."""

    anchors_M: Tensor
    depths_M: Tensor


def sample_chains(batch: PackedBatch, args: LossArgs[PEagleTrainingArgs]) -> Chains:
    """Drawn on the host, so that every device trains on the same slots."""
    own, generator = args.own, args.generator
    documents_T, supervised_T = batch.document_ids_T.cpu(), batch.supervised_T.cpu()
    continues_T = supervised_T.clone()  # the column may follow the one before it in a chain
    continues_T[:1] = False
    continues_T[1:] &= documents_T[1:] == documents_T[:-1]
    seeds_S = drawn(supervised_T.nonzero().squeeze(1), args.max_anchors, generator)
    anchors, depths = [seeds_S[:0]], [seeds_S[:0]]
    candidates = seeds_S[continues_T[seeds_S]]
    for depth in range(1, own.num_depths):
        num_slots = int(max(0, len(seeds_S) - depth) * max(own.down_sample_ratio**depth, own.down_sample_ratio_min))
        if num_slots <= 0:
            break
        columns = drawn(candidates, num_slots, generator)
        anchors.append(columns - depth)
        depths.append(torch.full_like(columns, depth))
        following = columns + 1
        following = following[following < len(supervised_T)]
        candidates = following[continues_T[following]]
    anchors_M, depths_M = torch.cat(anchors), torch.cat(depths)
    order_M = (anchors_M * own.num_depths + depths_M).argsort()
    device = batch.supervised_T.device
    return Chains(anchors_M[order_M].to(device), depths_M[order_M].to(device))


def drawn(columns: Tensor, most: int | None, generator: torch.Generator | None) -> Tensor:
    """At most so many of the columns, ascending."""
    if most is None or len(columns) <= most:
        return columns
    return columns[torch.randperm(len(columns), generator=generator)[:most]].sort().values
