"""Turns tokens into text as they come, and finds stop strings in it."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedTokenizerBase

from speculators.decoding.settings import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MOST_WAITING = 8
"""Tokens that may wait for the rest of a character. Bytes that are no text would wait for ever, and be decoded again
with each token that follows."""
MOST_UNFINISHED = 3
"""Tokens that an unfinished character may have: UTF-8 has at most four bytes, and a token at least one."""


class IncrementalText:
    """The text of a growing token list. Each token is decoded with the few before it, never the whole list again.

    `params` has the settings; a stop string counts where it ends after the first `min_tokens` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams):
        self.tokenizer = tokenizer
        self.stop = params.stop
        self.min_tokens = params.min_tokens
        self.includes_stop = params.include_stop_str_in_output
        self.skips_special_tokens = params.skip_special_tokens
        self.text = ""
        self.found_stop: str | None = None
        self._token_ids: list[int] = []
        self._num_returned = 0  # characters
        self._context_start = 0  # tokens from here on are decoded together: spaces depend on the token before
        self._num_read = 0

    def add(self, token_id: int) -> bool:
        """Append a token; True when a stop string became complete (the text is then cut before or after it)."""
        self._token_ids.append(token_id)
        end, known = len(self._token_ids), self._decode(self._token_ids[self._context_start : self._num_read])
        window = self._decode(self._token_ids[self._context_start :])
        if window.endswith(REPLACEMENT) and end - self._num_read > MOST_WAITING:
            end -= MOST_UNFINISHED
            window = self._decode(self._token_ids[self._context_start : end])
        elif window.endswith(REPLACEMENT):
            return False  # inside a character
        return len(window) > len(known) and self._append(window[len(known) :], end)

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
        """Counts the last characters that may be the start of a stop string, where it is to be left out."""
        if self.includes_stop:
            return 0
        longest = max((len(s) for s in self.stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(len(s) > length and s.startswith(self.text[-length:]) for s in self.stop):
                return length
        return 0

    def _append(self, piece: str, num_read: int) -> bool:
        num_before = len(self.text)
        self.text += piece
        self._context_start, self._num_read = self._num_read, num_read
        if len(self._token_ids) <= self.min_tokens:
            return False
        starts = [(self.text.find(s, max(0, num_before - len(s) + 1)), s) for s in self.stop]
        found = [(start + len(s), start, s) for start, s in starts if start >= 0]
        if found:
            end, start, self.found_stop = min(found)  # what ends first; of those that end together, the longest
            self.text = self.text[: end if self.includes_stop else start]
        return bool(found)

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return cast(str, self.tokenizer.decode(token_ids, skip_special_tokens=self.skips_special_tokens))
