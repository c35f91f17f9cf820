"""Records of what was read and written: what became of every raw row, what an output was made from (by hashes), and
which conversations of a regeneration are there already."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from speculators.data_generation.conversations import FilteredRow, TokenRow, UnusableRow
from speculators.data_generation.datasets import Place
from speculators.provenance import changed_settings, refuse_changes
from speculators.utils.chat_template import TEMPLATE_DATE, ChatRenderer, chat_template_of
from speculators.utils.files import atomic_write, is_same_model

logger = logging.getLogger(__name__)


Finished: TypeAlias = dict[tuple[str, int], str]
"""(primary id, sample) -> hash of what was asked, for each conversation whose last answer is written."""


def refuse_other_recipe(before: Mapping[str, Any], now: Mapping[str, Any], what: str, ways_out: str) -> None:
    """Raises `ValueError` with two columns when `what` was made by another recipe."""
    changed = changed_settings(before, now)
    changes = {name: change for name, change in changed.items() if not is_equivalent(name, before, now)}
    if "template_date" in changes:
        again = json.dumps({TEMPLATE_DATE: before.get("template_date")})
        ways_out += f"; --chat-template-kwargs '{again}' gives the template the date again"
    refuse_changes(changes, what, ways_out)


def template_date(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None) -> str | None:
    """Returns the date that the rows name; None when the template does not ask for one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    date = ChatRenderer(tokenizer, template_kwargs).date
    return None if date is None else f"{date:%Y-%m-%d}"


