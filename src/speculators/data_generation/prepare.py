"""Prepares raw conversations: writes the directory that training reads (see `prepared.py`), whole or not at all."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators.data_generation.configs import DEFAULT_OUTPUT, DEFAULT_SEED, DEFAULT_SEQ_LENGTH, TokenizeOptions
from speculators.data_generation.datasets import quiet_datasets
from speculators.data_generation.prepared import (
    HIDDEN_STATES_NAME,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    TOKEN_FREQ_NAME,
    Manifest,
    PreparedData,
    Recipe,
    is_prepared,
)
from speculators.data_generation.preprocessing import (
    FEATURES,
    as_columns,
    count_supervised,
    explain_no_rows,
    load_tokenizer,
    refuse_other_rendering,
    save_token_freq,
    tokenize_sources,
    vocabulary_size,
)
from speculators.data_generation.records import (
    Outcome,
    Tokenized,
    contents_sha256,
    json_line,
    refuse_other_recipe,
    template_date,
    template_sha256,
    tokenizer_sha256,
)
from speculators.data_generation.tokenizing import RowTokenizer, warn_about
from speculators.utils.files import absolute_if_directory, atomic_directory
from speculators.utils.names import model_name
from speculators.utils.progress import Progress, no_progress_bars, reporting

logger = logging.getLogger(__name__)

OWN_FILES = (
    "*.arrow",
    "dataset_info.json",
    "state.json",
    TOKEN_FREQ_NAME,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    "d2t*.npy",
    "t2d*.npy",
)
"""Files that `overwrite` may delete, besides the hidden states: everything that derives from the rows."""


@no_progress_bars()
def prepare_data(
    model: str | os.PathLike[str] | PreTrainedModel,
    data: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] = DEFAULT_OUTPUT,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seq_length: int = DEFAULT_SEQ_LENGTH,
    max_samples: int | None = None,
    seed: int = DEFAULT_SEED,
    num_workers: int | None = None,
    minimum_valid_tokens: int | None = None,
    token_freq_path: str | Path | None = None,
    overwrite: bool = False,
    allow_empty_output: bool = False,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    merge_turns: bool = False,
    drop_reasoning: bool = False,
    render_endpoint: str | None = None,
    progress: bool | Progress | None = None,
) -> PreparedData:
    """Tokenises `data` (files, directories, hub names or presets) for the verifier `model` into the directory `output`.

    `model`: hub id, directory or loaded model; `tokenizer`: in place of its own. Reuses an `output` that was made from
    the same recipe. `seq_length`: longest row, in tokens. `max_samples`: most rows. `num_workers=None` chooses by the
    number of rows. `chat_template_kwargs` go to the template (`enable_thinking`, ...).
    `drop_reasoning`: rows whose reasoning the template leaves out are no error. `progress`: True draws a bar, a
    function is called with it. `render_endpoint`: vLLM server (without /v1, started with --enable-scale-out) that
    renders each conversation too, as a cross-check. Bad rows are listed in the output's quarantine.jsonl.

    Raises `ValueError` for a source that cannot be read, data without a training row (unless
    `allow_empty_output`), and an `output` that was made from another recipe
    (unless `overwrite`) or holds other files.
    """
    name = model_name(model)
    sources = [os.fspath(source) for source in ([data] if isinstance(data, str | os.PathLike) else data)]
    if not sources:
        raise ValueError("data is empty; name at least one source of conversations")
    path = Path(output)
    if tokenizer is None:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    options = TokenizeOptions(
        seq_length=seq_length,
        minimum_valid_tokens=1 if minimum_valid_tokens is None else minimum_valid_tokens,
        vocab_size=vocabulary_size(name, tokenizer, trust_remote_code=trust_remote_code),
        merge_turns=merge_turns,
    )
    recipe = make_recipe(name, tokenizer, sources, options, seed, max_samples, chat_template_kwargs, drop_reasoning)
    if is_prepared(path) and not overwrite:
        prepared = reuse(path, recipe)
        export_token_freq(prepared, token_freq_path)
        return prepared
    refuse_foreign_files(path)

    with reporting(progress) as report:
        chunks = tokenize_sources(
            sources,
            RowTokenizer(tokenizer, options, chat_template_kwargs, render_endpoint),
            seed=seed,
            max_samples=max_samples,
            num_workers=num_workers,
            progress=report,
        )
        prepared = PreparedData(path, write_prepared(path, chunks, recipe, allow_empty_output))
    export_token_freq(prepared, token_freq_path)
    return prepared


def write_prepared(path: Path, chunks: Iterable[Tokenized], recipe: Recipe, allow_empty_output: bool) -> Manifest:
    with atomic_directory(path) as directory:
        done, token_freq, lengths = write_rows(chunks, directory)
        warn_about(done)
        num_tokens, num_supervised = sum(lengths), sum(token_freq.values())
        if not lengths and not allow_empty_output:
            raise ValueError(explain_no_rows(done, recipe.sources))
        if done.num_without_reasoning and not recipe.drop_reasoning:
            raise ValueError(
                f"reasoning dropped by the template: {done.num_without_reasoning} rows, which would teach answers "
                "without the thought that the verifier writes first; use a template that renders it, or pass "
                "drop_reasoning (--drop-reasoning) to train on them as they are"
            )
        refuse_other_rendering(done)
        for unit, counts in done.units.items():
            counts.check(unit)
        write_quarantine(done.quarantine, directory / QUARANTINE_NAME)
        manifest = Manifest(
            recipe=recipe,
            library_version=importlib.metadata.version("speculators"),
            num_read=done.num_read,
            num_rows=len(lengths),
            num_tokens=num_tokens,
            num_supervised_tokens=num_supervised,
            shortest_row=min(lengths, default=0),
            longest_row=max(lengths, default=0),
            dropped=dict(done.dropped.most_common()),
            unknown_roles=dict(done.unknown_roles),
            units={unit: asdict(counts) for unit, counts in done.units.items()},
            num_without_reasoning=done.num_without_reasoning,
            num_cut_rows=done.num_cut_rows,
            num_cut_tokens=done.num_cut_tokens,
            num_rendered_elsewhere=done.num_rendered_elsewhere,
        )
        save_token_freq(token_freq, directory / TOKEN_FREQ_NAME)
        (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def write_rows(chunks: Iterable[Tokenized], directory: Path) -> tuple[Tokenized, Counter[int], list[int]]:
    """Streams the rows to disk as they come, then saves them as a dataset.

    Returns the counts, the frequency of each supervised token, and the length of each row.
    """
    done, token_freq, lengths = Tokenized(), Counter[int](), list[int]()
    stream_path = directory / "stream" / "rows.arrow"  # a dataset cannot be saved into the directory it is read from
    stream_path.parent.mkdir()
    schema = FEATURES.arrow_schema
    with pa.OSFile(str(stream_path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for chunk in chunks:
            done.add_counts(chunk)
            count_supervised(token_freq, chunk.rows)
            lengths += [len(row.input_ids) for row in chunk.rows]
            if chunk.rows:
                writer.write_table(pa.Table.from_pydict(as_columns(chunk.rows), schema=schema))
    dataset = datasets.Dataset.from_file(str(stream_path)).with_format("torch")
    with quiet_datasets():
        dataset.save_to_disk(str(directory), num_shards=None if len(dataset) else 1)
    shutil.rmtree(stream_path.parent)
    return done, token_freq, lengths


def write_quarantine(quarantine: Sequence[Outcome], path: Path) -> None:
    """Writes one line per bad row, in the order of the sources; no file without any."""
    if quarantine:
        logger.warning("%d bad rows are in %s; the first: %s", len(quarantine), path.name, quarantine[0])
        lines = (bad.record() for bad in sorted(quarantine, key=lambda bad: bad.index))
        path.write_text("".join(map(json_line, lines)), encoding="utf-8")


def export_token_freq(prepared: PreparedData, token_freq_path: str | Path | None) -> None:
    """Writes the copy of the token frequencies that a user asked for outside the prepared directory."""
    if token_freq_path is not None and Path(token_freq_path) != prepared.path / TOKEN_FREQ_NAME:
        save_token_freq(Counter(prepared.token_freq()), Path(token_freq_path))


def make_recipe(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str | Path],
    options: TokenizeOptions,
    seed: int,
    max_samples: int | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    drop_reasoning: bool,
) -> Recipe:
    return Recipe(
        verifier=absolute_if_directory(model),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=template_sha256(tokenizer),
        chat_template_kwargs=dict(chat_template_kwargs or {}),
        template_date=template_date(tokenizer, chat_template_kwargs),
        sources=[str(source) for source in sources],
        sources_sha256=[contents_sha256(Path(source)) for source in sources],
        seq_length=options.seq_length,
        max_samples=max_samples,
        seed=seed,
        minimum_valid_tokens=options.minimum_valid_tokens,
        merge_turns=options.merge_turns,
        drop_reasoning=drop_reasoning,
        vocab_size=options.vocab_size or len(tokenizer),
    )


def reuse(path: Path, recipe: Recipe) -> PreparedData:
    """Opens the existing directory. Raises `ValueError`, naming the differences, if it has another recipe."""
    found = PreparedData.open(path)
    if found.manifest is None:
        logger.warning("%s has no %s: reusing it unchecked", path, MANIFEST_NAME)
        return replace(found, reused=True)
    ways_out = "pass overwrite (--overwrite) to replace it, or choose another output"
    refuse_other_recipe(asdict(found.manifest.recipe), asdict(recipe), repr(str(path)), ways_out)
    return replace(found, reused=True)


def refuse_foreign_files(path: Path) -> None:
    """Raises `ValueError` if the directory, which is replaced as a whole, holds files that we did not write."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {str(path)!r} is a file; name a directory")
    foreign = [entry.name for entry in sorted(path.glob("*")) if not is_own(entry)]
    if foreign:
        raise ValueError(
            f"output {str(path)!r} holds files that prepare-data did not write ({', '.join(foreign[:5])}) and would "
            "delete; choose another output"
        )


def is_own(entry: Path) -> bool:
    if entry.is_dir():
        return entry.name == HIDDEN_STATES_NAME and all(file.name.startswith("hs_") for file in entry.iterdir())
    return any(entry.match(pattern) for pattern in OWN_FILES)
