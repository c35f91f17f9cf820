"""Verification of draft trees: walk down from the last committed token, at each node choose a child or stop.

Shapes: B sequences, K tree nodes (slots), V verifier vocabulary; K1 = K + 1 target rows: row 0 follows the last
committed token, row j + 1 follows node j. `parents_K[j]` is node j's parent (-1 = the last committed token), parents
come first, siblings are tested in slot order. All rows share this topology: a slot holding -1 is absent from its row,
and so is everything below it.

    slot      0   1   2   3          a tree of two children of the root (0, 1), two below slot 0
    parent   -1  -1   0   0
    row       1   2   3   4          target row of the children OF the slot; row 0: children of the root

Lossless because: *sample-and-match* emits only the verifier's own draws, whatever the tree (its siblings must not
depend on those draws); *multi-round rejection* (SpecInfer, arXiv:2305.09781) tests each sibling against what the
earlier ones left of p, with q = the law THIS sibling was drawn from given the earlier ones: the parent's q for i.i.d.
draws, q without the earlier siblings (renormalised) for draws without replacement. Re-ranked draws have another law.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speculators.decoding.trees.token_tree import depths
from speculators.interfaces import Draws, Proposal, Verification
from speculators.nn.device import to_device


def greedy_tree(proposal: Proposal, best_BK1: Tensor) -> Verification:
    """Follow the verifier's argmax as long as some child carries it."""
    return _walk_matching(proposal, lambda node_B, depth: best_BK1.gather(1, node_B[:, None] + 1)[:, 0])


def sample_and_match_tree(proposal: Proposal, target_probs_BK1V: Tensor, draws: Draws) -> Verification:
    """Draw the verifier's token at each node reached and follow the child that carries it, if there is one.

    The same law as testing the siblings one by one with a point-mass q, with one draw per level.
    """
    row_B = torch.arange(target_probs_BK1V.shape[0], device=target_probs_BK1V.device)

    def draw(node_B: Tensor, depth: int) -> Tensor:
        return draws.pick(target_probs_BK1V[row_B, node_B + 1][:, None], torch.full_like(node_B, depth)[:, None])[:, 0]

    return _walk_matching(proposal, draw)


def multi_round_tree(proposal: Proposal, target_probs_BK1V: Tensor, draws: Draws) -> Verification:
    """Test siblings in slot order with min(1, p/q); a rejected one takes its q out of p before the next is tested."""
    assert proposal.parents_K is not None and proposal.probs_BKV is not None
    tokens_BK, parent_BK = proposal.token_ids_BK, parent_rows(proposal) - 1
    B, K = tokens_BK.shape
    row_B = torch.arange(B, device=tokens_BK.device)
    node_B = torch.full_like(row_B, -1)  # where each row stands
    left_BV = target_probs_BK1V[:, 0]  # what is left of the verifier's law there
    path_BK, depth_B = torch.full_like(tokens_BK, -1), torch.zeros_like(row_B)
    for slot in range(K):
        index_B1 = tokens_BK[:, slot, None].clamp_min(0)
        tested_B = (node_B == parent_BK[:, slot]) & (tokens_BK[:, slot] >= 0)
        draft_BV = proposal.probs_BKV[:, slot].to(left_BV.dtype)
        p_B, q_B = left_BV.gather(1, index_B1)[:, 0].double(), draft_BV.gather(1, index_B1)[:, 0].double()
        ratio_B = torch.where(q_B > 0, p_B / q_B.clamp_min(torch.finfo(q_B.dtype).tiny), 0.0).clamp(max=1.0)
        accepted_B = draws.accept(torch.where(tested_B, ratio_B, 0.0)[:, None], slot)[:, 0] & tested_B
        excess_BV = (left_BV - draft_BV).clamp_min(0)
        total_B1 = excess_BV.sum(-1, keepdim=True)
        rest_BV = torch.where(total_B1 > 0, excess_BV / total_B1.clamp_min(torch.finfo(draft_BV.dtype).tiny), left_BV)
        left_BV = torch.where((tested_B & ~accepted_B)[:, None], rest_BV, left_BV)
        left_BV = torch.where(accepted_B[:, None], target_probs_BK1V[:, slot + 1], left_BV)
        path_BK.scatter_(1, depth_B[:, None], torch.where(accepted_B, slot, entry_at(path_BK, depth_B))[:, None])
        node_B, depth_B = torch.where(accepted_B, slot, node_B), depth_B + accepted_B
    return Verification(path_BK, depth_B, draws.pick(left_BV[:, None], depth_B[:, None])[:, 0])


