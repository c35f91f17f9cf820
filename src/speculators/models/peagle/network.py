"""The P-EAGLE network: EAGLE-3's, and what stands in masked slots.

Shapes: D = aux layers * H.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from speculators.models.eagle3.network import Eagle3Network


@dataclass(frozen=True)
class PEagleNetwork(Eagle3Network):
    mask_token_id: int
    mask_hidden: Tensor
    """[1, 1, D] in place of verifier states."""
