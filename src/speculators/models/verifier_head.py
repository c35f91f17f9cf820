"""What drafters are taught: the verifier's next-token distributions, made of its last states when they are needed.

Shapes: T columns, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from speculators.losses.chunks import HeadTargets
from speculators.verifier.config import LogitTransform


@dataclass(frozen=True)
class VerifierHead:
    """How the verifier turns its last state into logits: transform(lm_head(norm(state)))."""

    norm: nn.Module
    lm_head: nn.Linear
    """Of the draft vocabulary's tokens alone, where there is one."""
    transform: LogitTransform

    def targets(self, last_hidden_TH: Tensor) -> HeadTargets:
        """Distributions after each column; states are before the final norm."""
        return self.normed_targets(self.norm(last_hidden_TH))

    def normed_targets(self, normed_TH: Tensor) -> HeadTargets:
        return HeadTargets(normed_TH, self.lm_head.weight, *self.transform)
