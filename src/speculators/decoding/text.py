"""Turning tokens into text as they come, and finding stop strings in it."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalText:
    """The text of a growing token list. Each token is decoded with the few before it, never the whole list again."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self._token_ids: list[int] = []
        self._num_taken = 0  # characters
        self._context_start = 0  # tokens from here on are decoded together: spacing depends on the left neighbour
        self._num_read = 0

    def add(self, token_id: int) -> bool:
        """Append a token; True when a stop string became complete (the text is then cut before it)."""
        self._token_ids.append(token_id)
        known = self._decode(self._token_ids[self._context_start : self._num_read])
        window = self._decode(self._token_ids[self._context_start :])
        if window.endswith(REPLACEMENT) or len(window) <= len(known):
            return False  # inside a character, or nothing to show
        return self._append(window[len(known) :])

    def finish(self) -> None:
        """No token will follow: show an unfinished character as it is."""
        if self._num_read < len(self._token_ids):
            known = self._decode(self._token_ids[self._context_start : self._num_read])
            self.text += self._decode(self._token_ids[self._context_start :])[len(known) :]

    def take(self, *, is_final: bool) -> str:
        """The text since the last call. Until it is final, what may turn out to begin a stop string waits."""
        start, end = self._num_taken, len(self.text) - (0 if is_final else self._num_undecided())
        self._num_taken = end
        return self.text[start:end]

    def _num_undecided(self) -> int:
        """How many of the last characters are the beginning of a stop string."""
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
        return self.tokenizer.decode(token_ids, skip_special_tokens=True) if token_ids else ""
