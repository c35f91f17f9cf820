"""RMSNorm with statistics in fp32, in the two gains found in the wild: `w` and `1 + w`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps); the result keeps the dtype of x (also under autocast with fp32 weights)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype == hidden_states.dtype:
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        wide = F.rms_norm(hidden_states.float(), weight.shape, weight.float(), self.variance_epsilon)
        return wide.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class RMSNormPlusOne(RMSNorm):
    """Gain 1 + w, weights start at zero (gemma, qwen3_next, qwen3_5): a plain `w` would silently wreck the targets."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gain = 1.0 + self.weight.float()
        return F.rms_norm(hidden_states.float(), gain.shape, gain, self.variance_epsilon).to(hidden_states.dtype)
