"""Defaults of preparing and regenerating, where the command's help can read them without importing anything heavy."""

from __future__ import annotations

DEFAULT_OUTPUT = "./output"
DEFAULT_SEQ_LENGTH = 8192
"""Tokens of the longest row."""
DEFAULT_ANSWER_TOKENS = 1024
"""Longest regenerated answer."""
DEFAULT_ANSWERED_TOGETHER = 32
"""Conversations that one batch answers."""
