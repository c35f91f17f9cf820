"""EAGLE-2's dynamic draft tree, grown anew each round with any drafter that can expand nodes.

Shapes: B rows, F nodes of a frontier, N nodes run so far, V vocabulary of the drafter, K slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from speculators.decoding.tree_growing import DynamicTreeShape, Frontier, grow_dynamic_tree, share_shape
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal


class TreeDrafter(Protocol):
    """What is asked of a drafter; its vocabulary may be smaller than the verifier's."""

    capture: CaptureSpec

    def start(self, committed: Committed) -> Tensor:
        """Take in what was committed; log-probabilities [B, V] of what follows."""
        ...

    def expand(self, token_ids_BF: Tensor, parent_BF: Tensor, visible_BFN: Tensor) -> Tensor:
        """Log-probabilities [B, F, V] after each node of the next depth; see `tree_growing.Frontier`."""
        ...

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor: ...


class DynamicTreeProposer:
    """The tree is a function of the context, so its tokens are point masses and sampling stays lossless."""

    def __init__(self, drafter: TreeDrafter, shape: DynamicTreeShape | None = None):
        self.drafter, self.shape = drafter, shape or DynamicTreeShape()
        self.capture = drafter.capture

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        """At most `num_tokens` deep."""
        log_probs_BV = self.drafter.start(committed)
        if num_tokens == 0:
            return Proposal(committed.token_ids_BT[:, :0])

        def expand(frontier: Frontier) -> Tensor:
            return self.drafter.expand(frontier.token_ids_BF, frontier.parent_BF, frontier.visible_BFN)

        shape = replace(self.shape, depth=min(self.shape.depth, num_tokens - 1))
        proposal, _ = grow_dynamic_tree(log_probs_BV, expand, shape, self.drafter.to_verifier_ids)
        # a row that waits, or whose only token has no state yet, drafts nothing
        drafts_B1 = ((committed.num_new_B > 0) & (committed.num_committed_B > 1))[:, None]
        return share_shape(replace(proposal, token_ids_BK=proposal.token_ids_BK.where(drafts_B1, -1)))
