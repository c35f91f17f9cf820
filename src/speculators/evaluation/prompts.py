"""Prompts to decode: each conversation up to its first answer, rendered as when responses are regenerated."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from speculators.data_generation.conversations import UnusableRow
from speculators.data_generation.datasets import load_raw_dataset
from speculators.data_generation.rollout import make_rollout
from speculators.utils.chat_template import ChatRenderer, ChatTemplateError

logger = logging.getLogger(__name__)


def load_prompts(
    source: str | os.PathLike[str] | Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> list[list[int]]:
    """The first `limit` prompts of a data source, or of rows, as token ids. Raises `ValueError` when it has none."""
    renderer = ChatRenderer(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    prompts: list[list[int]] = []
    reasons: list[str] = []
    raw_rows = load_raw_dataset(source)
    for index, row in enumerate(raw_rows):
        if len(prompts) == limit:
            break
        try:
            rollout = make_rollout(index, row, str(index))
            if renderer is None and rollout.prompt_ids is None:
                renderer = ChatRenderer(tokenizer)  # raises for a tokenizer without a template
            prompts.append(rollout.next_prompt(renderer) or [])
        except (UnusableRow, ChatTemplateError) as reason:
            reasons.append(str(reason))
    if not prompts:
        raise ValueError(
            f"no prompt in {raw_rows.name}: {len(reasons)} rows, {'; '.join(sorted(set(reasons))[:5]) or 'empty'}"
        )
    if reasons:
        logger.warning(
            "%s: %d rows without a prompt are left out; the first: %s", raw_rows.name, len(reasons), reasons[0]
        )
    return prompts
