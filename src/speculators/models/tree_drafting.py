"""Expanding draft trees with a drafter that is fed its own states: any tree grower may drive it (EAGLE-2's does).

Shapes: B rows, F nodes of the frontier, N nodes so far, H hidden size, V draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.interfaces import Committed
from speculators.models.feedback_proposer import FeedbackProposer
from speculators.nn.draft_vocab import draft_to_verifier_ids
from speculators.nn.slot_cache import slot_attends
from speculators.nn.tree_cache import TreeSpan


class TreeDrafter:
    """Wraps a proposer: its network and its cache. A tree lives from `start` to the next `start`."""

    def __init__(self, chain: FeedbackProposer):
        self.chain, self.capture = chain, chain.capture
        self.attends = slot_attends(chain.cache, chain.network.windows)

    @torch.inference_mode()
    def start(self, committed: Committed) -> Tensor:
        """Take in what was committed; log-probabilities [B, V] of what follows each row's last token."""
        num_new, num_committed = torch.stack((committed.num_new_B, committed.num_committed_B)).tolist()
        with self.chain.packed:
            output = self.chain.commit(committed, num_new, num_committed)
            self.states_BFH = output.fed_back_BRH
            self.lengths = self.chain.cache.lengths[: len(num_new)]
            return self.log_probs(output.normed_BRH)[:, 0]

    @torch.inference_mode()
    def expand(self, token_ids_BF: Tensor, parent_BF: Tensor, visible_BFN: Tensor) -> Tensor:
        """Log-probabilities [B, F, V] after each node of the next depth: a verifier token, on the state of node
        `parent` of the depth before (0: the root), seeing the prefix and the nodes of `visible`, itself the last."""
        num_frontier, num_nodes = visible_BFN.shape[1:]
        depth = num_nodes // num_frontier
        first = num_nodes - num_frontier
        chain, lengths_B = self.chain, self.chain.tensor(self.lengths)
        end = max(self.lengths) + num_nodes
        chain.cache.reserve(end)
        index_BFH = parent_BF[..., None].expand(-1, -1, self.states_BFH.shape[-1])
        chain.cache.span = TreeSpan(
            slice(0, len(self.lengths)), num_frontier, end=end, starts_B=lengths_B + first,
            num_answered=num_frontier, lengths_B=lengths_B, visible_BFN=visible_BFN,
        )  # fmt: skip
        position_BF = (lengths_B + depth - 1)[:, None].expand(-1, num_frontier)
        rope = chain.network.rope.tables(end, chain.device, chain.dtype).at(position_BF)
        with chain.packed:
            output = chain.network.step(token_ids_BF, self.states_BFH.gather(1, index_BFH), rope, self.attends)
            self.states_BFH = output.fed_back_BRH
            return self.log_probs(output.normed_BRH)

    def log_probs(self, normed_BFH: Tensor) -> Tensor:
        return self.chain.network.lm_head(normed_BFH).float().log_softmax(-1)

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_to_verifier_ids(draft_ids, self.chain.d2t)
