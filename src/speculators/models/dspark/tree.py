"""DSpark's draft trees: the slots are filled in one forward, then each node corrects its slot by the token before it.

Shapes: B rows, F nodes of the frontier, N nodes so far, K slots, H hidden size, R Markov rank, V draft vocabulary.

    node of depth k below a node with token u:   head(h_k) + W2 phi(W1[u], h_k, state of the parent)
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.interfaces import Committed
from speculators.models.dflash.proposer import last_column
from speculators.models.dspark.heads import MarkovHead
from speculators.models.dspark.proposer import DSparkProposer
from speculators.nn.draft_vocab import draft_to_verifier_ids, scatter_to_verifier


class DSparkTreeDrafter:
    """An `interfaces.TreeDrafter`. Wraps a chain's proposer, which has a Markov head."""

    def __init__(self, chain: DSparkProposer, head: MarkovHead, max_depth: int):
        self.chain, self.head, self.capture = chain, head, chain.capture
        self.max_depth: int | None = max_depth

    @torch.inference_mode()
    def start(self, committed: Committed, depth: int) -> Tensor:
        self.logits_BKV, self.hidden_BKH = self.chain.slots_after(committed, max(depth, 1))
        self.state_BFR = self.head.start(self.hidden_BKH[:, :1])
        last_B1 = committed.token_ids_BT.gather(1, last_column(committed)[:, None])
        return self.after(0, last_B1, self.state_BFR)[:, 0]

    @torch.inference_mode()
    def expand(self, token_ids_BF: Tensor, parent_BF: Tensor, visible_BFN: Tensor) -> Tensor:
        num_frontier, num_nodes = visible_BFN.shape[1:]
        index_BFR = parent_BF[..., None].expand(-1, -1, self.state_BFR.shape[-1])
        return self.after(num_nodes // num_frontier, token_ids_BF, self.state_BFR.gather(1, index_BFR))

    def after(self, k: int, token_ids_BF: Tensor, state_BFR: Tensor) -> Tensor:
        """Log-probabilities [B, F, V] of slot k after each token; the states of the nodes are kept."""
        hidden_BFH = self.hidden_BKH[:, k, None].expand(-1, token_ids_BF.shape[1], -1)
        with self.chain.prepacked:
            phi_BFR, self.state_BFR = self.head.step(state_BFR, self.head.markov_w1(token_ids_BF), hidden_BFH)
            logits_BFV = self.logits_BKV[:, k, None] + self.head.markov_w2(phi_BFR)
        return logits_BFV.float().log_softmax(-1)

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_to_verifier_ids(draft_ids, self.chain.d2t)

    def to_verifier_probs(self, draft_probs: Tensor) -> Tensor:
        return scatter_to_verifier(draft_probs, self.chain.d2t, self.chain.verifier_vocab_size)
