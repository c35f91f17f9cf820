"""How EAGLE-3 drafts: a chain on its own cache, fed its own states. See `models.feedback_proposer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from speculators.interfaces import CaptureSpec
from speculators.models.feedback_proposer import FeedbackProposer

if TYPE_CHECKING:
    from speculators.models.eagle3.network import Eagle3Network


class Eagle3Proposer(FeedbackProposer):
    """Snapshot of a drafter that reads the states of some layers. `network` should be fused."""

    def __init__(
        self,
        network: Eagle3Network,
        target_layer_ids: Sequence[int],
        d2t: Tensor | None,
        verifier_vocab_size: int,
        *,
        max_batch_size: int,
        max_length: int,
    ):
        capture = CaptureSpec(aux_layer_ids=tuple(target_layer_ids))
        super().__init__(
            network, capture, d2t, verifier_vocab_size, max_batch_size=max_batch_size, max_length=max_length
        )
