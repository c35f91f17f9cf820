"""Turns sources of raw rows into tokenised training rows: their order, the limit, and the in-memory functions.

Conversations are shuffled, and the rows of one stay together: a split at any row divides at most one conversation.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from speculators.data_generation.configs import DEFAULT_SEED, TokenizeOptions, default_num_workers
from speculators.data_generation.conversations import BrokenTokenRow, TokenRow
from speculators.data_generation.datasets import Chain, RawRows, load_raw_dataset
from speculators.data_generation.records import Tokenized
from speculators.data_generation.tokenizing import RowTokenizer, tokenize_chunks, warn_about
from speculators.utils.files import atomic_write
from speculators.utils.progress import Progress
from speculators.utils.quantized import tokenizer_source
from speculators.verifier.config import get_verifier_config

logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        # 32 and 8 bits on disk; the torch format gives int64 for both
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("int8")),
        "seq_len": datasets.Value("int32"),
    }
)


def as_columns(rows: Sequence[TokenRow]) -> dict[str, list[Any]]:
    return {
        "input_ids": [row.input_ids for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
        "seq_len": [len(row.input_ids) for row in rows],
    }


def count_supervised(token_freq: Counter[int], rows: Iterable[TokenRow]) -> None:
    for row in rows:
        token_freq.update(token for token, bit in zip(row.input_ids, row.loss_mask, strict=True) if bit)


def tokenize_sources(
    sources: Sequence[str | Path],
    row_tokenizer: RowTokenizer,
    *,
    seed: int = DEFAULT_SEED,
    max_samples: int | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Tokenized]:
    """Yields training rows of all sources chunk by chunk, conversations in a seeded order, at most `max_samples` rows.

    Raises `ValueError` for a source that cannot be read and for `max_samples < 1`.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples={max_samples}; keep at least 1 row, or None for all")
    raw_rows = Chain([load_raw_dataset(source) for source in sources])
    conversations = shuffled(conversations_of(raw_rows.parts), seed)
    num_read = 0
    for chunk in tokenize_chunks(raw_rows, conversations, row_tokenizer, num_workers, max_samples):
        chunk.quarantine = [replace(bad, place=raw_rows.place(bad.index)) for bad in chunk.quarantine]
        num_read += chunk.num_read
        if progress is not None:
            progress("tokenise", num_read, len(raw_rows))
        yield chunk


def conversations_of(sources: Sequence[RawRows]) -> list[list[int]]:
    """Groups rows by conversation, as indices into the concatenated sources.

    A conversation is one row, or the rows that share a `primary_id`: regenerated turns, each with those before it.
    """
    conversations: list[list[int]] = []
    num_before = 0
    for source in sources:
        rows_of: dict[Any, list[int]] = {}
        for index, conversation_id in enumerate(source.conversation_ids()):
            rows_of.setdefault(conversation_id, []).append(num_before + index)
        conversations += rows_of.values()
        num_before += len(source)
    return conversations


def shuffled(conversations: Sequence[Sequence[int]], seed: int) -> list[Sequence[int]]:
    return [conversations[i] for i in np.random.default_rng(seed).permutation(len(conversations))]


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a directory or hub id. Raises `ValueError` when it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(**tokenizer_source(model), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer for model {model!r}: it is neither a local model directory nor available from the hub "
            f"({str(error).splitlines()[0]})"
        ) from error


