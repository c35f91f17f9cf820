"""Medusa's static trees: every node at depth d is one of head d-1's best tokens, the same below all parents.

A tree is a function of the context: its tokens are point masses. Chains are `LastStateProposer`'s. Shapes: B rows,
K slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from speculators.interfaces import Committed, DraftSampling, Proposal
from speculators.models.last_state_proposer import NO_DRAFT, LastStateProposer


class StaticTree(Protocol):
    """Slots breadth first; see `decoding.tree.TokenTree`."""

    @property
    def paths(self) -> Sequence[tuple[int, ...]]: ...

    @property
    def parents(self) -> Sequence[int]: ...


class MedusaTreeProposer:
    def __init__(self, chain: LastStateProposer, tree: StaticTree):
        self.chain, self.tree, self.capture = chain, tree, chain.capture

    @torch.inference_mode()
    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        """At most `num_tokens` deep, and no deeper than there are heads."""
        network = self.chain.network
        depth = min(num_tokens, len(network.heads))
        paths = [path for path in self.tree.paths if len(path) <= depth]  # shorter ones come first
        states_BH, last_B, drafts_B = self.chain.last_of(committed)
        draft_ids_BK = torch.full((len(last_B), len(paths)), NO_DRAFT, dtype=torch.int64, device=self.chain.device)
        if not paths:
            return Proposal(draft_ids_BK)
        with self.chain.packed:
            normed_BH = network.start(states_BH)
            for k in range(len(paths[-1])):
                slots = [slot for slot, path in enumerate(paths) if len(path) == k + 1]
                ranks = [paths[slot][-1] for slot in slots]
                features_BH, _ = network.step(k, normed_BH, last_B)
                best_BR = network.heads[k](features_BH).topk(max(ranks) + 1, -1).indices
                draft_ids_BK[:, slots] = best_BR[:, ranks]
        draft_ids_BK.masked_fill_(~drafts_B[:, None], NO_DRAFT)
        parents_K = torch.tensor(self.tree.parents[: len(paths)], device=self.chain.device)
        return Proposal(draft_ids_BK, None, parents_K)
