"""How an MTP layer drafts: a chain fed with its own states, on its own cache (see `models.feedback_proposer`).

Shapes: B rows, T columns, H hidden size.

    sequence   x0   x1   x2   x3            committed: token x[i] with the state y[i-1] that predicted it
    entry      (x1,f0) (x2,f1) (x3,f2)      f = final norm of y; positions 0 1 2; the last one drafts x4
    drafts     (x4', h2) (x5', h3) ...      positions 3, 4, ...: fed back states; overwritten by the next commit
"""

from __future__ import annotations

from torch import Tensor

from speculators.interfaces import CaptureSpec
from speculators.models.feedback_proposer import FeedbackProposer, StepOutput
from speculators.models.mtp.network import MTPNetwork
from speculators.nn.cache import Span


class MTPProposer(FeedbackProposer):
    """Snapshot of a drafter, made to draft. `network` should be fused."""

    network: MTPNetwork

    def __init__(self, network: MTPNetwork, verifier_vocab_size: int, *, max_batch_size: int, max_length: int):
        super().__init__(
            network,
            CaptureSpec(last_hidden=True),
            None,
            verifier_vocab_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )

    def step(self, token_ids_BT: Tensor, hidden_BTH: Tensor, span: Span) -> StepOutput:
        tokens_BT = self.network.tokens_at(token_ids_BT, span.positions(self.device))
        return super().step(tokens_BT, hidden_BTH, span)
