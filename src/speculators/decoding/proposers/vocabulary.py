"""Drafting with another tokenizer: the tokens that both vocabularies spell the same way.

Shapes: V verifier vocabulary, U draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SPACE_MARKERS = ("Ġ", "▁")
"""How byte-level BPE and SentencePiece write a leading space."""


class TokenIntersection:
    """Maps ids both ways. Draft tokens outside it are never drafted; committed ones outside it are fed as `unknown`."""

    def __init__(self, verifier_tokenizer: Any, draft_tokenizer: Any, *, num_verifier: int, num_draft: int):
        verifier_ids = {normalised(token): i for token, i in verifier_tokenizer.get_vocab().items() if i < num_verifier}
        draft_ids = {normalised(token): i for token, i in draft_tokenizer.get_vocab().items() if i < num_draft}
        shared = sorted(verifier_ids.keys() & draft_ids.keys())
        if not shared:
            raise ValueError("verifier and draft tokenizers have no token in common; choose another draft model")
        unknown = (
            draft_tokenizer.unk_token_id if draft_tokenizer.unk_token_id is not None else draft_tokenizer.eos_token_id
        )
        self.draft_id_V = torch.full((num_verifier,), unknown or 0, dtype=torch.int64)
        self.verifier_id_U = torch.full((num_draft,), -1, dtype=torch.int64)
        for token in shared:
            self.draft_id_V[verifier_ids[token]] = draft_ids[token]
            self.verifier_id_U[draft_ids[token]] = verifier_ids[token]

    def to_draft(self, token_ids: Tensor) -> Tensor:
        return self.draft_id_V.to(token_ids.device)[token_ids]

    def best(self, logits_BU: Tensor) -> Tensor:
        """The likeliest shared token of each row, as a verifier id."""
        verifier_id_U = self.verifier_id_U.to(logits_BU.device)
        return verifier_id_U[logits_BU.masked_fill(verifier_id_U < 0, -torch.inf).argmax(-1)]


def normalised(token: str) -> str:
    for marker in SPACE_MARKERS:
        token = token.replace(marker, " ")
    return token
