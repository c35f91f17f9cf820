"""Loads sets of prompts for measurements, by name: the embedded one, or a public one from a file that the user has.

A set may have tasks, which results report apart: Spec-Bench's six. A limit takes as many prompts of each task.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from speculators import assets
from speculators.data_generation.datasets import load_raw_dataset
from speculators.data_generation.rollout import load_prompts
from speculators.evaluation.config import OURS, PROMPT_SETS, PromptSet

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
"""Conversations: a file, a directory, `hf:<id>` or a preset, or the rows themselves."""
CATEGORIES_OF_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Spec-Bench counts them as one task (arXiv:2401.07851, section 4): the other five are called what they are."""
MT_BENCH = "mt_bench"


@dataclass(frozen=True)
class NamedPrompts:
    """Prompts as token ids, by task; the only task of a set without tasks is None."""

    name: str
    by_task: Mapping[str | None, Sequence[list[int]]]

    @cached_property
    def all(self) -> list[list[int]]:
        return [prompt for prompts in self.by_task.values() for prompt in prompts]

    @cached_property
    def hash_of(self) -> dict[tuple[int, ...], str]:
        """What names a prompt in results: enough of a SHA-256 to tell millions apart."""
        return {tuple(prompt): sha256_of([prompt])[:16] for prompt in self.all}

    def fitting(self, max_prompt_tokens: int) -> NamedPrompts:
        """Those of at most so many tokens. Raises `ValueError` when there are none."""
        kept = {task: [p for p in prompts if len(p) <= max_prompt_tokens] for task, prompts in self.by_task.items()}
        fitting = NamedPrompts(self.name, {task: prompts for task, prompts in kept.items() if prompts})
        num_left_out = len(self.all) - len(fitting.all)
        told = f"{self.name}: {num_left_out} of {len(self.all)} prompts have more than {max_prompt_tokens} tokens"
        if not fitting.all:
            raise ValueError(f"{told}, which leave no room for an answer in the verifier's positions")
        if num_left_out:
            logger.warning("%s and are left out: an answer has no room in the verifier's positions", told)
        return fitting

    @property
    def sha256(self) -> str:
        return sha256_of(self.all)


def sha256_of(prompts: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()


def load_prompt_set(
    name: str, source: Any, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> NamedPrompts:
    """The first `limit` prompts of a set, evenly of its tasks. `source`: rows, or what `PromptSet.parse` reads.

    Raises `ValueError` for a source that cannot be read, that has no prompt, or that is not the set it is said to be.
    """
    if not isinstance(source, str):
        return NamedPrompts(name, {None: load_prompts(source, tokenizer, limit=limit)})
    named = PromptSet.parse(source)
    if named.name == OURS:
        return NamedPrompts(OURS, {None: load_prompts(assets.prompts_path("heldout"), tokenizer, limit=limit)})
    if named.name not in PROMPT_SETS:
        return NamedPrompts(source, {None: load_prompts(source, tokenizer, limit=limit)})
    rows = list(load_raw_dataset(named.source))
    refuse_other_layout(named, rows)
    rows_of: dict[str | None, list[Any]] = {}
    for row in rows:
        rows_of.setdefault(task_of(row) if "category" in PROMPT_SETS[named.name] else None, []).append(row)
    limits = shares(limit, [len(of_task) for of_task in rows_of.values()])
    by_task = {
        task: load_prompts(of_task, tokenizer, limit=number)
        for (task, of_task), number in zip(rows_of.items(), limits, strict=True)
        if number
    }
    return NamedPrompts(named.name, by_task)


def refuse_other_layout(named: PromptSet, rows: Sequence[Any]) -> None:
    columns = PROMPT_SETS[named.name]
    found = sorted(rows[0]) if rows and isinstance(rows[0], Mapping) else []
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(
            f"data {named.name}={named.source}: its rows have {found}, those of {named.name} have {list(columns)}; "
            "give that file, or this one without a name"
        )


def task_of(row: Mapping[str, Any]) -> str:
    return MT_BENCH if row["category"] in CATEGORIES_OF_MT_BENCH else str(row["category"])


def shares(limit: int | None, sizes: Sequence[int]) -> list[int]:
    """How many of each are taken so that `limit` are taken in all, as evenly as their sizes allow."""
    taken = [0] * len(sizes)
    left = sum(sizes) if limit is None else min(limit, sum(sizes))
    while left:
        for place, size in enumerate(sizes):
            if left and taken[place] < size:
                taken[place] += 1
                left -= 1
    return taken


def named_sources(data: Source | Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Returns what names a source in the settings -> the source, for one source, several of them, or rows."""
    several = [data] if isinstance(data, str | os.PathLike) else data
    if not all(isinstance(source, str | os.PathLike) for source in several):
        return {f"{len(data)} given rows": data}  # type: ignore[arg-type]
    texts = [os.fspath(source) for source in several]  # type: ignore[arg-type]
    return {text: text for text in texts}
