"""EAGLE-2's dynamic draft tree, grown anew each round with any drafter that can expand nodes.

Shapes: B rows, F nodes of a frontier, N nodes run so far, V vocabulary of the drafter, K slots.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from speculators.decoding.tree_growing import DynamicTreeShape, Frontier, grow_dynamic_tree, share_shape
from speculators.interfaces import Committed, DraftSampling, Proposal, TreeDrafter


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
        proposal, _ = grow_dynamic_tree(log_probs_BV, expand, shape, self.drafter.to_verifier_ids)
        # a row that waits, or whose only token has no state yet, drafts nothing
        drafts_B1 = ((committed.num_new_B > 0) & (committed.num_committed_B > 1))[:, None]
        return share_shape(replace(proposal, token_ids_BK=proposal.token_ids_BK.where(drafts_B1, -1)))
