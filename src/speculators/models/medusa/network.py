"""The Medusa network: K heads side by side, all on the same verifier state.

Shapes: H hidden size, V vocabulary.

    f = final norm of y;   head k:  r = f;  repeat: r = r + SiLU(W r + b);   logits = L_k r
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


class MedusaBlock(nn.Module):
    """The residual layers of one head; starts as the identity."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden_size, hidden_size) for _ in range(num_layers)])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + F.silu(layer(hidden))
        return hidden


@dataclass(frozen=True)
class MedusaNetwork:
    """Owns nothing."""

    verifier_norm: nn.Module
    blocks: Sequence[nn.Module]
    heads: Sequence[nn.Linear]

    def start(self, states: Tensor) -> Tensor:
        return self.verifier_norm(states)

    def step(self, k: int, carried: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Heads do not see each other's tokens."""
        return self.blocks[k](carried), carried