def vocabulary_size(model: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> int:
    """Returns the rows of the verifier's embedding, or the size of a tokenizer without a model config beside it."""
    try:
        return int(get_verifier_config(model, trust_remote_code).vocab_size)
    except ValueError:
        return len(tokenizer)


def explain_no_rows(done: Tokenized, sources: Sequence[str | Path]) -> str:
    names = ", ".join(str(source) for source in sources)
    if done.num_read == 0:
        return f"no rows in {names}"
    reasons = "; ".join(f"{count} x {reason}" for reason, count in done.dropped.most_common(5))
    first = f" (the first: {done.quarantine[0]})" if done.quarantine else ""
    return f"none of the {done.num_read} rows of {names} gave a training row: {reasons}{first}"


def refuse_broken_token_rows(done: Tokenized) -> None:
    """Raises `ValueError` for pre-tokenised rows that whoever made them broke: here is no file to set them aside in."""
    broken = [bad for bad in done.quarantine if isinstance(bad.problem, BrokenTokenRow)]
    if broken:
        raise ValueError(f"{len(broken)} broken pre-tokenised rows; the first: {broken[0]}")


def build_speculator_training_dataset(
    dataset: datasets.Dataset | Sequence[Mapping[str, Any]],
    processor: PreTrainedTokenizerBase,
    max_length: int = 2048,
    num_proc: int = 8,
    *,
    render_endpoint: str | None = None,
    minimum_valid_tokens: int | None = None,
) -> datasets.Dataset:
    """Turns rows (a `Dataset` or any sequence) into a torch-formatted `Dataset` of `input_ids`, `loss_mask`, `seq_len`.

    `processor` is the verifier's tokenizer; its chat template renders the conversations. `max_length` in tokens. Raises
    `ValueError` for a tokenizer without a chat template and for a `render_endpoint` (a vLLM server, without /v1) that
    renders conversations otherwise.
    """
    options = TokenizeOptions(max_length, 1 if minimum_valid_tokens is None else minimum_valid_tokens)
    num_workers = min(num_proc, default_num_workers(len(dataset)))
    row_tokenizer = RowTokenizer(processor, options, render_endpoint=render_endpoint)
    done, rows = Tokenized(), [[index] for index in range(len(dataset))]
    for chunk in tokenize_chunks(dataset, rows, row_tokenizer, num_workers):
        done.add(chunk)
    refuse_broken_token_rows(done)
    refuse_other_rendering(done)
    warn_about(done)
    return to_dataset(done.rows)


def load_and_preprocess_dataset(
    target_model_path: str,
    train_data_paths: Sequence[str],
    *,
    seq_length: int,
    build_dataset_num_proc: int = 8,
    seed: int = DEFAULT_SEED,
    max_samples: int | None = None,
    token_freq_path: str | Path,
    render_endpoint: str | None = None,
    minimum_valid_tokens: int | None = None,
    allow_empty_output: bool = False,
    trust_remote_code: bool = False,
    skip_token_freq: bool = True,
) -> tuple[datasets.Dataset, PreTrainedTokenizerBase]:
    """Makes the rows that `prepare_data` writes, in memory; returns (dataset, tokenizer).

    Writes only the token frequencies, unless `skip_token_freq`. Raises as `prepare_data` does.
    """
    tokenizer = load_tokenizer(target_model_path, trust_remote_code=trust_remote_code)
    options = TokenizeOptions(
        seq_length,
        1 if minimum_valid_tokens is None else minimum_valid_tokens,
        vocabulary_size(target_model_path, tokenizer, trust_remote_code=trust_remote_code),
    )
    done = Tokenized()
    for chunk in tokenize_sources(
        train_data_paths,
        RowTokenizer(tokenizer, options, render_endpoint=render_endpoint),
        seed=seed,
        max_samples=max_samples,
        num_workers=1 if build_dataset_num_proc <= 1 else None,
    ):
        done.add(chunk)
    refuse_broken_token_rows(done)
    refuse_other_rendering(done)
    warn_about(done)
    if not done.rows and not allow_empty_output:
        raise ValueError(explain_no_rows(done, train_data_paths))
    if not skip_token_freq:
        token_freq: Counter[int] = Counter()
        count_supervised(token_freq, done.rows)
        save_token_freq(token_freq, Path(token_freq_path))
    return to_dataset(done.rows), tokenizer


def to_dataset(rows: Sequence[TokenRow]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(as_columns(rows), features=FEATURES).with_format("torch")


def save_token_freq(token_freq: Counter[int], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        torch.save(dict(sorted(token_freq.items())), file)


def refuse_other_rendering(done: Tokenized) -> None:
    """Raises `ValueError` when the server that would serve the verifier renders conversations otherwise."""
    if done.rendered_otherwise:
        raise ValueError(
            f"the render_endpoint renders {len(done.rendered_otherwise)} of {done.num_rendered_elsewhere} conversations"
            f" otherwise than the rows; the first: {done.rendered_otherwise[0]}. Give both the same tokenizer, template"
            " and --chat-template-kwargs (or leave render_endpoint out)"
        )
