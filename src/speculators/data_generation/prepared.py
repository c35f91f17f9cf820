"""Reads a prepared directory: its manifest, its rows, and their loss masks as readable spans of text.

<output>/*.arrow, dataset_info.json, state.json    `datasets.save_to_disk`: input_ids, loss_mask, seq_len
<output>/token_freq.pt                             dict[int, int], supervised tokens only
<output>/manifest.json                             what the rows were made from and what was left out
<output>/quarantine.jsonl                         the bad rows: file, line, id, reason (only if there are any)
<output>/hidden_states/                            written later, by a `HiddenStateStore`
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.table import Table

from speculators.data_generation.configs import (
    DEFAULT_SEQ_LENGTH,
    DEFAULT_SHOWN_ROWS,
    TokenizeOptions,
    is_prepared,
    refuse_unprepared,
)
from speculators.data_generation.conversations import TokenRow
from speculators.data_generation.datasets import load_raw_dataset
from speculators.data_generation.masks import MaskSpan, mask_spans
from speculators.data_generation.preprocessing import explain_no_rows, load_tokenizer
from speculators.data_generation.records import Tokenized
from speculators.data_generation.tokenizing import RowTokenizer, tokenize_chunks
from speculators.utils.report import PathReport, facts_table

MANIFEST_NAME = "manifest.json"
TOKEN_FREQ_NAME = "token_freq.pt"
QUARANTINE_NAME = "quarantine.jsonl"
HIDDEN_STATES_NAME = "hidden_states"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the rows: two directories with equal recipes hold equal rows."""

    verifier: str
    tokenizer_sha256: str
    chat_template_sha256: str | None
    chat_template_kwargs: dict[str, Any]
    sources: list[str]
    sources_sha256: list[str | None]
    """Hash of each local source's contents; None for a source on the hub."""
    seq_length: int
    max_samples: int | None
    seed: int
    minimum_valid_tokens: int
    merge_turns: bool
    vocab_size: int
    # Absent from directories of earlier versions, which are read as they were made.
    drop_reasoning: bool = False
    template_date: str | None = None
    """The date that the rows name, where the template asks for today's."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the recipe and its result."""

    recipe: Recipe
    library_version: str
    num_read: int
    """Raw rows read."""
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    shortest_row: int
    longest_row: int
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of raw rows or turns that gave no training row."""
    unknown_roles: dict[str, int] = field(default_factory=dict)
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    """conversations, turns and (raw) rows -> read, and of these written, quarantined and filtered."""
    num_without_reasoning: int = 0
    """Training rows whose answer had reasoning that the template does not render."""
    num_cut_rows: int = 0
    num_cut_tokens: int = 0
    """Supervised tokens that those rows lost to `seq_length`."""
    num_rendered_elsewhere: int = 0
    """Conversations that a server (`render_endpoint`) rendered as they are here."""

    @property
    def supervised_share(self) -> float:
        """Supervised tokens / all tokens."""
        return self.num_supervised_tokens / self.num_tokens if self.num_tokens else 0.0

    def facts(self) -> dict[str, str]:
        """For people."""
        return {
            "rows": f"{self.num_rows:,}",
            **{
                f"{unit} read": f"{num['read']:,}: {num['written']:,} written, {num['quarantined']:,} quarantined, "
                f"{num['filtered']:,} filtered"
                for unit, num in self.units.items()
            },
            "tokens": f"{self.num_tokens:,}, {self.supervised_share:.0%} trained on",
            "row length": f"{self.shortest_row} to {self.longest_row}",
            **(
                {"cut (--seq-length)": f"{self.num_cut_tokens:,} trained tokens of {self.num_cut_rows:,} rows"}
                if self.num_cut_tokens
                else {}
            ),
            "left out": "; ".join(f"{count} x {reason}" for reason, count in self.dropped.items()) or "nothing",
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Raises `ValueError`, naming `path`, when this version cannot read the text."""
        try:
            values = json.loads(text)
            manifest = cls(**{**values, "recipe": Recipe(**values["recipe"])})
            refuse_other_types(manifest)
            manifest.facts()  # every part of it can be shown
            return manifest
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a manifest that this version of speculators can read ({error}); prepare the data again "
                "(--overwrite)"
            ) from error


def refuse_other_types(manifest: Manifest) -> None:
    """Raises `ValueError` when a number, a name or a count of the manifest is of another type."""
    counts = {name: n for name, n in asdict(manifest).items() if name.startswith("num_") or name.endswith("_row")}
    counts |= {f"dropped {name}": count for name, count in dict(manifest.dropped).items()}
    wrong = [name for name, count in counts.items() if type(count) is not int or count < 0]
    if wrong or not isinstance(manifest.recipe.verifier, str):
        raise ValueError(f"{wrong or ['verifier']} are of another type")


