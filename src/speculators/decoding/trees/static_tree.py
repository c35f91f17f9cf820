"""Draft trees of a fixed shape, filled each round: by each node's likeliest tokens (`rank_tree`) or by drawn ones.

`StaticTreeProposer` fills a tree with any drafter that can expand nodes (`TreeDrafter`), `TreeDraftModelProposer` with
a causal LM.

Shapes: B rows, K slots, S source nodes of one depth, F = the most sources at any depth, N nodes run so far,
V vocabulary of the drafter.

    slots      0 1 | 2 3 | 4         depth 1 | 2 | 3, parents -1 -1 | 0 1 | 2
    run        0 1 | 2 2             the nodes that have children, padded to F = 2 with copies that no node attends to
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from speculators.decoding.proposers.draft_model import DraftModelProposer
from speculators.decoding.trees.token_tree import TokenTree, ancestor_mask, depths
from speculators.decoding.verification import inverse_cdf
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal, TreeDrafter
from speculators.nn.device import to_device

Law = Callable[[list[int], Tensor], Tensor]
"""`law(slots, token_ids_BK)`: [B, len(slots), V], the distribution after each of the slots (-1: the root). All have
one depth, and their tokens are in `token_ids_BK`. Called once per depth, downwards."""


def rank_tree(tree: TokenTree, law: Law, num_rows: int, device: torch.device) -> Proposal:
    """Fill a fixed shape with each node's likeliest tokens: a function of the context, so point masses."""
    depth_K, rank_K = depths(tree.parents), tree.ranks
    token_ids_BK = torch.full((num_rows, len(tree.paths)), -1, dtype=torch.int64, device=device)
    for depth in range(1, tree.depth + 1):
        level = [slot for slot, slot_depth in enumerate(depth_K) if slot_depth == depth]
        sources = sorted({tree.parents[slot] for slot in level})
        law_BSV = law(sources, token_ids_BK)
        best_BSR = law_BSV.topk(min(max(rank_K[slot] for slot in level) + 1, law_BSV.shape[-1]), -1).indices
        # a vocabulary may be smaller than a node has children
        filled = [slot for slot in level if rank_K[slot] < best_BSR.shape[-1]]
        index = [filled, [sources.index(tree.parents[slot]) for slot in filled], [rank_K[slot] for slot in filled]]
        slot_N, source_N, rank_N = to_device(index, device)
        token_ids_BK.index_copy_(1, slot_N, best_BSR[:, source_N, rank_N])
    return Proposal(_without_orphans(token_ids_BK, tree.parents), None, torch.tensor(tree.parents))


def sample_tree(
    parents: Sequence[int],
    law: Law,
    uniform_BK: Tensor,
    *,
    replacement: bool = False,
    is_greedy_B: Tensor | None = None,
) -> Proposal:
    """Draw tokens for a fixed shape and return each with the distribution it was drawn from, as `StandardRule` needs.

    Siblings are drawn without replacement (unless `replacement`): once q has no token left, the remaining siblings
    hold -1. Rows of `is_greedy_B` take the likeliest remaining token each time, a point mass. `uniform_BK` in [0, 1).
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
    return Proposal(token_ids_BK, probs_BKV, torch.tensor(list(parents), dtype=torch.int64))


def draw_tree(tree: TokenTree, logits_after: Law, sampling: DraftSampling) -> Proposal:
    """Draw a tree at each row's temperature, siblings without replacement; greedy rows take the likeliest tokens.

    `logits_after` gives logits or log-probabilities."""
    temperature_B = sampling.temperature_B
    scale_B11 = temperature_B.masked_fill(temperature_B == 0, 1.0)[:, None, None]
    return sample_tree(
        tree.parents,
        lambda slots, token_ids_BK: (logits_after(slots, token_ids_BK) / scale_B11).softmax(-1),
        draw_uniforms(len(temperature_B), len(tree.paths), sampling.generator, temperature_B.device),
        is_greedy_B=temperature_B == 0,
    )


def _without_orphans(token_ids_BK: Tensor, parents: Sequence[int]) -> Tensor:
    """Empty all slots below an empty slot."""
    is_ancestor_KK = to_device(ancestor_mask(parents)[1:, 1:], token_ids_BK.device, torch.bool)
    is_orphan_BK = ((token_ids_BK < 0)[:, None] & is_ancestor_KK).any(-1)
    return token_ids_BK.masked_fill(is_orphan_BK, -1)


def draw_uniforms(num_rows: int, num_slots: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """float64 [B, K], drawn on the generator's device."""
    made_on = generator.device if generator is not None else device
    return torch.rand(num_rows, num_slots, dtype=torch.float64, generator=generator, device=made_on).to(
        device, non_blocking=True
    )


@dataclass(frozen=True)
class Expansions:
    """The nodes of a tree that the drafter runs, one depth at a time."""

    tree: TokenTree

    @cached_property
    def slots_by_depth(self) -> list[list[int]]:
        """F slots per depth (from 1): those with children, padded with copies of the first."""
        depth_K, parents = depths(self.tree.parents), set(self.tree.parents)
        inner = [
            [slot for slot, of_slot in enumerate(depth_K) if of_slot == depth and slot in parents]
            for depth in range(1, self.tree.depth)
        ]
        width = max(map(len, inner), default=0)
        return [slots + slots[:1] * (width - len(slots)) for slots in inner]

    def parents_at(self, depth: int) -> list[int]:
        """Per node of a depth: index of its parent in the frontier above."""
        if depth == 1:
            return [0] * len(self.slots_by_depth[0])
        above = self.slots_by_depth[depth - 2]
        return [above.index(self.tree.parents[slot]) for slot in self.slots_by_depth[depth - 1]]

    def visible_at(self, depth: int) -> Tensor:
        """bool [F, N]: each node attends to itself and to the first copy of each of its ancestors."""
        is_ancestor = ancestor_mask(self.tree.parents)[1:, 1:]
        above = self.slots_by_depth[: depth - 1]
        frontier = self.slots_by_depth[depth - 1]
        is_first = torch.tensor(
            [slots.index(slot) == i for slots in above for i, slot in enumerate(slots)], dtype=torch.bool
        )
        attends_above = is_ancestor[frontier][:, [slot for slots in above for slot in slots]] & is_first
        return torch.cat([attends_above, torch.eye(len(frontier), dtype=torch.bool)], 1)


