"""The MLP speculator's network: a state that starts as the verifier's and takes in one token per step.

Shapes: H hidden size, D width of the state, V vocabulary, n steps.

    s = f = final norm of y          (scale_input: without its scale, over sqrt(2))
    step k:   s = GELU(ln_k(proj_k(s) + (e / w) emb_k(x)));   logits = head_k(s)       w = 0.5 ** (0.5 / n)
                                                                                       e = sqrt((1 - w^2) D / 2)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.nn.flops import product_flop

EPS = 1e-6


def without_scale(hidden: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps), statistics in fp32."""
    return F.rms_norm(hidden.float(), hidden.shape[-1:], eps=EPS).to(hidden.dtype)


class BiasedRMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return without_scale(hidden) * self.weight + self.bias


@dataclass(frozen=True)
class MLPNetwork:
    """Owns nothing. Of each kind there are as many modules as have weights of their own; the last serves all further
    steps."""

    verifier_norm: nn.Module
    emb: Sequence[Any]
    proj: Sequence[Any]
    ln: Sequence[Any]
    head: Sequence[Any]
    num_steps: int
    scale_input: bool

    @property
    def heads(self) -> list[nn.Linear]:
        return [of_step(self.head, k) for k in range(self.num_steps)]

    @property
    def token_weight(self) -> float:
        """Of the embedding beside the state: e / w."""
        state_weight = 0.5 ** (0.5 / self.num_steps)
        return math.sqrt((1 - state_weight**2) * self.proj[0].out_features / 2) / state_weight

    def start(self, states: Tensor) -> Tensor:
        hidden = self.verifier_norm(states)
        return without_scale(hidden) / math.sqrt(2) if self.scale_input else hidden

    def step(self, k: int, carried: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.token_weight * of_step(self.emb, k)(token_ids)
        state = F.gelu(of_step(self.ln, k)(of_step(self.proj, k)(carried) + embedded))
        return state, state

    def step_flop(self, k: int, num_rows: int) -> int:
        return product_flop(of_step(self.proj, k).weight, num_rows, input_learns=k > 0)


def of_step(modules: Sequence[Any], k: int) -> Any:
    return modules[min(k, len(modules) - 1)]
