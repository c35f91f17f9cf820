"""Look at loss masks: the text of rows as spans that are supervised or context. Printing them is the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from speculators.data_generation.conversations import TokenRow
from speculators.data_generation.datasets import load_raw_dataset
from speculators.data_generation.masks import MaskSpan, mask_spans
from speculators.data_generation.prepared import PreparedData, is_prepared
from speculators.data_generation.preprocessing import explain_no_rows, load_tokenizer
from speculators.data_generation.tokenizing import RowTokenizer, Tokenized, TokenizeOptions


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
    num_rows: int = 3,
    first_row: int = 0,
    seq_length: int = 8192,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[InspectedRow]:
    """Rows of a prepared directory (`model` is known from its manifest), or of raw data for the verifier `model`."""
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
    return [
        InspectedRow(index, len(row.input_ids), sum(row.loss_mask), mask_spans(tokenizer, row.input_ids, row.loss_mask))
        for index, row in islice(enumerate(rows), first_row, first_row + num_rows)
    ]


def raw_training_rows(data: str | Path, row_tokenizer: RowTokenizer) -> Iterator[TokenRow]:
    done = Tokenized()
    num_rows = 0
    for raw_row in load_raw_dataset(data):
        chunk = row_tokenizer.chunk([raw_row])
        done.add_counts(chunk)
        num_rows += len(chunk.rows)
        yield from chunk.rows
    if not num_rows:
        raise ValueError(explain_no_rows(done, [data]))
