"""A draft vocabulary worked by hand: verifier ids 0..5, of which 1, 2 and 5 are kept."""

import torch

from speculators.nn.draft_tokens import (
    draft_to_verifier_ids,
    offsets_of,
    scatter_to_verifier,
    select_rows,
    verifier_ids,
)

D2T = torch.tensor([1, 1, 3])
T2D = torch.tensor([False, True, True, False, False, True])


def test_offsets_lead_from_draft_to_verifier_ids():
    assert draft_to_verifier_ids(torch.tensor([[2, 0], [1, 1]]), D2T).tolist() == [[5, 1], [2, 2]]
    assert verifier_ids(D2T).tolist() == [1, 2, 5]
    assert torch.equal(offsets_of(torch.tensor([1, 2, 5])), D2T)


def test_probabilities_outside_the_draft_vocabulary_are_zero():
    scattered = scatter_to_verifier(torch.tensor([[0.5, 0.2, 0.3]]), D2T, 6)
    assert torch.equal(scattered, torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.0, 0.3]]))


def test_head_rows_are_in_draft_order():
    assert select_rows(torch.arange(6)[:, None], T2D).flatten().tolist() == [1, 2, 5]


def test_without_a_draft_vocabulary_ids_are_equal():
    ids = torch.tensor([3, 4])
    assert draft_to_verifier_ids(ids, None) is ids
    assert select_rows(ids, None) is ids and scatter_to_verifier(ids, None, 9) is ids
