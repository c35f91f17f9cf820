"""Turns tokens into text as they come, and finds stop strings in it."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalText:
    """The text of a growing token list. Each token is decoded with the few before it, never the whole list again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self._token_ids: list[int] = []
        self._num_returned = 0  # characters
        self._context_start = 0  # tokens from here on are decoded together: spaces depend on the token before
        self._num_read = 0

    def add(self, token_id: int) -> bool:
        """Append a token; True when a stop string became complete (the text is then cut before it)."""
        self._token_ids.append(token_id)
        known = self._decode(self._token_ids[self._context_start : self._num_read])
        window = self._decode(self._token_ids[self._context_start :])
        if window.endswith(REPLACEMENT) or len(window) <= len(known):
            return False  # inside a character, or no new text
        return self._append(window[len(known) :])

    def finish(self) -> None:
        """Add an unfinished character as it is: no token will follow."""
        if self._num_read < len(self._token_ids):
            known = self._decode(self._token_ids[self._context_start : self._num_read])
            self.text += self._decode(self._token_ids[self._context_start :])[len(known) :]

    def take(self, *, is_final: bool) -> str:
        """The text since the last call. Until it is final, a possible start of a stop string is held back."""
        start, end = self._num_returned, len(self.text) - (0 if is_final else self._num_undecided())
        self._num_returned = end
        return self.text[start:end]

    def _num_undecided(self) -> int:
        """Counts the last characters that may be the start of a stop string."""
        longest = max((len(s) for s in self.stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(len(s) > length and s.startswith(self.text[-length:]) for s in self.stop):
                return length
        return 0

    def _append(self, piece: str) -> bool:
        searched_from = max(0, len(self.text) - max((len(s) for s in self.stop), default=0))
        self.text += piece
        self._context_start, self._num_read = self._num_read, len(self._token_ids)
        found = [at for at in (self.text.find(s, searched_from) for s in self.stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def _decode(self, token_ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(token_ids, skip_special_tokens=True)) if token_ids else ""
