"""Paths of earlier releases: each name is there, and what training computes is what they compute, by hand."""

import importlib
import math

import pytest
import torch
from speculators.models.dflash.attention import create_anchor_block_mask_mod
from speculators.models.dflash.utils import get_base_indices_for_anchored_blocks, select_anchors
from speculators.models.dspark.metrics import compute_metrics as dspark_metrics
from speculators.models.eagle3.attention import create_combined_mask_mod, extend_mask_for_draft_tokens
from speculators.models.eagle3.data import shift_batch
from speculators.models.metrics import (
    compute_accepted_length_counts,
    compute_accuracy_multi_step,
    compute_accuracy_single_step,
)
from speculators.models.mtp.data import shift_batch_mtp
from speculators.models.peagle.data import generate_cod_sample_indices
from torch.nn.attention.flex_attention import create_block_mask

from speculators.compat import NAMES_OF
from speculators.losses.metrics import normalize_counted_metrics
from speculators.losses.registry import resolve_loss_config
from speculators.models.attention import block_mask_to_dense_attention_mask
from speculators.models.dflash.metrics import compute_metrics
from speculators.nn.packed_row import unrolled_mask


@pytest.mark.parametrize("path", NAMES_OF)
def test_every_name_of_a_path_is_there(path):
    module = importlib.import_module(f"speculators.{path}")
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def sample(num_tokens):
    column = torch.arange(num_tokens)
    states = column[:, None].float()
    return {
        "input_ids": column + 10,
        "hidden_states": states,
        "verifier_last_hidden_states": states + 0.5,
        "loss_mask": column % 2,
        "lengths": torch.tensor([num_tokens]),
        "position_ids": column,
    }


def test_the_shifted_batch_pairs_a_token_with_the_state_before_it():
    shifted = {key: value.flatten().tolist() for key, value in shift_batch(sample(4)).items()}
    assert shifted == {
        "input_ids": [11, 12, 13],
        "hidden_states": [0.0, 1.0, 2.0],
        "verifier_last_hidden_states": [1.5, 2.5, 3.5],
        "loss_mask": [1, 0, 1],
        "lengths": [3],
        "position_ids": [1, 2, 3],
    }
    assert shift_batch({**sample(1), "lengths": torch.tensor([0])})["lengths"].tolist() == [0]


def test_the_batch_that_reads_last_states_alone_is_not_shifted():
    kept = {key: value.flatten().tolist() for key, value in shift_batch_mtp(sample(3)).items()}
    assert kept == {
        "input_ids": [10, 11, 12],
        "hidden_states": [0.5, 1.5, 2.5],
        "loss_mask": [0, 1, 0],
        "lengths": [3],
        "position_ids": [0, 1, 2],
    }


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_every_chain_that_supervision_allows_is_sampled_when_no_share_is_dropped():
    #   column      0  1  2  3  4  5       supervised 0, 1, 2, 4, 5; 5 - d of them per depth at most
    #   depth 1        .  .        .       at columns 1, 2, 4, 5 (0 follows none): anchors 0, 1, 3, 4
    #   depth 2           .        .       after those of depth 1 and supervised: columns 2, 5; anchors 0, 3
    mask = torch.tensor([[1, 1, 1, 0, 1, 1]])
    anchors, depths = generate_cod_sample_indices(6, mask, 4, down_sample_ratio=1.0, down_sample_ratio_min=1.0)
    elements = list(zip(depths.tolist(), anchors.tolist(), strict=True))
    assert elements == [(0, column) for column in range(6)] + [(1, 0), (1, 1), (1, 3), (1, 4), (2, 0), (2, 3)]


