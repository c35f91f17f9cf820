"""EAGLE-2's dynamic draft tree, grown anew each round with any drafter that can expand nodes.

Shapes: B sequences, F frontier nodes, N nodes run through the drafter so far, C candidates, V vocabulary of the
drafter, K slots of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speculators.decoding.trees.token_tree import TokenTree
from speculators.interfaces import Committed, DraftSampling, Proposal, TreeDrafter
from speculators.nn.device import to_device


@dataclass(frozen=True)
class Frontier:
    """The nodes that the drafter runs next, all at one position: the last committed one plus `depth`."""

    depth: int
    token_ids_BF: Tensor
    """Verifier ids."""
    parent_BF: Tensor
    """Index of each node's parent in the previous frontier, whose output state is this node's input (0 = the root)."""
    visible_BFN: Tensor
    """bool: nodes run so far (earlier frontiers first, this one last) that each attends to besides the prefix."""


@dataclass(frozen=True)
class DynamicTreeShape:
    """Size of a dynamic tree, with the names and defaults of EAGLE-2's public interface."""

    __pydantic_config__ = {"extra": "forbid"}  # a SpeculativeConfig holds one

    total_token: int = 60
    """Size of the tree, the root included."""
    depth: int = 7
    """Drafter passes after the first: nodes get up to depth + 1 deep."""
    top_k: int = 10
    """Nodes continued per pass, and children of each."""

    def __post_init__(self) -> None:
        if self.total_token < 2 or self.depth < 0 or self.top_k < 1:
            raise ValueError(f"{self} must have total_token >= 2 (root and one draft), depth >= 0 and top_k >= 1")

    @property
    def max_depth(self) -> int:
        """Depth of the deepest nodes."""
        return self.depth + 1


@dataclass(frozen=True)
class GrownTrees:
    """One draft tree per row, each of a shape of its own. `share_shape` makes a `Proposal` of them."""

    token_ids_BK: Tensor
    """int64 verifier ids; -1 = no node in this slot."""
    parents_BK: Tensor
    """int64 slot of each node's parent in the same row, -1 = the last committed token; parents come first."""
    log_probs_BK: Tensor
    """Log-probability of each node's whole path under the drafter."""


def grow_dynamic_tree(
    log_probs_BV: Tensor,
    expand: Callable[[Frontier], Tensor],
    shape: DynamicTreeShape,
    to_verifier_ids: Callable[[Tensor], Tensor] = lambda ids: ids,
) -> GrownTrees:
    """EAGLE-2: expand the likeliest nodes at each depth, then keep the likeliest of all nodes.

    `log_probs_BV` follows the root; `expand(frontier)` gives log-probabilities [B, F, V] after each of its nodes.
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
    """Indices by falling score, ties to the lower index: a parent never scores below its child, so it comes first."""
    return score_BC.sort(dim=-1, descending=True, stable=True).indices


def _keep_best(token_BC: Tensor, parent_BC: Tensor, score_BC: Tensor, num_nodes: int) -> GrownTrees:
    kept_BK = _best_first(score_BC)[:, :num_nodes].sort(-1).values  # ascending: parents first
    slot_BC = torch.full_like(parent_BC, -1)
    slot_BC.scatter_(1, kept_BK, torch.arange(kept_BK.shape[1], device=kept_BK.device).expand_as(kept_BK).contiguous())
    parent_BK = parent_BC.gather(1, kept_BK)
    parent_slot_BK = torch.where(parent_BK >= 0, slot_BC.gather(1, parent_BK.clamp_min(0)), -1)
    return GrownTrees(token_BC.gather(1, kept_BK), parent_slot_BK, score_BC.gather(1, kept_BK))


def share_shape(trees: GrownTrees) -> Proposal:
    """The same trees as a proposal, whose rows share one topology: the union of their shapes, -1 in the empty slots.

    A node is found by its path of sibling ranks in slot order, so siblings keep their order.
    """
    slot_of_path: list[dict[tuple[int, ...], int]] = []
    token_ids, parents_of_rows = torch.stack((trees.token_ids_BK, trees.parents_BK)).tolist()
    for tokens, parents in zip(token_ids, parents_of_rows, strict=True):
        paths: dict[int, tuple[int, ...]] = {-1: ()}
        num_children: dict[int, int] = {}
        for slot, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if token >= 0 and parent in paths:
                paths[slot] = (*paths[parent], num_children.get(parent, 0))
                num_children[parent] = num_children.get(parent, 0) + 1
        slot_of_path.append({path: slot for slot, path in paths.items() if slot >= 0})
    every_path = {path for paths_of_row in slot_of_path for path in paths_of_row}
    if not every_path:
        return Proposal(trees.token_ids_BK[:, :0], None, torch.empty(0, dtype=torch.int64))
    shared = TokenTree.of(every_path)
    sources = [[slots.get(path, -1) for path in shared.paths] for slots in slot_of_path]
    source_BK = to_device(sources, trees.token_ids_BK.device)
    token_BK = torch.where(source_BK >= 0, trees.token_ids_BK.gather(1, source_BK.clamp_min(0)), -1)
    return Proposal(token_BK, None, torch.tensor(shared.parents))


class DynamicTreeProposer:
    """The tree is a function of the context, so its tokens are point masses and sampling stays lossless."""

    def __init__(self, drafter: TreeDrafter, shape: DynamicTreeShape | None = None):
        self.drafter, self.shape = drafter, shape or DynamicTreeShape()
        self.capture = drafter.capture

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        """At most `num_tokens` deep."""
        depth = min(num_tokens, self.shape.max_depth, self.drafter.max_depth or num_tokens)
        log_probs_BV = self.drafter.start(committed, depth)
        if depth == 0:
            return Proposal(committed.token_ids_BT[:, :0])

        def expand(frontier: Frontier) -> Tensor:
            return self.drafter.expand(frontier.token_ids_BF, frontier.parent_BF, frontier.visible_BFN)

        shape = replace(self.shape, depth=depth - 1)
        trees = grow_dynamic_tree(log_probs_BV, expand, shape, self.drafter.to_verifier_ids)
        # no drafts for idle rows, and for rows whose only token has no state yet
        drafts_B1 = ((committed.num_new_B > 0) & (committed.num_committed_B > 1))[:, None]
        return share_shape(replace(trees, token_ids_BK=trees.token_ids_BK.where(drafts_B1, -1)))
