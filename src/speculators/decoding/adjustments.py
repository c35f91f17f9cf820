"""Adjusts the verifier's scores as requests ask: adds biases everywhere, and minus infinity to the tokens that would
end a request too early, and to the last token of a bad word where the output ends with the others.

Shapes: B rows, T scored columns (0 follows the last committed token, j + 1 follows draft slot j), V vocabulary,
E adjustments of all rows, L tokens before a column.

Drafts before a column count as emitted: each column of a chain, and each node of a tree, has a context of its own.

    output        .. y8  y9          columns of a chain        of a tree with parents (-1, -1, 0)
    before column 0      y9          y9                        y9
    before column 1                  y9 d0                     y9 d0
    before column 2                  y9 d0 d1                  y9 d1
    before column 3                  y9 d0 d1 d2               y9 d0 d2
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speculators.decoding.settings import SamplingParams
from speculators.decoding.trees.token_tree import depths
from speculators.interfaces import Proposal
from speculators.nn.device import to_device

NO_TOKEN, ANY_TOKEN = -1, -2
"""In place of token ids: before the output began; what every context matches."""
FOREVER = 2**62


@dataclass(frozen=True)
class Adjustment:
    """One number added to the score of one token, in the columns where both conditions hold."""

    token_id: int
    amount: float
    before: tuple[int, ...] = ()
    """The output ends with these tokens."""
    num_output_below: int = FOREVER
    """The output has fewer tokens."""


def adjustments_of(
    params: SamplingParams, end_ids: Collection[int], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> tuple[Adjustment, ...]:
    """A request's adjustments. `end_ids`: what `min_tokens` holds back: end-of-sequence, ignored or not, and stop ids.

    Raises ValueError for a token outside the vocabulary, and for bad words that cannot be tokenised."""
    found = [Adjustment(token_id, bias) for token_id, bias in (params.logit_bias or {}).items()]
    for word in params.bad_words:
        found += [Adjustment(ids[-1], -math.inf, before=tuple(ids[:-1])) for ids in word_tokens(word, tokenizer)]
    for adjustment in found:
        outside = next((i for i in (*adjustment.before, adjustment.token_id) if i >= vocab_size), None)
        if outside is not None:
            name = "logit_bias" if adjustment.amount > -math.inf else "bad_words"
            raise ValueError(f"{name}: token {outside} is outside the verifier's vocabulary of {vocab_size}")
    if params.min_tokens:
        held_back = [i for i in sorted(end_ids) if i < vocab_size]
        found += [Adjustment(i, -math.inf, num_output_below=params.min_tokens) for i in held_back]
    return tuple(found)


def word_tokens(word: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[list[int]]:
    """The token sequences of a bad word: at the start of a text, and after a space if that is another sequence of the
    same length (vLLM's rule)."""
    if tokenizer is None:
        raise ValueError("bad_words were given but the engine has no tokenizer; pass Engine(..., tokenizer=...)")
    bare, spaced = (tokenizer.encode(f"{space}{word.lstrip()}", add_special_tokens=False) for space in ("", " "))
    if not bare:
        raise ValueError(f"bad_words: {word!r} has no token")
    yield bare
    if len(spaced) == len(bare) and spaced[0] != bare[0]:
        yield spaced


class BatchAdjustments:
    """The adjustments of a batch's rows, as tensors."""

    def __init__(self, adjustments_by_row: Sequence[Sequence[Adjustment]], device: torch.device):
        rows = [row for row, adjustments in enumerate(adjustments_by_row) for _ in adjustments]
        flat = [adjustment for adjustments in adjustments_by_row for adjustment in adjustments]
        self.num_before = max((len(adjustment.before) for adjustment in flat), default=0)
        """L"""
        any_token = (ANY_TOKEN,) * self.num_before
        before = [[*any_token[len(adjustment.before) :], *adjustment.before] for adjustment in flat]
        self.row_E1 = to_device(rows, device)[:, None]
        self.token_E1 = to_device([adjustment.token_id for adjustment in flat], device)[:, None]
        self.amount_E1 = to_device([adjustment.amount for adjustment in flat], device, torch.float32)[:, None]
        self.below_E1 = to_device([adjustment.num_output_below for adjustment in flat], device)[:, None]
        self.before_E1L = to_device(before, device)[:, None]

    def added(self, logits_BTV: Tensor, outputs: Sequence[Sequence[int]], proposal: Proposal) -> Tensor:
        """New fp32 logits. `outputs`: the tokens that each row has generated."""
        _, T, V = logits_BTV.shape
        ends = [[NO_TOKEN] * (self.num_before - len(tokens)) + list(tokens) for tokens in map(self._end, outputs)]
        ends_BL = to_device(ends, logits_BTV.device)
        num_output_B1 = to_device([len(output) for output in outputs], logits_BTV.device)[:, None]
        before_BTL, depth_T = contexts(ends_BL, proposal)
        num_output_BT = num_output_B1 + depth_T
        row_E = self.row_E1[:, 0]
        holds_ET = num_output_BT[row_E] < self.below_E1
        holds_ET &= ((before_BTL[row_E] == self.before_E1L) | (self.before_E1L == ANY_TOKEN)).all(-1)
        amount_ET = torch.where(holds_ET, self.amount_E1, 0.0)
        index_ET = (self.row_E1 * T + torch.arange(T, device=row_E.device)) * V + self.token_E1
        flat = logits_BTV.float().flatten()
        return flat.scatter_add(0, index_ET.flatten(), amount_ET.flatten()).view_as(logits_BTV)

    def _end(self, output: Sequence[int]) -> Sequence[int]:
        return output[len(output) - self.num_before :] if len(output) > self.num_before else output


def contexts(ends_BL: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """The last L tokens before each column [B, T, L], drafts included, and how many drafts those are in all [T]."""
    token_ids_BK, parents_K = proposal.token_ids_BK, proposal.parents_K
    parents = list(range(-1, token_ids_BK.shape[1] - 1)) if parents_K is None else parents_K.tolist()
    depth_T = to_device([0, *depths(parents)], token_ids_BK.device)
    columns = [ends_BL]
    for slot, parent in enumerate(parents):
        longer = torch.cat([columns[parent + 1], token_ids_BK[:, slot, None]], dim=1)
        columns.append(longer[:, 1:])
    return torch.stack(columns, dim=1), depth_T
