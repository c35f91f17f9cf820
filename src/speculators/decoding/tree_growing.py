"""Growing draft trees with any drafter: EAGLE-2's dynamic tree and trees of sampled tokens.

Shapes: B sequences, F frontier nodes, N nodes run through the drafter so far, V vocabulary, K slots of the result.
The drafter is a callback: it gets the nodes to continue and says what follows each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.decoding.tree import TokenTree, depths
from speculators.decoding.verification import inverse_cdf
from speculators.interfaces import Proposal


@dataclass(frozen=True)
class Frontier:
    """The nodes that the drafter runs next. They share one position: the last committed one plus `depth`."""

    depth: int
    token_ids_BF: Tensor
    """Verifier ids."""
    parent_BF: Tensor
    """Which node of the previous frontier each continues: its output state is this node's input (0 = the root)."""
    visible_BFN: Tensor
    """Which of all nodes run so far (earlier frontiers first, this one last) each may attend to, besides the prefix."""


@dataclass(frozen=True)
class DynamicTreeShape:
    """Names and defaults of EAGLE-2's public interface."""

    __pydantic_config__ = {"extra": "forbid"}  # a SpeculativeConfig holds one

    total_token: int = 60
    """Size of the tree, the root included."""
    depth: int = 7
    """Drafter passes after the first: nodes get up to depth + 1 deep."""
    top_k: int = 10
    """Nodes a pass continues, and children each of them gets."""

    def __post_init__(self) -> None:
        if self.total_token < 2 or self.depth < 0 or self.top_k < 1:
            raise ValueError(f"{self} must have total_token >= 2 (root and one draft), depth >= 0 and top_k >= 1")

    @property
    def max_depth(self) -> int:
        """Of its nodes."""
        return self.depth + 1


def grow_dynamic_tree(
    log_probs_BV: Tensor,
    expand: Callable[[Frontier], Tensor],
    shape: DynamicTreeShape,
    to_verifier_ids: Callable[[Tensor], Tensor] = lambda ids: ids,
) -> tuple[Proposal, Tensor]:
    """EAGLE-2: expand the likeliest nodes, then keep the likeliest of all that were seen.

    `log_probs_BV` follows the root; `expand(frontier)` gives log-probabilities [B, F, V] after each of its nodes.
    Returns the proposal (its parents are [B, K]: each row has its own shape) and the cumulative log-probs [B, K].
    The tree is a function of the context, so sample-and-match verification is lossless.
    """
    k = min(shape.top_k, log_probs_BV.shape[-1])
    score_BF, draft_id_BF = log_probs_BV.topk(k, dim=-1)
    B, device = score_BF.shape[0], score_BF.device
    tokens, scores = [to_verifier_ids(draft_id_BF)], [score_BF]
    parents = [torch.full((B, k), -1, dtype=torch.int64, device=device)]  # flat indices into all candidates
    flat_BF = torch.arange(k, device=device).expand(B, k)  # where the frontier's nodes were recorded
    token_BF, parent_BF = tokens[0], torch.zeros_like(tokens[0])
    visible_BFN = torch.eye(k, dtype=torch.bool, device=device).expand(B, k, k)
    for depth in range(1, shape.depth + 1):
        log_probs_BFV = expand(Frontier(depth, token_BF, parent_BF, visible_BFN))
        child_log_prob_BFk, draft_id_BFk = log_probs_BFV.topk(k, dim=-1)
        child_score_BC = (score_BF[..., None] + child_log_prob_BFk).flatten(1)
        child_token_BC = to_verifier_ids(draft_id_BFk).flatten(1)
        num_before = k + (depth - 1) * k * k
        tokens.append(child_token_BC)
        scores.append(child_score_BC)
        parents.append(flat_BF.repeat_interleave(k, 1))
        best_BF = _best_first(child_score_BC)[:, :k]
        score_BF, token_BF = child_score_BC.gather(1, best_BF), child_token_BC.gather(1, best_BF)
        flat_BF, parent_BF = num_before + best_BF, best_BF // k
        inherited_BFN = visible_BFN.gather(1, parent_BF[..., None].expand(-1, -1, visible_BFN.shape[-1]))
        visible_BFN = torch.cat([inherited_BFN, torch.eye(k, dtype=torch.bool, device=device).expand(B, k, k)], -1)
    return _keep_best(torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1), shape.total_token - 1)


def _best_first(score_BC: Tensor) -> Tensor:
    """Ties to the lower index: a parent never scores below its child and comes first, so it is kept with it."""
    return score_BC.sort(dim=-1, descending=True, stable=True).indices


def _keep_best(token_BC: Tensor, parent_BC: Tensor, score_BC: Tensor, num_nodes: int) -> tuple[Proposal, Tensor]:
    kept_BK = _best_first(score_BC)[:, :num_nodes].sort(-1).values  # ascending: parents first
    slot_BC = torch.full_like(parent_BC, -1)
    slot_BC.scatter_(1, kept_BK, torch.arange(kept_BK.shape[1], device=kept_BK.device).expand_as(kept_BK).contiguous())
    parent_BK = parent_BC.gather(1, kept_BK)
    parent_slot_BK = torch.where(parent_BK >= 0, slot_BC.gather(1, parent_BK.clamp_min(0)), -1)
    return Proposal(token_BC.gather(1, kept_BK), None, parent_slot_BK), score_BC.gather(1, kept_BK)


Law = Callable[[list[int], Tensor], Tensor]
"""`law(slots, token_ids_BK)`: [B, len(slots), V], what follows each of the slots (-1: the root), which are all of one
depth and filled in `token_ids_BK`. Called once a depth, downwards."""