def test_sampled_chains_shrink_with_depth_and_have_no_gaps():
    torch.manual_seed(0)
    anchors, depths = generate_cod_sample_indices(100, torch.ones(1, 100), 4, 0.5, 0.2, max_anchors=40)
    assert torch.bincount(depths).tolist() == [100, 19, 9, 7]  # of 40 - d seeds: a half, a quarter, at least a fifth
    found = set(zip(anchors.tolist(), depths.tolist(), strict=True))
    assert all((anchor, depth - 1) in found for anchor, depth in found if depth > 1)
    assert depths.tolist() == sorted(depths.tolist()) and anchors.min() == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"filter_position_zero": False}, "filter_position_zero=False"),
        ({"seq_length": 5}, "loss_mask has 6 columns and seq_length=5"),
        ({"num_depths": 0}, "num_depths=0"),
    ],
)
def test_sampling_that_means_nothing_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        generate_cod_sample_indices(**{"seq_length": 6, "loss_mask": torch.ones(6), **wrong})


def test_anchors_are_supervised_columns_before_the_last_block():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1]])
    anchors, are_real = select_anchors(mask, 5, 3)
    assert anchors.tolist() == [1, 2, 4, 0, 0] and are_real.tolist() == [True, True, True, False, False]
    torch.manual_seed(0)
    drawn = [tuple(select_anchors(mask, 2, 3)[0].tolist()) for _ in range(50)]
    assert set(drawn) == {(1, 2), (1, 4), (2, 4)}
    assert get_base_indices_for_anchored_blocks(torch.tensor([[1, 4]]), 3).tolist() == [1, 2, 3, 4, 5, 6]


# -- masks -------------------------------------------------------------------------------------------------------------


def written_out(mask_mod, num_queries, num_keys):
    grids = torch.meshgrid(torch.arange(num_queries), torch.arange(num_keys), indexing="ij")
    return mask_mod(torch.tensor(0), torch.tensor(0), *grids).int().tolist()


def test_the_mask_of_unrolled_steps_is_causal_in_documents_then_diagonal():
    documents = torch.tensor([0, 0, 1, -1])
    mask_mod = create_combined_mask_mod(documents[None], 4)
    first = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    diagonal = torch.eye(4, dtype=torch.int64).tolist()
    assert written_out(mask_mod, 4, 8) == [a + b for a, b in zip(first, diagonal, strict=True)]
    for step in range(3):
        supervised = documents != -1  # padding is no query
        trained_on = unrolled_mask(documents, step)[supervised].int().tolist()
        assert written_out(mask_mod, 4, 4 * step + 4)[:3] == trained_on
    with pytest.raises(ValueError, match="document_ids has 4 columns and total_seq_len=5"):
        create_combined_mask_mod(documents, 5)


def test_a_mask_grows_by_the_keys_of_a_step():
    mask_mod = create_combined_mask_mod(torch.tensor([0, 0, 1]), 3)
    block_mask = create_block_mask(mask_mod, 1, 1, 3, 3, device="cpu")
    grown = extend_mask_for_draft_tokens(extend_mask_for_draft_tokens(block_mask))
    dense = block_mask_to_dense_attention_mask(grown)[0, 0].int().tolist()
    assert dense == [[1, 0, 0, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1, 0, 0, 1]]


BLOCKS = {  # two blocks of 2 slots at columns 1 and 4; documents 0 0 1 1 1
    "full": ((None, False), ["10000 1100", "10000 1100", "00110 0011", "00110 0011"]),
    "window 2, causal": ((2, False), ["10000 1000", "00000 1100", "00010 0010", "00000 0011"]),
    "window 2, not causal": ((2, True), ["10000 1100", "00000 1100", "00010 0011", "00000 0011"]),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_the_mask_of_blocks_at_anchors(case):
    (window, non_causal), expected = BLOCKS[case]
    documents, anchors = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 4])
    mask_mod, num_queries, num_keys = create_anchor_block_mask_mod(documents, 5, anchors, 2, window, non_causal)
    assert (num_queries, num_keys) == (4, 9)
    rows = [[int(seen) for seen in row.replace(" ", "")] for row in expected]
    assert written_out(mask_mod, num_queries, num_keys) == rows


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_a_step_is_counted_where_it_is_supervised_and_all_before_were_right():
    drafts, target = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0, 4]])
    mask, right_so_far = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[True, False, True, True]])
    counts = compute_accuracy_single_step(drafts, target, mask, right_so_far)
    assert [float(count) for count in counts] == [1, 3, 1, 2]
    assert right_so_far.tolist() == [[True, False, False, True]]
    assert [float(count) for count in compute_accuracy_single_step(drafts, target, None, None)] == [3, 4, 3, 4]


