"""What proposers without a network share: reading `Committed` row by row, and writing ragged drafts."""

from __future__ import annotations

import torch

from speculators.interfaces import Committed, Proposal


def new_tokens_by_row(committed: Committed) -> list[tuple[list[int], bool]]:
    """Of each row: the tokens committed since the last call (none = not taking part), and whether a request begins."""
    num_new, num_committed = torch.stack([committed.num_new_B, committed.num_committed_B]).tolist()
    token_ids = committed.token_ids_BT.tolist()
    return [
        (token_ids[row][:new], new == total and new > 0)
        for row, (new, total) in enumerate(zip(num_new, num_committed, strict=True))
    ]


def proposal_of(drafts: list[list[int]], device: torch.device) -> Proposal:
    """Chains of different lengths, as short as the longest of them: no slot is verified for nothing."""
    K = max((len(draft) for draft in drafts), default=0)
    padded = [draft + [-1] * (K - len(draft)) for draft in drafts]
    return Proposal(torch.tensor(padded, dtype=torch.int64, device=device).view(len(drafts), K))
