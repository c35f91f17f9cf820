"""What training forwards are given, by hand: padding cut, defaults filled in, rows joined."""

import pytest
import torch

from speculators.nn.packed_row import join_rows, pack_row, padded_row

NOTHING = {"aux": None, "last_hidden": None, "document_ids": None, "loss_mask": None, "position_ids": None}


def states(num_rows, num_columns, width):
    """Every number says where it stands."""
    return torch.arange(num_rows * num_columns * width).view(num_rows, num_columns, width).float()


def test_the_padding_at_the_end_is_cut_and_is_never_supervised():
    batch = pack_row(
        torch.tensor([[5, 6, 7, 8, 9]]),
        aux=states(1, 5, 2),
        last_hidden=states(1, 5, 3),
        document_ids=torch.tensor([[0, 0, 1, -1, -1]]),
        loss_mask=torch.tensor([[0, 1, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 1, 0, 0, 0]]),
        first_position=0,
    )
    assert batch.token_ids_T.tolist() == [5, 6, 7] and batch.row_length == 5
    assert batch.document_ids_T.tolist() == [0, 0, 1] and batch.position_ids_T.tolist() == [0, 1, 0]
    assert batch.supervised_T.tolist() == [False, True, True]
    assert batch.aux_TD.tolist() == [[0, 1], [2, 3], [4, 5]] and batch.last_hidden_TH[2].tolist() == [6, 7, 8]


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_not_given_is_one_document_all_supervised(first):
    batch = pack_row(torch.tensor([[5, 6, 7]]), **NOTHING, first_position=first)
    assert batch.document_ids_T.tolist() == [0, 0, 0] and batch.supervised_T.all()
    assert batch.position_ids_T.tolist() == [first, first + 1, first + 2]
    assert batch.aux_TD is None and batch.last_hidden_TH is None


def test_of_padding_alone_one_unsupervised_column_is_left():
    padding = {**NOTHING, "document_ids": torch.tensor([[-1, -1]])}
    batch = pack_row(torch.tensor([[0, 0]]), **padding, first_position=0)
    assert batch.document_ids_T.tolist() == [-1] and batch.supervised_T.tolist() == [False]


def test_rows_are_joined_end_to_end_with_documents_of_their_own():
    """The padding of the first row lies inside; it is nobody's document."""
    documents = torch.tensor([[0, 1, -1], [0, 0, -1]])
    batch = join_rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), **{**NOTHING, "document_ids": documents}, first_position=0)
    assert batch.token_ids_T.tolist() == [1, 2, 3, 4, 5] and batch.row_length == 3
    assert batch.document_ids_T.tolist() == [0, 1, -1, 2, 2]
    assert batch.supervised_T.tolist() == [True, True, False, True, True]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1]


def test_several_rows_are_refused_where_one_is_expected():
    with pytest.raises(ValueError, match="batch size 2; documents are packed into one row"):
        pack_row(torch.zeros(2, 3, dtype=torch.int64), **NOTHING, first_position=0)


def test_draft_ids_come_back_in_the_shape_of_the_row():
    assert padded_row(torch.tensor([7, -1, 8]), 5).tolist() == [[7, -1, 8, -1, -1]]
