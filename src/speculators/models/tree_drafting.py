"""Grows draft trees (`interfaces.TreeDrafter`) with drafters that are fed their own states, fill parallel slots, or
carry a state.

Shapes: B rows, F nodes of the frontier (the last depth), N nodes so far, K depths, H hidden size, R width of a head's
input, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from speculators.interfaces import CaptureSpec, Committed
from speculators.models.feedback_proposer import FeedbackProposer
from speculators.models.last_state_proposer import LastStateProposer
from speculators.nn.cache import TreeSpan
from speculators.nn.device import read_on_host
from speculators.nn.draft_tokens import draft_to_verifier_ids, scatter_to_verifier


class FeedbackTreeDrafter:
    """Wraps a chain's proposer: its network and its cache."""

    max_depth: int | None = None

    def __init__(self, chain: FeedbackProposer):
        self.chain, self.capture = chain, chain.capture

    @torch.inference_mode()
    def start(self, committed: Committed, depth: int) -> Tensor:
        known = read_on_host(committed)
        num_new, num_committed = known.num_new, known.num_committed
        with self.chain.prepacked:
            output = self.chain.commit(committed, num_new, num_committed)
            self.states_BFH = output.fed_back_BRH
            self.lengths = self.chain.cache.lengths[: len(num_new)]
            return self.log_probs(output.normed_BRH)[:, 0]

    @torch.inference_mode()
    def expand(self, token_ids_BF: Tensor, parent_BF: Tensor, visible_BFN: Tensor) -> Tensor:
        """Runs the frontier: each node reads its parent's state and sees the prefix and the nodes of `visible`."""
        num_frontier, num_nodes = visible_BFN.shape[1:]
        depth = num_nodes // num_frontier
        first = num_nodes - num_frontier
        chain, lengths_B = self.chain, self.chain.tensor(self.lengths)
        end = max(self.lengths) + num_nodes
        chain.cache.reserve(end)
        index_BFH = parent_BF[..., None].expand(-1, -1, self.states_BFH.shape[-1])
        chain.cache.span = TreeSpan(
            slice(0, len(self.lengths)),
            num_frontier,
            end=end,
            starts_B=lengths_B + first,
            num_queries=num_frontier,
            lengths_B=lengths_B,
            visible_BFN=visible_BFN,
        )
        position_BF = (lengths_B + depth - 1)[:, None].expand(-1, num_frontier)
        rope = chain.network.rope.tables(end, chain.device, chain.dtype).at(position_BF)
        with chain.prepacked:
            output = chain.network.step(token_ids_BF, self.states_BFH.gather(1, index_BFH), rope, chain.layer_attention)
            self.states_BFH = output.fed_back_BRH
            return self.log_probs(output.normed_BRH)

    def log_probs(self, normed_BFH: Tensor) -> Tensor:
        return self.chain.network.lm_head(normed_BFH).float().log_softmax(-1)

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_to_verifier_ids(draft_ids, self.chain.d2t)

    def to_verifier_probs(self, draft_probs: Tensor) -> Tensor:
        return scatter_to_verifier(draft_probs, self.chain.d2t, self.chain.verifier_vocab_size)


class SlotProposer(Protocol):
    """A drafter of chains that fills all slots in one pass."""

    capture: CaptureSpec
    d2t: Tensor | None
    verifier_vocab_size: int

    def slot_log_probs(self, committed: Committed, num_tokens: int) -> Tensor:
        """[B, K, V_draft]"""
        ...


class SlotTreeDrafter:
    """Wraps a drafter whose depths do not see each other's tokens: continuations of a node depend on its depth alone.

    `log_probs(committed, depth)` returns [B, depth, V] in one pass.
    """

    def __init__(
        self,
        log_probs: Callable[[Committed, int], Tensor],
        capture: CaptureSpec,
        *,
        max_depth: int | None = None,
        d2t: Tensor | None = None,
        verifier_vocab_size: int = 0,
    ):
        self.log_probs, self.capture, self.max_depth = log_probs, capture, max_depth
        self.d2t, self.verifier_vocab_size = d2t, verifier_vocab_size

    @classmethod
    def of_chain(cls, chain: SlotProposer, max_depth: int | None = None) -> SlotTreeDrafter:
        return cls(
            chain.slot_log_probs,
            chain.capture,
            max_depth=max_depth,
            d2t=chain.d2t,
            verifier_vocab_size=chain.verifier_vocab_size,
        )

    def start(self, committed: Committed, depth: int) -> Tensor:
        self.log_probs_BKV = self.log_probs(committed, max(depth, 1))
        return self.log_probs_BKV[:, 0]

    def expand(self, token_ids_BF: Tensor, parent_BF: Tensor, visible_BFN: Tensor) -> Tensor:
        num_frontier, num_nodes = visible_BFN.shape[1:]
        return self.log_probs_BKV[:, num_nodes // num_frontier, None].expand(-1, num_frontier, -1)

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_to_verifier_ids(draft_ids, self.d2t)

    def to_verifier_probs(self, draft_probs: Tensor) -> Tensor:
        return scatter_to_verifier(draft_probs, self.d2t, self.verifier_vocab_size)


class CarriedTreeDrafter:
    """Wraps the proposer of a drafter that carries a state from token to token: each node continues its parent's."""

    def __init__(self, chain: LastStateProposer):
        self.chain, self.capture = chain, chain.capture
        self.max_depth: int | None = len(chain.network.heads)

    @torch.inference_mode()
    def start(self, committed: Committed, depth: int) -> Tensor:
        states_BH, last_B, _ = self.chain.last_of(committed)
        with self.chain.prepacked:
            carried_B1H = self.chain.network.start(states_BH)[:, None]
            return self.step(0, carried_B1H, last_B[:, None])[:, 0]

    @torch.inference_mode()
    def expand(self, token_ids_BF: Tensor, parent_BF: Tensor, visible_BFN: Tensor) -> Tensor:
        num_frontier, num_nodes = visible_BFN.shape[1:]
        index_BFR = parent_BF[..., None].expand(-1, -1, self.carried.shape[-1])
        with self.chain.prepacked:
            return self.step(num_nodes // num_frontier, self.carried.gather(1, index_BFR), token_ids_BF)

    def step(self, k: int, carried: Tensor, token_ids: Tensor) -> Tensor:
        features, self.carried = self.chain.network.step(k, carried, token_ids)
        return self.chain.network.heads[k](features).float().log_softmax(-1)

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids

    def to_verifier_probs(self, draft_probs: Tensor) -> Tensor:
        return draft_probs