class StaticTreeProposer:
    """Drafts `tree`, cut at the requested depth; where the engine samples drafts, siblings without replacement."""

    def __init__(self, drafter: TreeDrafter, tree: TokenTree):
        self.drafter, self.tree, self.capture = drafter, tree, drafter.capture
        self._by_depth: dict[int, Expansions | None] = {}

    @torch.inference_mode()
    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        depth = min(num_tokens, self.tree.depth, self.drafter.max_depth or num_tokens)
        root_BV = self.drafter.start(committed, depth)
        expansions = self._cut_at(depth)
        if expansions is None:
            return Proposal(committed.token_ids_BT[:, :0])

        def log_probs(slots: list[int], draft_ids_BK: Tensor) -> Tensor:
            return root_BV[:, None] if slots == [-1] else self._expand(expansions, slots, draft_ids_BK)

        if sampling.probabilistic:
            drafts = draw_tree(expansions.tree, log_probs, sampling)
        else:
            drafts = rank_tree(expansions.tree, log_probs, len(root_BV), root_BV.device)
        # no drafts for idle rows, and for rows whose only token has no state yet
        drafts_B1 = ((committed.num_new_B > 0) & (committed.num_committed_B > 1))[:, None]
        token_ids_BK = self.drafter.to_verifier_ids(drafts.token_ids_BK.clamp_min(0))
        probs_BKV = None if drafts.probs_BKV is None else self.drafter.to_verifier_probs(drafts.probs_BKV)
        return Proposal(token_ids_BK.where((drafts.token_ids_BK >= 0) & drafts_B1, -1), probs_BKV, drafts.parents_K)

    def _cut_at(self, depth: int) -> Expansions | None:
        if depth not in self._by_depth:
            paths = [path for path in self.tree.paths if len(path) <= depth]
            self._by_depth[depth] = Expansions(TokenTree.of(paths)) if paths else None
        return self._by_depth[depth]

    def _expand(self, expansions: Expansions, slots: list[int], draft_ids_BK: Tensor) -> Tensor:
        """[B, S, V] after the given slots, which are all slots of one depth that have children."""
        depth = len(expansions.tree.paths[slots[0]])
        frontier, device = expansions.slots_by_depth[depth - 1], draft_ids_BK.device
        token_ids_BF = self.drafter.to_verifier_ids(draft_ids_BK[:, to_device(frontier, device)].clamp_min(0))
        parent_BF = to_device(expansions.parents_at(depth), device).expand(len(token_ids_BF), -1)
        visible_FN = to_device(expansions.visible_at(depth), device, torch.bool)
        log_probs_BFV = self.drafter.expand(token_ids_BF, parent_BF, visible_FN.expand(len(token_ids_BF), -1, -1))
        return log_probs_BFV[:, to_device([frontier.index(slot) for slot in slots], device)]


class TreeDraftModelProposer:
    """Wraps a draft model's proposer: the same cache, a tree in place of a chain.

    The nodes of one depth are scored together with all nodes above them, by the tree-masked forward that also verifies
    trees. Column 0 of it is the last committed token, so that token is taken out of the cache first, and the next call
    feeds it again."""

    def __init__(self, chain: DraftModelProposer, tree: TokenTree):
        self.capture = CaptureSpec()
        self.chain, self.tree = chain, tree

    def __enter__(self) -> TreeDraftModelProposer:
        self.chain.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.chain.__exit__(*exc)

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        paths = [path for path in self.tree.paths if len(path) <= num_tokens]
        if not paths:
            return self.chain.propose(committed, num_tokens, sampling)
        tree = TokenTree.of(paths)
        with self.chain:
            root_logits_BV, is_active_B = self.chain.feed(committed)
            last_B1 = committed.token_ids_BT.gather(1, (committed.num_new_B - 1).clamp_min(0)[:, None])
            lengths = list(self.chain.lm.length_by_row)

            def logits_after(slots: list[int], token_ids_BK: Tensor) -> Tensor:
                if slots == [-1]:
                    return root_logits_BV[:, None]
                num_known = max(slots) + 1
                self.chain.lm.length_by_row[:] = [max(length - 1, 0) for length in lengths]
                known_BT = torch.cat([last_B1, token_ids_BK[:, :num_known].clamp_min(0)], 1)
                num_valid_B = torch.full((len(known_BT),), num_known + 1)
                output = self.chain.lm.score(known_BT, num_valid_B, torch.tensor(tree.parents[:num_known]))
                columns = to_device([slot + 1 for slot in slots], known_BT.device)
                return output.logits_BTV[:, columns].float()

            if sampling.probabilistic:
                proposal = draw_tree(tree, logits_after, sampling)
            else:
                proposal = rank_tree(tree, logits_after, len(last_B1), last_B1.device)
            self.chain.lm.length_by_row[:] = lengths
        token_ids_BK = proposal.token_ids_BK.masked_fill(~is_active_B[:, None], -1)
        return Proposal(token_ids_BK, proposal.probs_BKV, proposal.parents_K)
