"""A smaller causal LM drafts: greedily, or drawing from its own distribution.

Shapes: B rows, K draft tokens, V vocabulary of the verifier, T new tokens.

    sequence   x0 .. x[L-1]  x[L]          committed; the draft's cache holds a prefix of it, and last round's drafts
    fed        the tokens committed since the last call, at their own positions: drafts beyond them are overwritten
    drafted    x[L+1]' from the last fed token, then one token a step
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speculators.decoding.hf_verifier import HFVerifier
from speculators.decoding.proposers.vocabulary import TokenIntersection
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal

ALONE_FROM = 32
"""A row with this many new tokens (a prompt) is fed alone: padding the other rows to it would cost more."""
PREFILL_CHUNK = 512


class DraftModelProposer:
    """Any causal LM with the verifier's vocabulary, or with a `TokenIntersection` (greedy only)."""

    def __init__(self, model: Any, *, max_batch_size: int, intersection: TokenIntersection | None = None):
        self.capture = CaptureSpec()
        self.lm = HFVerifier(model, max_batch_size)
        self.intersection = intersection

    def __enter__(self) -> DraftModelProposer:
        self.lm.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.lm.__exit__(*exc)

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        with self:
            logits_BV, takes_part_B = self.feed(committed)
            tokens, probs, confidence = [], [], []
            lengths = list(self.lm.length_by_row)
            for step in range(num_tokens):
                token_B, probs_BV = self._draw(logits_BV, sampling)
                if sampling.wants_confidence:
                    confidence.append(logits_BV.float().softmax(-1).amax(-1))
                tokens.append(token_B)
                probs.append(probs_BV)
                if step < num_tokens - 1:
                    logits_BV = self._step(token_B)
            self.lm.length_by_row[:] = lengths  # drafts are not committed: the next call writes over them
        token_ids_BK = torch.stack(tokens, 1).masked_fill(~takes_part_B[:, None], -1)
        return Proposal(
            token_ids_BK,
            torch.stack(probs, 1) if sampling.probabilistic else None,  # type: ignore[arg-type]
            confidence_BK=torch.stack(confidence, 1) if confidence else None,
        )

    def feed(self, committed: Committed) -> tuple[Tensor, Tensor]:
        """Bring every row's cache up to its committed tokens: logits after the last one [B, V], who takes part [B]."""
        num_new, num_committed = torch.stack([committed.num_new_B, committed.num_committed_B]).tolist()
        token_ids_BT = committed.token_ids_BT
        if self.intersection is not None:
            token_ids_BT = self.intersection.to_draft(token_ids_BT)
        B = len(num_new)
        for row in range(B):
            self.lm.truncate(row, num_committed[row] - num_new[row] if num_new[row] else 0)
        alone = [row for row in range(B) if num_new[row] >= ALONE_FROM]
        together = [0 if row in alone else new for row, new in enumerate(num_new)]
        logits_BV = torch.zeros(B, self.lm.vocab_size, device=token_ids_BT.device)
        if any(together):
            width, num_valid_B = max(together), torch.tensor(together)
            logits_BV = self.lm.score(token_ids_BT[:, :width], num_valid_B, last_only=True).logits_BTV[:, 0].float()
            self.lm.keep(torch.arange(width).expand(B, width), num_valid_B)
        for row in alone:
            logits_BV[row] = self._feed_alone(row, token_ids_BT[row : row + 1, : num_new[row]])
        return logits_BV, committed.num_new_B > 0

    def _feed_alone(self, row: int, token_ids_1T: Tensor) -> Tensor:
        for chunk_1T in token_ids_1T.split(PREFILL_CHUNK, dim=1):
            num_valid_1 = torch.tensor([chunk_1T.shape[1]])
            output = self.lm.score(chunk_1T, num_valid_1, first_row=row, last_only=True)
            self.lm.keep(torch.arange(chunk_1T.shape[1])[None], num_valid_1)
        return output.logits_BTV[0, 0].float()

    def _step(self, token_B: Tensor) -> Tensor:
        if self.intersection is not None:
            token_B = self.intersection.to_draft(token_B)
        num_valid_B = torch.ones(len(token_B), dtype=torch.int64)
        logits_BTV = self.lm.score(token_B[:, None], num_valid_B).logits_BTV
        self.lm.keep(torch.zeros(len(token_B), 1, dtype=torch.int64), num_valid_B)
        return logits_BTV[:, 0]

    def _draw(self, logits_BV: Tensor, sampling: DraftSampling) -> tuple[Tensor, Tensor | None]:
        if self.intersection is not None:
            return self.intersection.best(logits_BV), None
        if not sampling.probabilistic:
            return logits_BV.argmax(-1), None
        probs_BV = draft_probs(logits_BV, sampling.temperature_B)
        return draw(probs_BV, sampling.generator), probs_BV


def draft_probs(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """q of each row: softmax(logits / temperature); a greedy row is a point mass on its argmax."""
    is_greedy_B1 = (temperature_B == 0)[:, None]
    probs_BV = (logits_BV.float() / temperature_B[:, None].masked_fill(is_greedy_B1, 1.0)).softmax(-1)
    one_hot_BV = torch.zeros_like(probs_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    return torch.where(is_greedy_B1, one_hot_BV, probs_BV)


def draw(probs_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row, where the generator lives."""
    if generator is None or generator.device == probs_BV.device:
        return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
    return torch.multinomial(probs_BV.to(generator.device), 1, generator=generator)[:, 0].to(probs_BV.device)
