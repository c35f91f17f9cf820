"""Says what rows were made from, by hashes, and what of a regeneration is there to be completed by the same recipe."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from speculators.utils.chat_template import chat_template_of
from speculators.utils.files import atomic_write, is_same_model

logger = logging.getLogger(__name__)


Finished: TypeAlias = dict[tuple[str, int], str]
"""(primary id, sample) -> hash of what was asked, for each conversation whose last answer is written."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names each entry of two recipes that differs; an empty text when they are equal."""
    return "; ".join(
        f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in now if differs(name, before, now)
    )


def differs(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    was, value = before.get(name), now[name]
    if name == "verifier" and isinstance(was, str) and isinstance(value, str):
        return not is_same_model(was, value)
    return bool(was != value)


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hashes the chat template; None for a tokenizer without one."""
    return sha256(chat_template_of(tokenizer)) if getattr(tokenizer, "chat_template", None) else None


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hashes what decides token ids: the whole fast tokenizer, or the vocabulary of a slow one."""
    if getattr(tokenizer, "is_fast", False):
        return sha256(tokenizer.backend_tokenizer.to_str())
    return sha256(json.dumps(sorted(tokenizer.get_vocab().items())))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def contents_sha256(path: Path) -> str | None:
    """Hashes a file, or all files of a directory; None when the path does not exist (a source on the hub)."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def finished_conversations(path: Path) -> Finished:
    """Finds the conversations that an earlier run wrote to their last turn; removes the rows of those that it did not.

    Raises `ValueError` for a line that regeneration did not write.
    """
    finished: Finished = {}
    unfinished: set[tuple[str, int]] = set()
    is_cut = False
    if not path.exists():
        return finished
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # cut off in writing
                is_cut = True
                break
            try:
                key, metadata = key_of(line)
                is_last, content = bool(metadata["is_last_turn"]), str(metadata["content_sha256"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {str(path)!r} is not a row of regenerate-responses ({error}); remove it or "
                    "choose another output"
                ) from error
            if is_last:
                finished[key] = content
                unfinished.discard(key)
            else:
                unfinished.add(key)
    if is_cut or unfinished:
        logger.warning("%s: %d unfinished conversations are answered again", path, len(unfinished))
        with path.open("rb") as file, atomic_write(path, "wb") as kept:
            kept.writelines(line for line in file if line.endswith(b"\n") and key_of(line)[0] not in unfinished)
    return finished


def key_of(line: bytes) -> tuple[tuple[str, int], Mapping[str, Any]]:
    row = json.loads(line)
    return (str(row["primary_id"]), int(row["metadata"]["sample"])), row["metadata"]


def open_recipe(output: Path, recipe: Mapping[str, Any]) -> None:
    """Writes the recipe beside a new output; raises `ValueError`, naming the differences, if it had another."""
    path = output.with_suffix(".recipe.json")
    now = json.loads(json.dumps(recipe))
    if not output.exists():
        with atomic_write(path) as file:
            file.write(json.dumps(now, indent=2, ensure_ascii=False) + "\n")
        return
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} is missing, so nobody can say how {str(output)!r} was made; choose another output"
        )
    differing = differences(json.loads(path.read_text(encoding="utf-8")), now)
    if differing:
        raise ValueError(
            f"{str(output)!r} was made differently: {differing}; give the same settings to complete it, or choose "
            "another output"
        )
