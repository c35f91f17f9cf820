"""What preparing cuts is counted and said; tokens without an embedding and rendered text get a way out."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from speculators.assets import tiny_verifier_path
from speculators.data_generation import prepare_data
from speculators.data_generation.conversations import TokenRow
from speculators.data_generation.preprocessing import load_tokenizer

VERIFIER = str(tiny_verifier_path())


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_counts_the_supervised_tokens_that_it_loses():
    row = TokenRow([1, 2, 3, 4, 5], [0, 1, 1, 0, 1], 2)
    assert row.clipped(3) == TokenRow([1, 2, 3], [0, 1, 1], 2, num_cut=1)
    assert row.clipped(5) == row and row.clipped(3).clipped(2).num_cut == 2


def test_tokens_beyond_seq_length_are_counted_and_said(tmp_path, caplog):
    rows = [{"input_ids": list(range(5, 5 + n)), "loss_mask": [0, 0] + [1] * (n - 2)} for n in (6, 9, 12)]
    manifest = prepare_data(
        VERIFIER, rows_file(tmp_path / "rows.jsonl", *rows), output=tmp_path / "o", seq_length=8
    ).manifest
    assert (manifest.num_cut_rows, manifest.num_cut_tokens) == (2, 1 + 4)
    assert "2 rows are cut to the longest row (seq_length) and lose 5 trained tokens" in caplog.text
    assert manifest.facts()["cut (--seq-length)"] == "5 trained tokens of 2 rows"


def test_a_token_without_an_embedding_is_refused_with_numbers(tmp_path):
    tokenizer = load_tokenizer(VERIFIER)
    vocab_size = AutoConfig.from_pretrained(VERIFIER).vocab_size
    added = [f"<extra_{number}>" for number in range(vocab_size - len(tokenizer) + 1)]
    tokenizer.add_tokens(added)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"well {added[-1]}"}]
    data = rows_file(tmp_path / "rows.jsonl", {"conversations": turns})
    message = (
        rf"writes token {vocab_size} \('<extra_\d+>'\) and has {vocab_size + 1} tokens, but the verifier's embedding "
        rf"has {vocab_size} rows: use the tokenizer that belongs to this verifier"
    )
    with pytest.raises(ValueError, match=message):
        prepare_data(VERIFIER, data, output=tmp_path / "o", tokenizer=tokenizer)


def test_rows_of_rendered_text_say_how_to_train_on_them(tmp_path):
    data = rows_file(tmp_path / "rows.jsonl", {"text": "<user> hi <assistant> hello"})
    with pytest.raises(
        ValueError, match=r"where the verifier's answer begins\. Tokenise it and give input_ids with a loss_mask"
    ):
        prepare_data(VERIFIER, data, output=tmp_path / "o")
