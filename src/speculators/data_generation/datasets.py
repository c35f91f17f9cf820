"""Opens sources of raw rows (JSON, JSONL, parquet, dataset directories, the hub, presets) as `RawRows`.

Rows are read on access (JSONL by byte offset, parquet and Arrow memory-mapped), so a source may be larger than
memory. We read JSON ourselves, not with Arrow: tool calls with differing keys do not fit one Arrow schema.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from speculators.data_generation.configs import DATASET_CONFIGS, FORMS, DatasetConfig, refuse_missing_source
from speculators.data_generation.conversations import BrokenLine

Rows: TypeAlias = "Sequence[Any] | datasets.Dataset"
Place: TypeAlias = dict[str, "str | int"]
FILE_KINDS = (".json", ".jsonl", ".parquet")


class JsonLines(Sequence[Any]):
    """The rows of a JSONL file, parsed on access. A line that is not JSON is returned as a `BrokenLine`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets, self.numbers = line_offsets(path)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            return BrokenLine(str(error))

    def place(self, index: int) -> Place:
        return {"file": str(self.path), "line": self.numbers[index]}


def line_offsets(path: Path) -> tuple[array[int], array[int]]:
    """Returns where each line that is not blank begins, and its number from 1."""
    offsets, numbers, position = array("q"), array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(position)
                numbers.append(number)
            position += len(line)
    return offsets, numbers


class Chain(Sequence[Any]):
    """Concatenates several sources of rows."""

    def __init__(self, parts: Sequence[RawRows]) -> None:
        self.parts = [part for part in parts if len(part)]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: Any) -> Any:
        part, index = self.part_of(index)
        return part[index]

    def place(self, index: int) -> Place:
        part, index = self.part_of(index)
        return part.place(index)

    def part_of(self, index: int) -> tuple[RawRows, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


@dataclass(frozen=True)
class RawRows(Sequence[Any]):
    """Rows of one source, by index; `config` says how they become conversations when the source is a preset."""

    name: str
    rows: Rows
    """Anything with `len` and integer `[]`: our sequences above, or a `datasets.Dataset`."""
    config: DatasetConfig | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        if self.config is None or not isinstance(row, Mapping):
            return row
        if self.config.filter_fn is not None and not self.config.filter_fn(dict(row)):
            return None
        return self.config.normalize_fn(dict(row)) if self.config.normalize_fn is not None else row

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def place(self, index: int) -> Place:
        """Says where a row stands, for people: file and line, or source and row from 0."""
        if isinstance(self.rows, JsonLines | Chain):
            return self.rows.place(index)
        return {"file": self.name, "row": index}

    def conversation_ids(self) -> Iterable[Any]:
        """Returns one id per row: its `primary_id`, which regenerated turns of a conversation share, else its index."""
        if len(self) == 0 or not isinstance(first := self[0], Mapping) or "primary_id" not in first:
            return range(len(self))
        if isinstance(self.rows, datasets.Dataset):
            return self.rows["primary_id"]  # reads one column, not all tokens
        found = (row.get("primary_id", index) if isinstance(row, Mapping) else index for index, row in enumerate(self))
        return (identity if isinstance(identity, str | int) else str(identity) for identity in found)


def load_raw_dataset(source: str | os.PathLike[str] | Sequence[Mapping[str, Any]]) -> RawRows:
    """Opens a source in one of the `FORMS`, or rows. Raises `ValueError` when it has another form or cannot be read."""
    if not isinstance(source, str | os.PathLike):
        return RawRows("rows", source)
    text = os.fspath(source)
    if text.startswith("hf://datasets/"):
        return RawRows(text, load_hub_file(text))
    if text.startswith("hf:"):
        return RawRows(text, load_hub_dataset(DatasetConfig(name=text, **parse_hub_name(text))))
    path = Path(source).expanduser()
    if path.is_dir():
        return RawRows(text, load_directory(path))
    if path.is_file():
        return RawRows(text, load_file(path))
    if text in DATASET_CONFIGS:
        return RawRows(text, load_hub_dataset(DATASET_CONFIGS[text]), DATASET_CONFIGS[text])
    refuse_missing_source(text)
    raise ValueError(f"data {text!r} is neither a file nor a directory; give {FORMS}")


def load_file(path: Path) -> Rows:
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix == ".json":
        return load_json(path)
    if path.suffix == ".parquet":
        return open_with_datasets(str(path), lambda: datasets.Dataset.from_parquet(str(path)))
    raise ValueError(f"data {str(path)!r} ends in {path.suffix!r}; files end in one of {', '.join(FILE_KINDS)}")


def load_json(path: Path) -> Sequence[Any]:
    """Reads a JSON list of rows, or one object per line, which is common under the name .json too."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        lines = JsonLines(path)
        if len(lines) > 1 and isinstance(lines[0], Mapping):
            return lines
        raise ValueError(f"data {str(path)!r} is not valid JSON: {error}") from None
    if isinstance(rows, Mapping) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if isinstance(rows, Mapping):
        rows = [rows]
    if not isinstance(rows, list):
        raise ValueError(f"data {str(path)!r} holds a JSON {type(rows).__name__}; a list of rows is expected")
    return rows


def load_directory(path: Path) -> Rows:
    if (path / "state.json").is_file():
        return open_with_datasets(str(path), lambda: datasets.Dataset.load_from_disk(str(path)).with_format(None))
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if "train" not in splits:
            raise ValueError(f"data {str(path)!r} has the splits {splits} but no 'train'; name one as {path}/<split>")
        return load_directory(path / "train")
    files = sorted(file for file in path.rglob("*") if file.suffix in FILE_KINDS and file.is_file())
    if not files:
        kinds = ", ".join(FILE_KINDS)
        raise ValueError(f"data directory {str(path)!r} has no {kinds} file and is not a saved dataset")
    return Chain([RawRows(str(file), load_file(file)) for file in files])


def parse_hub_name(text: str) -> dict[str, Any]:
    """Parses hf:<id>, hf:<id>:<split> or hf:<id>:<subset>:<split>. Raises `ValueError` for another form."""
    parts = text.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"data {text!r} is not of the form hf:<id>[:<subset>][:<split>]")
    subset = parts[1] if len(parts) == 3 and parts[1] else None
    return {"hf_path": parts[0], "subset": subset, "split": parts[-1] if len(parts) > 1 else "train"}


def load_hub_dataset(config: DatasetConfig) -> datasets.Dataset:
    return open_with_datasets(
        config.hf_path, lambda: datasets.load_dataset(config.hf_path, config.subset, split=config.split)
    )


def load_hub_file(url: str) -> datasets.Dataset:
    kind = "parquet" if url.endswith(".parquet") else "json"
    if not url.endswith(FILE_KINDS):
        raise ValueError(f"data {url!r} must name a file that ends in one of {', '.join(FILE_KINDS)}")
    return open_with_datasets(url, lambda: datasets.load_dataset(kind, data_files=url, split="train"))


def open_with_datasets(name: str, load: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """Runs one call of the `datasets` library and turns its many error types into one that names the source."""
    try:
        with quiet_datasets():
            return load()
    except Exception as error:  # datasets raises its own, pyarrow's, fsspec's and the hub's errors
        raise ValueError(f"data {name!r} cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Progress is the caller's to show; the datasets library would print bars of its own."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