def is_equivalent(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a changed setting gives the same rows: a date is compared as the one that the rows name, `template_date`,
    and a model may be named in another way."""
    if name == "verifier":
        was, is_now = before.get(name), now.get(name)
        return isinstance(was, str) and isinstance(is_now, str) and is_same_model(was, is_now)
    return name == f"chat_template_kwargs.{TEMPLATE_DATE}"


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
    ways_out = "give the settings before to complete it, or choose another output"
    refuse_other_recipe(json.loads(path.read_text(encoding="utf-8")), now, repr(str(output)), ways_out)


def json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@dataclass
class Outcome:
    """What became of one raw row."""

    index: int
    """Row of the sources."""
    row_id: str | None
    """Its own id, if it has one."""
    place: Place | None = None
    """Where it stands, for people."""
    rows: list[TokenRow] = field(default_factory=list)
    num_turns: int = 0
    """Answers in it, as far as it could be parsed."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Reason -> answers (or the whole row) that a setting or the row itself leaves out."""
    num_without_reasoning: int = 0
    problem: UnusableRow | None = None
    """Why the whole row is bad."""

    def __str__(self) -> str:
        place = {"row": self.index} if self.place is None else self.place
        return f"{' '.join(f'{key} {value}' for key, value in place.items())}, id {self.row_id}: {self.problem}"

    def record(self) -> dict[str, Any]:
        """Returns the line of the quarantine file."""
        assert self.problem is not None
        place = {"row": self.index} if self.place is None else self.place
        return {**place, "id": self.row_id, "reason": str(self.problem)}

    def keep(self, num_rows: int) -> None:
        """Leaves out the training rows beyond the first `num_rows`."""
        for row in self.rows[num_rows:]:
            self.filtered["beyond max_samples"] += row.num_turns
        self.rows = self.rows[:num_rows]

    @property
    def fate(self) -> str:
        if self.problem is not None:
            return "filtered" if isinstance(self.problem, FilteredRow) else "quarantined"
        return "written" if self.rows else "filtered"


@dataclass
class UnitCounts:
    """What became of all rows, turns (answers) or conversations that were read."""

    read: int = 0
    written: int = 0
    quarantined: int = 0
    filtered: int = 0

    def add(self, fate: str) -> None:
        self.read += 1
        self.written += fate == "written"
        self.quarantined += fate == "quarantined"
        self.filtered += fate == "filtered"

    def __add__(self, other: UnitCounts) -> UnitCounts:
        return UnitCounts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def check(self, unit: str) -> None:
        assert self.read == self.written + self.quarantined + self.filtered, f"{unit}: {self} do not add up"


UNITS = ("conversations", "turns", "rows")


@dataclass
class Tokenized:
    """Training rows, and counts of what happened to the raw ones."""

    outcomes: list[list[Outcome]] = field(default_factory=list)
    """What became of the raw rows of each conversation, until it is counted."""
    rows: list[TokenRow] = field(default_factory=list)
    units: dict[str, UnitCounts] = field(default_factory=lambda: {unit: UnitCounts() for unit in UNITS})
    """`rows` are raw rows; one is written when it gives a training row. Rows of one `primary_id` are a conversation."""
    quarantine: list[Outcome] = field(default_factory=list)
    """The bad raw rows."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Reason -> answers (or raw rows) that are left out though nothing is wrong with them."""
    unknown_roles: Counter[str] = field(default_factory=Counter)
    num_without_reasoning: int = 0
    """Rows whose answer had reasoning that the template does not render."""
    num_cut_rows: int = 0
    """Training rows that lost supervised tokens to `seq_length`."""
    num_cut_tokens: int = 0
    """Supervised tokens that they lost."""
    num_cross_checked: int = 0
    """Rows whose boundary could be compared with the template's own {% generation %} blocks."""
    num_disagreeing: int = 0
    num_rendered_elsewhere: int = 0
    """Conversations whose last row was compared with what a server renders."""
    rendered_otherwise: list[str] = field(default_factory=list)
    """Where it differed."""

    @property
    def num_read(self) -> int:
        """Raw rows read."""
        return self.units["rows"].read

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> number of raw rows or turns that gave no training row."""
        return self.filtered + Counter(str(problem.reason) for problem in self.problems())

    def problems(self) -> Iterator[UnusableRow]:
        return (outcome.problem for outcome in self.quarantine if outcome.problem is not None)

    def add(self, other: Tokenized) -> None:
        self.rows += other.rows
        self.add_counts(other)

    def add_counts(self, other: Tokenized) -> None:
        self.units = {unit: self.units[unit] + other.units[unit] for unit in UNITS}
        self.quarantine += other.quarantine
        self.filtered += other.filtered
        self.unknown_roles += other.unknown_roles
        self.num_without_reasoning += other.num_without_reasoning
        self.num_cut_rows += other.num_cut_rows
        self.num_cut_tokens += other.num_cut_tokens
        self.num_cross_checked += other.num_cross_checked
        self.num_disagreeing += other.num_disagreeing
        self.num_rendered_elsewhere += other.num_rendered_elsewhere
        self.rendered_otherwise += other.rendered_otherwise

    def settle(self, max_rows: int | None = None) -> None:
        """Counts the outcomes and keeps the first `max_rows` training rows of them."""
        for conversation in self.outcomes:
            for outcome in conversation:
                if max_rows is not None:
                    outcome.keep(max(0, max_rows - len(self.rows)))
                self.count(outcome)
            fates = {outcome.fate for outcome in conversation}
            self.units["conversations"].add(next(f for f in ("written", "quarantined", "filtered") if f in fates))
        self.outcomes = []

    def count(self, outcome: Outcome) -> None:
        self.rows += outcome.rows
        self.num_cut_rows += sum(row.num_cut > 0 for row in outcome.rows)
        self.num_cut_tokens += sum(row.num_cut for row in outcome.rows)
        self.filtered += outcome.filtered
        self.units["rows"].add(outcome.fate)
        turns = self.units["turns"]
        turns.read += outcome.num_turns
        turns.written += sum(row.num_turns for row in outcome.rows)
        if outcome.fate == "quarantined":
            turns.quarantined += outcome.num_turns
            self.quarantine.append(outcome)
        elif outcome.problem is None:
            turns.filtered += outcome.filtered.total()
            self.num_without_reasoning += outcome.num_without_reasoning if outcome.rows else 0