@dataclass(frozen=True)
class PreparedData(PathReport):
    """A prepared directory: accepted wherever its path is, and a report of its contents."""

    path: Path
    manifest: Manifest | None
    """None: another tool wrote the directory."""
    reused: bool = False
    """True: the directory existed already and nothing was written."""

    def tables(self) -> list[Table]:
        facts: dict[str, Any] = {"directory": self.path}
        if self.reused:
            facts["reused"] = "it existed already, made from the same recipe"
        if self.manifest is not None:
            facts |= self.manifest.facts()
        return [facts_table("Prepared", facts)]

    def sentence(self) -> str:
        if self.manifest is None:
            return f"{self.path} was there already"
        rows, tokens = f"{self.manifest.num_rows:,} rows", f"{self.manifest.num_tokens:,} tokens"
        return f"{rows} of {tokens}, {self.manifest.supervised_share:.0%} trained on" + self.reused * ": reused"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PreparedData:
        """Opens a directory that `prepare_data` wrote. Raises `ValueError` when it is not one."""
        path = Path(path)
        refuse_unprepared(path)
        manifest_path = path / MANIFEST_NAME
        manifest = Manifest.from_json(manifest_path.read_text(), manifest_path) if manifest_path.is_file() else None
        return cls(path, manifest)

    def dataset(self) -> datasets.Dataset:
        """Returns the rows `input_ids`, `loss_mask`, `seq_len` as torch tensors, memory-mapped."""
        return datasets.Dataset.load_from_disk(str(self.path)).with_format("torch")

    def token_freq(self) -> dict[int, int]:
        """Returns how often each token is supervised. Raises `ValueError` when the file is missing."""
        path = self.path / TOKEN_FREQ_NAME
        if not path.is_file():
            raise ValueError(f"{str(path)!r} does not exist: the data was prepared by another tool; prepare it again")
        return dict(torch.load(path, weights_only=True))


@dataclass(frozen=True)
class InspectedRow:
    """One training row as readable spans."""

    index: int
    num_tokens: int
    num_supervised: int
    spans: list[MaskSpan]

    @property
    def supervised_share(self) -> float:
        return self.num_supervised / self.num_tokens


def inspect_mask(
    data: str | Path,
    *,
    model: str | None = None,
    num_rows: int = DEFAULT_SHOWN_ROWS,
    first_row: int = 0,
    seq_length: int = DEFAULT_SEQ_LENGTH,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[InspectedRow]:
    """Shows rows of a prepared directory (its manifest names the `model`), or of raw data for the verifier `model`.

    Raises `ValueError` when the verifier is not known, no raw row gives a training row, or `first_row` is past the end.
    """
    prepared = PreparedData.open(data) if is_prepared(Path(data)) else None
    if model is None and prepared is not None and prepared.manifest is not None:
        model = prepared.manifest.recipe.verifier
    if model is None:
        raise ValueError(f"model is missing: {str(data)!r} does not say which verifier's tokenizer to use")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    rows: Iterator[TokenRow]
    if prepared is not None and "input_ids" in (dataset := prepared.dataset()).column_names:
        rows = (TokenRow(row["input_ids"].tolist(), row["loss_mask"].tolist()) for row in dataset)
    else:
        rows = raw_training_rows(data, RowTokenizer(tokenizer, TokenizeOptions(seq_length), chat_template_kwargs))
    shown, num_seen = [], 0
    for num_seen, row in enumerate(rows, start=1):
        if num_seen > first_row:
            spans = mask_spans(tokenizer, row.input_ids, row.loss_mask)
            shown.append(InspectedRow(num_seen - 1, len(row.input_ids), sum(row.loss_mask), spans))
        if len(shown) == num_rows:
            break
    if num_rows > 0 and not shown:
        raise ValueError(f"first_row={first_row} is past the end: {str(data)!r} has {num_seen} rows, counted from 0")
    return shown


def raw_training_rows(data: str | Path, row_tokenizer: RowTokenizer) -> Iterator[TokenRow]:
    """Yields the training rows of raw data, one source row at a time."""
    done = Tokenized()
    num_rows = 0
    raw_rows = load_raw_dataset(data)
    for chunk in tokenize_chunks(raw_rows, [[index] for index in range(len(raw_rows))], row_tokenizer, num_workers=1):
        done.add_counts(chunk)
        num_rows += len(chunk.rows)
        yield from chunk.rows
    if not num_rows:
        raise ValueError(explain_no_rows(done, [data]))