def test_right_drafts_are_counted_by_position():
    drafts, target = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[1, 0, 3, 4, 0, 6]])
    mask, position = torch.tensor([[0, 1, 1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    right, supervised = compute_accuracy_multi_step(drafts, target, mask, position, 4)
    assert right.tolist() == [1, 0, 2, 0] and supervised.tolist() == [1, 2, 2, 0]


def test_accepted_length_ends_at_the_first_wrong_draft():
    correct = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    total, num_blocks = compute_accepted_length_counts(correct, valid)
    assert (float(total), float(num_blocks)) == (3 + 1, 2)


LOGITS = torch.zeros(1, 6, 2)
LOGITS[0, :, 0] = math.log(3)  # every slot drafts token 0 with 3/4
TARGETS = torch.tensor([[[0, 9.0]] + [[9.0, 0]] * 2 + [[0, 9.0]] + [[9.0, 0], [0, 9.0]]])  # best: 1 0 0 | 1 0 1
MASK = torch.tensor([[1, 1, 1, 1, 1, 1]])
RIGHT, WRONG = -math.log(3 / 4), -math.log(1 / 4)


def test_loss_and_metrics_of_blocks_by_hand():
    ce = resolve_loss_config("ce")
    loss, metrics = compute_metrics(LOGITS, TARGETS, MASK, 3, gamma=2.0, loss_config=ce)
    decay = math.exp(-1 / 2)
    assert math.isclose(float(loss), (RIGHT + decay * RIGHT + RIGHT + decay * WRONG) / 4, rel_tol=1e-4)
    means = {name: round(float(value), 4) for name, value in normalize_counted_metrics(metrics).items()}
    assert means.pop("loss") == round(float(loss), 4)
    assert means == {"full_acc": 0.75, "position_1_acc": 1.0, "position_2_acc": 0.5, "eal": 2.5}
    _, metrics = compute_metrics(LOGITS, TARGETS, MASK, 3, loss_config=ce, sample_from_anchor=True)
    assert float(metrics["position_0_acc_total"]) == 2 and float(metrics["full_acc_sum"]) == 3
    with pytest.raises(ValueError, match="6 slots do not divide into blocks of block_size=4"):
        compute_metrics(LOGITS, TARGETS, MASK, 4)
    with pytest.raises(ValueError, match="dpace"):
        compute_metrics(LOGITS, TARGETS, MASK, 3, per_position_loss_weight="dpace")  # kl_div is no chance to be right


def test_acceptance_and_confidence_of_blocks_by_hand():
    target = torch.tensor([0.5, 0.5]).log().expand(1, 6, 2)  # a draw is accepted with min(3/4, 1/2) + 1/4 = 3/4
    kappa = torch.zeros(1, 6)  # promises 1/2
    config = resolve_loss_config("tv")
    loss, metrics = dspark_metrics(LOGITS, target, kappa, MASK, 3, config, gamma=1.0, confidence_head_alpha=2.0)
    means = {name: float(value) for name, value in normalize_counted_metrics(metrics).items()}
    assert means["accept_rate"] == pytest.approx(0.75)
    assert means["accept_len"] == pytest.approx(1 + 0.75 + 0.75**2 + 0.75**3)
    assert means["confidence_abs_error"] == pytest.approx(0.25) and means["confidence_pred_mean"] == 0.5
    assert means["confidence_cumprod_bias"] == pytest.approx(0.5 + 0.25 + 0.125 - 0.75 - 0.75**2 - 0.75**3)
    weight = (1 + math.exp(-1) + math.exp(-2)) / 3
    assert means["confidence_loss"] == pytest.approx(weight * math.log(2), rel=1e-4)
    assert float(loss) == pytest.approx(weight * (0.25 + 2 * math.log(2)), rel=1e-4)
    _, without = dspark_metrics(LOGITS, target, None, MASK, 3, config)
    assert not [name for name in without if name.startswith("confidence")]
