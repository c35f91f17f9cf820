"""Drafts with DSpark: chains, and trees of `interfaces.TreeDrafter`.

Shapes: B rows, K draft tokens, F nodes of one depth, N nodes so far, H hidden size, R Markov rank, V draft vocabulary.

One forward computes the states of all slots, then the tokens follow one after the other:

    base logits     head(h_0)        head(h_1)        head(h_2)          one product for all slots
    + W2 phi        W1[x3], h_0      W1[x4'], h_1     W1[x5'], h_2       K tiny steps
    draft           x4'              x5'              x6'                q is this corrected softmax

In a tree, each node corrects its slot by the token before it:

    node of depth k below a node with token u:   head(h_k) + W2 phi(W1[u], h_k, state of the parent)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speculators.interfaces import Committed, DraftSampling, Proposal
from speculators.models.dflash.network import DFlashNetwork
from speculators.models.dflash.proposer import DFlashProposer, last_column
from speculators.models.dspark.network import ConfidenceHead, MarkovHead
from speculators.nn.draft_tokens import NO_DRAFT, draft_from, draft_to_verifier_ids, scatter_to_verifier
from speculators.nn.graphs import Drafts
from speculators.nn.prepacked_linear import PrepackedLinears


class DSparkProposer(DFlashProposer):
    """`confidence_BK` holds, after each call, the estimated chance that draft k is accepted given that those before it
    were; -1 where there is no draft. It follows from the tokens before draft k alone, so stopping by it is lossless.

    `min_survival`: a row's drafts end before the first slot whose chance to be reached and accepted is smaller."""

    def __init__(
        self,
        network: DFlashNetwork,
        target_layer_ids: Sequence[int],
        d2t: Tensor | None,
        verifier_vocab_size: int,
        markov_head: MarkovHead | None,
        confidence_head: ConfidenceHead | None,
        *,
        max_batch_size: int,
        max_length: int,
        min_survival: float = 0.0,
    ):
        super().__init__(
            network, target_layer_ids, d2t, verifier_vocab_size, max_batch_size=max_batch_size, max_length=max_length
        )
        self.markov_head = copy.deepcopy(markov_head)
        self.confidence_head = copy.deepcopy(confidence_head)
        self.min_survival = min_survival
        self.confidence_BK: Tensor | None = None
        heads: list[Any] = [head for head in (self.markov_head, self.confidence_head) if head is not None]
        linears = [*self.network.layers, self.network.fc, self.network.lm_head, self.context_kv, *heads]
        self.prepacked = PrepackedLinears(nn.ModuleList(linears))

    @torch.inference_mode()
    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        proposal = super().propose(committed, num_tokens, sampling)
        self.confidence_BK = proposal.confidence_BK
        if self.confidence_BK is None:
            return proposal
        too_unlikely_BK = self.confidence_BK.cumprod(-1) < self.min_survival
        draft_ids_BK = proposal.token_ids_BK.masked_fill(too_unlikely_BK, NO_DRAFT)
        self.confidence_BK = self.confidence_BK.masked_fill(draft_ids_BK == NO_DRAFT, -1.0)
        return Proposal(draft_ids_BK, proposal.probs_BKV, confidence_BK=self.confidence_BK)

    def draft(self, hidden_BKH: Tensor, anchor_B: Tensor, sampling: DraftSampling) -> Drafts:
        if self.markov_head is None:
            return *super().draft(hidden_BKH, anchor_B, sampling)[:2], self.confidence(hidden_BKH, None)
        head = self.markov_head
        base_logits_BKV = self.network.lm_head(hidden_BKH)
        state_BR, previous_B = head.start(hidden_BKH[:, 0]), anchor_B
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        embedded: list[Tensor] = []
        for k in range(hidden_BKH.shape[1]):
            embedded.append(head.markov_w1(previous_B))
            phi_BR, state_BR = head.step(state_BR, embedded[-1], hidden_BKH[:, k])
            logits_BV = base_logits_BKV[:, k] + head.markov_w2(phi_BR)
            draft_ids_B, probs_BV = draft_from(logits_BV, sampling)
            probs += [] if probs_BV is None else [probs_BV]
            previous_B = draft_to_verifier_ids(draft_ids_B, self.d2t)
            tokens.append(previous_B)
        confidence_BK = self.confidence(hidden_BKH, torch.stack(embedded, 1))
        if not sampling.probabilistic:
            return torch.stack(tokens, 1), None, confidence_BK
        probs_BKV = scatter_to_verifier(torch.stack(probs, 1), self.d2t, self.verifier_vocab_size)
        return torch.stack(tokens, 1), probs_BKV, confidence_BK

    def noise_shapes(self, num_rows: int, num_tokens: int) -> list[tuple[int, ...]]:
        if self.markov_head is None:
            return super().noise_shapes(num_rows, num_tokens)
        return [(num_rows, self.network.lm_head.out_features)] * num_tokens

    def confidence(self, hidden_BKH: Tensor, embedded_BKR: Tensor | None) -> Tensor | None:
        if self.confidence_head is None:
            return None
        return self.confidence_head(hidden_BKH, embedded_BKR).float().sigmoid()


class DSparkTreeDrafter:
    """Grows draft trees with a chain's proposer that has a Markov head."""

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
        """Log-probabilities [B, F, V] of slot k after each token; keeps the states of the nodes."""
        hidden_BFH = self.hidden_BKH[:, k, None].expand(-1, token_ids_BF.shape[1], -1)
        with self.chain.prepacked:
            phi_BFR, self.state_BFR = self.head.step(state_BFR, self.head.markov_w1(token_ids_BF), hidden_BFH)
            logits_BFV = self.logits_BKV[:, k, None] + self.head.markov_w2(phi_BFR)
        return logits_BFV.float().log_softmax(-1)

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_to_verifier_ids(draft_ids, self.chain.d2t)

    def to_verifier_probs(self, draft_probs: Tensor) -> Tensor:
        return scatter_to_verifier(draft_probs, self.chain.d2t, self.chain.verifier_vocab_size)
