"""What draft rows are compared with: rows of target distributions, made when they are asked for.

Shapes: T target rows, H hidden size, V draft vocabulary, C chosen rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.losses.gradients import Rows, TargetRows, TokenRows


class Targets(Protocol):
    """Makes target distributions of chosen rows."""

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows: ...


@dataclass(frozen=True)
class HeadTargets:
    """The verifier's own distributions: its head on its (normed) hidden rows, and what it does to logits."""

    hidden_TH: Tensor
    weight_VH: Tensor
    scale: float = 1.0
    """Logits are multiplied by it (`logit_scale`; 1 / `logits_scaling`)."""
    softcap: float | None = None
    """`final_logit_softcapping`: cap * tanh(logits / cap)."""

    def logits(self, rows_C: Tensor, dtype: torch.dtype) -> Tensor:
        logits_CV = F.linear(self.hidden_TH[rows_C].to(dtype), self.weight_VH.to(dtype))
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        return logits_CV if self.softcap is None else self.softcap * torch.tanh(logits_CV / self.softcap)

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows:
        return Rows(self.logits(rows_C, dtype))


@dataclass(frozen=True)
class TokenTargets:
    """Hard labels; only `ce` makes sense with them."""

    token_ids_T: Tensor

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows:
        return TokenRows(self.token_ids_T[rows_C])
