"""How EAGLE drafts: a chain on its own cache, fed its own features. See `models.feedback_proposer`.

sequence   x0   x1   x2   x3            committed: token x[i] with the last state y[i-1] that predicted it
entry      (x1,f0) (x2,f1) (x3,f2)      f = the verifier's final norm of y; the last entry drafts x4
drafts     (x4', f3') (x5', f4') ...    predicted features; overwritten by the next commit
"""

from __future__ import annotations

from typing import Any

from speculators.interfaces import CaptureSpec
from speculators.models.eagle.network import EagleNetwork
from speculators.models.feedback_proposer import FeedbackProposer


class EagleProposer(FeedbackProposer):
    """Snapshot of a drafter that reads the verifier's last state."""

    def __init__(self, network: EagleNetwork, verifier_vocab_size: int, **sizes: Any):
        super().__init__(network, CaptureSpec(last_hidden=True), None, verifier_vocab_size, **sizes)
