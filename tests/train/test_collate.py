"""Packed rows, worked by hand."""

from __future__ import annotations

import logging

import pytest
import torch

from speculators.data_generation import MissingStatesError, PreparedData, ShardedStore
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.train.data import ArrowDataset, CollateFn


def sample(ids: list[int], mask: list[int], width: int = 2) -> dict[str, torch.Tensor]:
    ids_S = torch.tensor(ids)
    return {
        "hidden_states": ids_S[:, None].float().expand(-1, 2 * width).clone(),
        "verifier_last_hidden_states": -ids_S[:, None].float().expand(-1, width).clone(),
        "input_ids": ids_S,
        "loss_mask": torch.tensor(mask),
        "lengths": torch.tensor([len(ids)]),
        "position_ids": torch.arange(len(ids)),
    }


def collate(max_len: int, **options) -> CollateFn:
    return CollateFn(max_len, hidden_size=2, num_target_layers=2, dtype=torch.float32, **options)


def test_two_documents_and_padding():
    row = collate(7)([sample([5, 6, 7], [0, 1, 1]), sample([8, 9], [0, 1])])
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert row["loss_mask"].tolist() == [[0, 1, 1, 0, 1, 0, 0]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert row["document_ids"].tolist() == [[0, 0, 0, 1, 1, -1, -1]]
    assert row["hidden_states"][0, :, 0].tolist() == [5, 6, 7, 8, 9, 0, 0]
    assert row["hidden_states"].shape == (1, 7, 4)
    assert row["verifier_last_hidden_states"][0, :, 0].tolist() == [-5, -6, -7, -8, -9, 0, 0]
    assert "lengths" not in row


def test_the_last_document_is_cut_and_later_ones_are_dropped():
    row = collate(4)([sample([5, 6, 7], [1, 1, 1]), sample([8, 9], [1, 1]), sample([3], [1])])
    assert row["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert row["document_ids"].tolist() == [[0, 0, 0, 1]]


def test_the_hook_runs_on_each_sample_before_packing():
    def shift(one):  # EAGLE's alignment: token i+1 meets state i
        return {
            "hidden_states": one["hidden_states"][:-1],
            "verifier_last_hidden_states": one["verifier_last_hidden_states"][1:],
            "input_ids": one["input_ids"][1:],
            "loss_mask": one["loss_mask"][1:],
            "position_ids": one["position_ids"][1:],
            "lengths": one["lengths"] - 1,
        }

    row = collate(5, preprocess=shift)([sample([5, 6, 7], [0, 1, 1]), sample([8, 9], [0, 1])])
    assert row["input_ids"].tolist() == [[6, 7, 9, 0, 0]]
    assert row["hidden_states"][0, :, 0].tolist() == [5, 6, 8, 0, 0]
    assert row["verifier_last_hidden_states"][0, :, 0].tolist() == [-6, -7, -9, 0, 0]
    assert row["position_ids"].tolist() == [[1, 2, 1, 0, 0]]
    assert row["document_ids"].tolist() == [[0, 0, 1, -1, -1]]


def test_states_take_the_asked_type_and_ids_stay_integers():
    row = CollateFn(4, 2, 2, dtype=torch.bfloat16)([sample([5, 6], [1, 1])])
    assert row["hidden_states"].dtype == row["verifier_last_hidden_states"].dtype == torch.bfloat16
    assert row["input_ids"].dtype == row["document_ids"].dtype == torch.int64


def test_missing_samples_are_counted_and_a_row_of_them_is_padding():
    row = collate(4)([None, sample([5], [1]), None])
    assert row["error_records"] == 2
    assert row["input_ids"].tolist() == [[5, 0, 0, 0]]
    empty = collate(4)([None])
    assert empty["document_ids"].tolist() == [[-1] * 4]
    assert empty["hidden_states"].shape == (1, 4, 4)


@pytest.fixture
def partly_stored(data_path, tmp_path):
    """States of rows 0 and 2 of the prepared data."""
    rows = [torch.as_tensor(ids) for ids in PreparedData.open(data_path).dataset()["input_ids"]]
    store = ShardedStore(tmp_path, CaptureSpec((1,), last_hidden=True), rows)
    for row in (0, 2):
        states = torch.full((len(rows[row]), 4), float(row))
        store.write_row(row, VerifierStates(rows[row], states, states))
    yield store
    store.close()


def test_a_row_without_stored_states_is_skipped_said_refused_or_left_to_the_source(data_path, partly_stored, caplog):
    def read(on_missing):
        return ArrowDataset(64, data_path, partly_stored, on_missing=on_missing).read([0, 1, 2])

    with caplog.at_level(logging.WARNING, logger="speculators.train.data"):
        first, missing, third = read("skip")
        assert missing is None and not caplog.text
        assert float(first["hidden_states"].sum()) == 0 and float(third["hidden_states"][0, 0]) == 2
        batch = CollateFn(64, hidden_size=4, num_target_layers=1)([first, missing, third])
        assert int(batch["error_records"]) == 1 and batch["document_ids"].max() == 1
        assert [sample is None for sample in read("warn")] == [False, True, False]
        assert caplog.text.count("has no states of row 1") == 1
    with pytest.raises(RuntimeError, match="has no states of row 1"):
        read("raise")
    with pytest.raises(MissingStatesError, match="let a CachedSource compute what is missing"):
        read("generate")
    with pytest.raises(ValueError, match="on_missing='never' is none of generate, skip, warn, raise"):
        read("never")
