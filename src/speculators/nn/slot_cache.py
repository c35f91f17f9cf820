"""A draft cache behind whose true entries masked slots are run, all of them in one forward that answers several rows.

Shapes: B rows, T new columns, S answered columns, H hidden size.

    row 0   e0 e1 e2 | e3 s s s      entry e3 and three slots in one pass; e3 and the slots are answered
    row 1   e0 | e1 e2 s s s         slots are scratch: the next commit writes over them
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.nn.cache import CacheAttend, DraftCache, Span


@dataclass
class SlotSpan(Span):
    num_answered: int = 1
    """Columns of each row that the last layer answers: from `answered_B` on, or the final ones."""

    def answered_columns(self, device: torch.device) -> Tensor:
        """[B or 1, S]"""
        offsets_S = torch.arange(self.num_answered, device=device)
        if self.answered_B is None:
            return (self.num_columns - self.num_answered + offsets_S)[None]
        return self.answered_B[:, None] + offsets_S

    def answered_positions(self, device: torch.device) -> Tensor:
        """[B or 1, S]"""
        columns_BS, positions_BT = self.answered_columns(device), self.positions(device)
        return positions_BT.expand(len(columns_BS), -1).gather(1, columns_BS)


class SlotCacheAttend(CacheAttend):
    """The last layer answers `num_answered` columns a row."""

    def rows(self, hidden: Tensor) -> Tensor:
        span = self.cache.span
        assert isinstance(span, SlotSpan)
        if not self.last_layer:
            return hidden
        if span.answered_B is None:
            return hidden[:, hidden.shape[1] - span.num_answered :]
        return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], span.answered_columns(hidden.device)]


def slot_attends(cache: DraftCache, windows: list[int | None]) -> list[SlotCacheAttend]:
    """One for each layer, for as long as the cache lives."""
    last = len(windows) - 1
    return [SlotCacheAttend(cache, i, window, last_layer=i == last) for i, window in enumerate(windows)]
