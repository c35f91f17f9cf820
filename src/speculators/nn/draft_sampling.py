"""Drawing drafts from a drafter's logits. Shapes: [..., V] logits over the draft vocabulary, [...] temperatures."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-5
MIN_NOISE = 1e-30


def draft_probs(logits: Tensor, temperature: Tensor) -> Tensor:
    """q of each row; a row at temperature 0 is a point mass on its argmax."""
    probs = (logits.float() / temperature.clamp_min(MIN_TEMPERATURE)[..., None]).softmax(-1)
    point = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where((temperature <= 0)[..., None], point, probs)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row by the exponential race: no transfer to the host, and tokens of probability 0 cannot win."""
    noise = torch.empty_like(probs).exponential_(generator=generator).clamp_min_(MIN_NOISE)
    return (probs / noise).argmax(-1)
