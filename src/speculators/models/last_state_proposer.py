"""Drafts with drafters that read the verifier's last state alone: no cache, no state between rounds.

Shapes: B rows, T committed columns, K draft tokens, H hidden size, R width of what a head reads, V vocabulary.

    sequence   x0   x1   x2   x3            committed: token x[i] with the state y[i-1] that predicted it
    read       (x3, y2) alone               f = final norm of y2
    drafts     head 0 -> x4'   head 1 -> x5'   ...

Every call brings at least one new token with its state, so rows that start, wait or are replaced need no handling.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal
from speculators.nn.draft_tokens import NO_DRAFT, draft_from
from speculators.nn.graphs import Drafts, FixedShapes, Record, draft_at, rounded_up
from speculators.nn.prepacked_linear import PrepackedLinears


class LastStateNetwork(Protocol):
    """A network as training and drafting use it; shapes are [..., H] and [..., R] for any leading axes."""

    @property
    def heads(self) -> Sequence[nn.Linear]:
        """One per token drafted in a round, over the verifier's vocabulary."""
        ...

    def start(self, states: Tensor, /) -> Tensor:
        """Maps verifier states, before the final norm, to the state carried from head to head."""
        ...

    def step(self, k: int, carried: Tensor, token_ids: Tensor, /) -> tuple[Tensor, Tensor]:
        """Returns (input of head k, state carried on). `token_ids` is the token before the one that head k predicts."""
        ...

    def step_flop(self, k: int, num_rows: int, /) -> int:
        """Model FLOPs of `step`; the verifier's state learns nothing."""
        ...


class LastStateProposer:
    """Snapshot of a drafter, made to draft. Drafts at most as many tokens as there are heads; further slots stay -1."""

    capture = CaptureSpec(last_hidden=True)

    def __init__(self, network: LastStateNetwork, modules: Sequence[nn.Module]):
        self.network = network
        weight = network.heads[0].weight
        self.dtype, self.device = weight.dtype, weight.device
        self.prepacked = PrepackedLinears(*modules)
        self.shapes: FixedShapes | None = None

    def use_graphs(self, record: Record | None) -> None:
        """See `nn.graphs.HasFixedShapes`."""
        self.shapes = FixedShapes(record) if record is not None else None

    @torch.inference_mode()
    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        states_BH, token_ids_B, drafts_B = self.last_of(committed)
        with self.prepacked:
            if self.shapes is not None and num_tokens > 0:
                draft_ids_BK, probs_BKV = self.draft_round(self.shapes, states_BH, token_ids_B, num_tokens, sampling)
            else:
                draft_ids_BK, probs_BKV = self.draft(states_BH, token_ids_B, num_tokens, sampling)
        return Proposal(draft_ids_BK.masked_fill(~drafts_B[:, None], NO_DRAFT), probs_BKV)

    def draft(
        self, states_BH: Tensor, token_ids_B: Tensor, num_tokens: int, sampling: DraftSampling
    ) -> tuple[Tensor, Tensor | None]:
        """Returns drafts [B, K] and the distributions they were drawn from."""
        shape = (len(token_ids_B), num_tokens)
        draft_ids_BK = torch.full(shape, NO_DRAFT, dtype=torch.int64, device=self.device)
        probs: list[Tensor] = []
        carried = self.network.start(states_BH)
        for k in range(min(num_tokens, len(self.network.heads))):
            features, carried = self.network.step(k, carried, token_ids_B)
            token_ids_B, probs_BV = draft_from(self.network.heads[k](features), sampling)
            probs += [] if probs_BV is None else [probs_BV]
            draft_ids_BK[:, k] = token_ids_B
        if not probs:
            return draft_ids_BK, None
        probs += [torch.zeros_like(probs[0])] * (num_tokens - len(probs))
        return draft_ids_BK, torch.stack(probs, 1)

    def draft_round(
        self, shapes: FixedShapes, states_BH: Tensor, token_ids_B: Tensor, num_tokens: int, sampling: DraftSampling
    ) -> tuple[Tensor, Tensor | None]:
        """The same at a fixed shape (`nn.graphs`)."""
        B, R, heads = len(token_ids_B), rounded_up(len(token_ids_B)), self.network.heads
        noise_shapes = [(B, heads[0].out_features)] * min(num_tokens, len(heads))

        def draft(states_RH: Tensor, token_ids_R: Tensor, recorded: DraftSampling) -> Drafts:
            return *self.draft(states_RH, token_ids_R, num_tokens, recorded), None

        inputs = pad(states_BH, (0, 0, 0, R - B)), pad(token_ids_B, (0, R - B))
        return draft_at(shapes, (num_tokens,), draft, inputs, sampling, noise_shapes)[:2]

    @torch.inference_mode()
    def head_log_probs(self, committed: Committed, num_tokens: int) -> Tensor:
        """Log-probabilities [B, K, V] of the first K heads, for networks whose heads do not read tokens."""
        states_BH, token_ids_B, _ = self.last_of(committed)
        with self.prepacked:
            carried = self.network.start(states_BH)
            logits = []
            for k in range(num_tokens):
                features, carried = self.network.step(k, carried, token_ids_B)
                logits.append(self.network.heads[k](features))
        return torch.stack(logits, 1).float().log_softmax(-1)

    def last_of(self, committed: Committed) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (state [B, H] and token [B] of each row's last column, rows that draft [B])."""
        assert committed.states_BTD is not None
        last_B = (committed.num_new_B - 1).clamp_min(0)
        rows_B = torch.arange(len(last_B), device=self.device)
        states_BH = committed.states_BTD[rows_B, last_B].to(self.dtype)
        # a row that waits, or whose only token has no state yet, drafts nothing
        drafts_B = (committed.num_new_B > 0) & (committed.num_committed_B > 1)
        return states_BH, committed.token_ids_BT[rows_B, last_B], drafts_B


def snapshot(module: Any, like: Tensor) -> Any:
    """A frozen copy in the verifier's dtype, on its device."""
    return copy.deepcopy(module).requires_grad_(False).to(device=like.device, dtype=like.dtype)