def rank_tree(tree: TokenTree, law: Law, num_rows: int, device: torch.device) -> Proposal:
    """A fixed shape filled with each node's likeliest tokens: a function of the context, so point masses."""
    depth_K, rank_K = depths(tree.parents), tree.ranks
    token_ids_BK = torch.full((num_rows, len(tree.paths)), -1, dtype=torch.int64, device=device)
    for depth in range(1, tree.depth + 1):
        level = [slot for slot, slot_depth in enumerate(depth_K) if slot_depth == depth]
        sources = sorted({tree.parents[slot] for slot in level})
        law_BSV = law(sources, token_ids_BK)
        best_BSR = law_BSV.topk(min(max(rank_K[slot] for slot in level) + 1, law_BSV.shape[-1]), -1).indices
        for slot in level:
            if rank_K[slot] < best_BSR.shape[-1]:  # a vocabulary may be smaller than a node has children
                token_ids_BK[:, slot] = best_BSR[:, sources.index(tree.parents[slot]), rank_K[slot]]
    return Proposal(_without_orphans(token_ids_BK, tree.parents), None, torch.tensor(tree.parents, device=device))


def sample_tree(
    parents: Sequence[int],
    law: Law,
    uniform_BK: Tensor,
    *,
    replacement: bool = False,
    is_greedy_B: Tensor | None = None,
) -> Proposal:
    """Tokens drawn for a fixed shape, each with the law it was really drawn from: what `StandardRule` needs.

    Siblings are drawn without replacement unless asked otherwise: once q has no token left, the remaining siblings
    hold -1. Rows of `is_greedy_B` take the likeliest token left each time, a point mass.
    """
    B, K = uniform_BK.shape
    depth_K = depths(parents)
    token_ids_BK = torch.full((B, K), -1, dtype=torch.int64, device=uniform_BK.device)
    probs: dict[int, Tensor] = {}
    for depth in range(1, max(depth_K, default=0) + 1):
        level = [slot for slot in range(K) if depth_K[slot] == depth]
        sources = sorted({parents[slot] for slot in level})
        q_BSV = law(sources, token_ids_BK)
        left = {source: q_BSV[:, i] for i, source in enumerate(sources)}
        for slot in level:
            q_BV = left[parents[slot]]
            total_B1 = q_BV.sum(-1, keepdim=True)
            q_BV = torch.where(total_B1 > 0, q_BV / total_B1.clamp_min(torch.finfo(q_BV.dtype).tiny), 0.0)
            drawn_B = inverse_cdf(q_BV[:, None], uniform_BK[:, slot, None])[:, 0]
            probs[slot] = q_BV
            if is_greedy_B is not None:
                drawn_B = torch.where(is_greedy_B, q_BV.argmax(-1), drawn_B)
                point_BV = torch.zeros_like(q_BV).scatter(1, drawn_B[:, None], 1.0)
                probs[slot] = torch.where(is_greedy_B[:, None], point_BV, q_BV)
            token_ids_BK[:, slot] = torch.where(total_B1[:, 0] > 0, drawn_B, -1)
            if not replacement:
                left[parents[slot]] = q_BV.scatter(1, drawn_B[:, None], 0.0)
    probs_BKV = torch.stack([probs[slot] for slot in range(K)], 1) if K else None
    token_ids_BK = _without_orphans(token_ids_BK, parents)
    return Proposal(token_ids_BK, probs_BKV, torch.tensor(list(parents), device=uniform_BK.device))


def _without_orphans(token_ids_BK: Tensor, parents: Sequence[int]) -> Tensor:
    """Nothing is drafted below an empty slot."""
    if bool((token_ids_BK >= 0).all()):
        return token_ids_BK
    for slot, parent in enumerate(parents):
        if parent >= 0:
            token_ids_BK[:, slot].masked_fill_(token_ids_BK[:, parent] < 0, -1)
    return token_ids_BK


def draw_uniforms(num_rows: int, num_slots: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """float64 [B, K], made where the generator lives."""
    made_on = generator.device if generator is not None else device
    return torch.rand(num_rows, num_slots, dtype=torch.float64, generator=generator, device=made_on).to(device)


def share_shape(proposal: Proposal) -> Proposal:
    """The same trees with one topology for all rows (parents [K']): the union of their shapes, -1 where a row has none.

    A node's place is its path of sibling ranks in slot order, so siblings keep their order and laws travel along.
    """
    assert proposal.parents_K is not None and proposal.probs_BKV is None, "deterministic trees only"
    slot_of_path: list[dict[tuple[int, ...], int]] = []
    for tokens, parents in zip(proposal.token_ids_BK.tolist(), proposal.parents_K.tolist(), strict=True):
        paths: dict[int, tuple[int, ...]] = {-1: ()}
        num_children: dict[int, int] = {}
        for slot, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if token >= 0 and parent in paths:
                paths[slot] = (*paths[parent], num_children.get(parent, 0))
                num_children[parent] = num_children.get(parent, 0) + 1
        slot_of_path.append({path: slot for slot, path in paths.items() if slot >= 0})
    every_path = {path for paths_of_row in slot_of_path for path in paths_of_row}
    if not every_path:
        return Proposal(proposal.token_ids_BK[:, :0], None, proposal.parents_K.new_zeros(0))
    shared = TokenTree.of(every_path)
    source_BK = torch.tensor([[slots.get(path, -1) for path in shared.paths] for slots in slot_of_path])
    source_BK = source_BK.to(proposal.token_ids_BK.device)
    token_BK = torch.where(source_BK >= 0, proposal.token_ids_BK.gather(1, source_BK.clamp_min(0)), -1)
    return Proposal(token_BK, None, torch.tensor(shared.parents, device=token_BK.device))