def _walk_matching(proposal: Proposal, target_token: Callable[[Tensor, int], Tensor]) -> Verification:
    """Walk down while a child carries the verifier's token, which `target_token(node, depth)` names for each row."""
    assert proposal.parents_K is not None
    tokens_BK, parent_BK = proposal.token_ids_BK, parent_rows(proposal) - 1
    node_B = tokens_BK.new_full((len(tokens_BK),), -1)
    walking_B = torch.ones_like(node_B, dtype=torch.bool)
    path_BK, num_accepted_B, next_token_B = torch.full_like(tokens_BK, -1), torch.zeros_like(node_B), node_B.clone()
    deepest, is_on_host = max(depths(proposal.parents_K.tolist()), default=0), tokens_BK.device.type == "cpu"
    for depth in range(deepest + 1):
        token_B = target_token(node_B, depth)
        next_token_B = torch.where(walking_B, token_B, next_token_B)
        is_match_BK = (parent_BK == node_B[:, None]) & (tokens_BK == token_B[:, None])
        walking_B = walking_B & is_match_BK.any(-1)
        if depth == deepest or (is_on_host and not walking_B.any()):  # a GPU would be waited for
            break
        child_B = is_match_BK.long().argmax(-1)  # the first of equal siblings
        path_BK[:, depth] = torch.where(walking_B, child_B, -1)
        node_B, num_accepted_B = torch.where(walking_B, child_B, node_B), num_accepted_B + walking_B
    return Verification(path_BK, num_accepted_B, next_token_B)


def entry_at(values_BK: Tensor, index_B: Tensor) -> Tensor:
    return values_BK.gather(1, index_B[:, None])[:, 0]


def parent_rows(proposal: Proposal) -> Tensor:
    """int64 [B, K]: the target row that scores each slot's token."""
    tokens_BK = proposal.token_ids_BK
    if proposal.parents_K is None:
        return torch.arange(tokens_BK.shape[1], device=tokens_BK.device).expand_as(tokens_BK)
    return (to_device(proposal.parents_K, tokens_BK.device) + 1).expand_as(tokens_BK)


def longest_path(accepted_BK: Tensor, score_BK: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor, Tensor]:
    """Path [B, K], length [B] and last slot [B] (-1: none) of the deepest run of accepted slots from the root.

    Of equally deep ones the largest sum of `score_BK` along the path wins, then the lowest slot.
    """
    B, K = accepted_BK.shape
    rows_BK = parent_rows(proposal)
    depth_BK1 = torch.zeros(B, K + 1, dtype=torch.int64, device=accepted_BK.device)  # column 0: the root; -1: cut off
    sum_BK1 = score_BK.new_zeros(B, K + 1)
    for slot in range(K):
        above_B1 = rows_BK[:, slot, None]
        depth_B, sum_B = depth_BK1.gather(1, above_B1)[:, 0], sum_BK1.gather(1, above_B1)[:, 0]
        depth_BK1[:, slot + 1] = torch.where(accepted_BK[:, slot] & (depth_B >= 0), depth_B + 1, -1)
        sum_BK1[:, slot + 1] = sum_B + score_BK[:, slot]
    num_accepted_B = depth_BK1.amax(-1)
    last_B = sum_BK1.masked_fill(depth_BK1 < num_accepted_B[:, None], -torch.inf).argmax(-1) - 1
    path_BK = torch.full((B, K), -1, dtype=torch.int64, device=accepted_BK.device)
    node_B = last_B
    for steps_back in range(K):
        depth_B = num_accepted_B - 1 - steps_back
        at_B = depth_B.clamp_min(0)
        path_BK.scatter_(1, at_B[:, None], torch.where(depth_B >= 0, node_B, entry_at(path_BK, at_B))[:, None])
        node_B = torch.where(node_B >= 0, rows_BK.gather(1, node_B.clamp_min(0)[:, None])[:, 0] - 1, -1)
    return path_BK, num_accepted_B, last_B
