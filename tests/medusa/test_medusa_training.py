"""Loss, gradients and metrics against loops over the formulas; what counts; that it learns."""

import pytest
import torch
from drafter_toys import HIDDEN, train_on_counting
from last_state_toys import (
    check_loss_and_gradients,
    check_that_bfloat16_stays_close,
    check_that_documents_add_up,
    check_that_nothing_to_learn_has_loss_zero,
    packed_batch,
)
from medusa_toys import NaiveMedusa

from speculators import SpeculatorModel
from speculators.models import MedusaDraftModel


@pytest.mark.parametrize("loss_fn", ["ce", "kl_div"])
def test_loss_gradients_and_metrics_equal_loops_over_the_formulas(make_drafter, loss_fn):
    model, batch = make_drafter(), packed_batch([9, 2, 5, 11], seed=1, padding=4)
    correct, metrics = check_loss_and_gradients(model, NaiveMedusa(model), batch, 0.8, loss_fn)
    for k in range(3):
        counted = [t for head, t in correct if head == k]
        chain = [t for t in counted if all(correct.get((j, t), False) for j in range(k + 1))]
        before = [t for t in counted if all(correct.get((j, t), False) for j in range(k))]
        before = [t for t in before if all((j, t) in correct for j in range(k))]
        assert metrics[f"full_acc_{k}_sum"] == len(chain) and metrics[f"full_acc_{k}_total"] == len(counted)
        assert metrics[f"cond_acc_{k}_total"] == len(before)


def test_packed_documents_equal_separate_documents(make_drafter):
    check_that_documents_add_up(make_drafter())


def test_rows_of_a_batch_do_not_see_each_other(make_drafter):
    model = make_drafter()
    rows = [packed_batch([7, 5], seed=s) for s in (1, 2)]
    both = model(**{key: torch.cat([row[key] for row in rows]) for key in rows[0]})[2]
    for k in range(3):
        total = sum(model(**row)[2][f"loss_{k}_sum"] for row in rows)
        torch.testing.assert_close(both[f"loss_{k}_sum"], total)


def test_rows_too_short_or_unsupervised_have_loss_zero_and_gradients(make_drafter):
    check_that_nothing_to_learn_has_loss_zero(make_drafter)
    empty = {**packed_batch([], padding=6), "hidden_states": torch.zeros(1, 6, 0)}  # no sample could be had
    assert make_drafter()(**empty)[1] == 0


def test_a_new_drafter_is_the_verifiers_head_k_times(make_drafter, verifier):
    model, batch = make_drafter(random=False), packed_batch([12])
    states = batch["hidden_states"][:, :9]
    for logits in model(**batch)[0]:
        torch.testing.assert_close(logits, verifier.lm_head(verifier.model.norm(states)))


def test_bf16_autocast_stays_close_to_fp32(make_drafter):
    check_that_bfloat16_stays_close(make_drafter(random=False))


def test_align_gives_the_last_states_and_shifts_nothing():
    column = torch.arange(4)
    sample = {
        "input_ids": column,
        "hidden_states": torch.zeros(4, 0),
        "loss_mask": column,
        "lengths": torch.tensor([4]),
        "verifier_last_hidden_states": torch.randn(4, HIDDEN),
        "position_ids": column,
    }
    aligned = MedusaDraftModel.align(sample)
    assert aligned["hidden_states"] is sample["verifier_last_hidden_states"] and aligned["input_ids"] is column
    assert set(aligned) == set(sample) - {"verifier_last_hidden_states"}


@pytest.mark.parametrize("loss_fn", ["ce", "kl_div"])
def test_the_command_line_trains_it(tmp_path, verifier_path, loss_fn):
    result, remaining = train_on_counting(tmp_path, "medusa", verifier_path, num_heads=2, loss_fn=loss_fn)
    assert remaining < 0.85
    assert result.acceptance_length is not None and 1.0 < result.acceptance_length <= 3.0
    assert SpeculatorModel.from_pretrained(result.checkpoint).config.num_heads == 2
