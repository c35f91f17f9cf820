"""Draws drafts from a drafter's logits.

Shapes: [..., V] logits over the draft vocabulary, [...] temperatures; B rows, K draft tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.interfaces import DraftSampling
from speculators.nn.draft_vocab import draft_to_verifier_ids, scatter_to_verifier

NO_DRAFT = -1
"""In place of a token id: this slot has no draft."""
MIN_TEMPERATURE = 1e-5
MIN_NOISE = 1e-30


def draft_probs(logits: Tensor, temperature: Tensor) -> Tensor:
    """Returns q per row; at temperature 0 it is a point mass on the argmax."""
    probs = (logits.float() / temperature.clamp_min(MIN_TEMPERATURE)[..., None]).softmax(-1)
    point = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where((temperature <= 0)[..., None], point, probs)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws one token per row by the exponential race: no transfer to the host, and probability 0 cannot win."""
    noise = torch.empty_like(probs).exponential_(generator=generator).clamp_min_(MIN_NOISE)
    return (probs / noise).argmax(-1)


def draft_slots(
    logits_BKV: Tensor, sampling: DraftSampling, d2t: Tensor | None, verifier_vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """Drafts slots that do not see each other's tokens. Returns verifier ids [B, K] and, if they were drawn, q over the
    verifier's vocabulary: q of a slot does not depend on the other drafts, so their product is a proposal."""
    if not sampling.probabilistic:
        return draft_to_verifier_ids(logits_BKV.argmax(-1), d2t), None
    probs_BKV = draft_probs(logits_BKV, sampling.temperature_B[:, None])
    draft_ids_BK = draft_to_verifier_ids(draw(probs_BKV, sampling.generator), d2t)
    return draft_ids_BK, scatter_to_verifier(probs_BKV, d2t, verifier_vocab_size)
