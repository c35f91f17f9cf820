"""Loss, gradients and metrics against loops over the formulas; what counts; that it learns."""

import pytest
import torch
from datasets import Dataset
from drafter_toys import HIDDEN, VOCAB
from last_state_toys import packed_batch
from medusa_toys import NaiveMedusa

from speculators import SpeculatorModel
from speculators.models import MedusaDraftModel
from speculators.train.config import TrainConfig
from speculators.train.events import StepDone
from speculators.train.run import train


@pytest.mark.parametrize("loss_fn", ["ce", "kl_div"])
def test_loss_gradients_and_metrics_equal_loops_over_the_formulas(make_drafter, loss_fn):
    model, batch = make_drafter(), packed_batch([9, 2, 5, 11], seed=1, padding=4)
    naive = NaiveMedusa(model)
    expected, correct = naive.loss(batch, 0.8, hard=loss_fn == "ce")
    expected.backward()
    kwargs, _ = model.get_trainer_kwargs(loss_fn=loss_fn, head_weight_decay=0.8, lr=1.0)
    logits, loss, metrics = model(**batch, **kwargs)
    loss.backward()
    assert logits == []
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=name)
        else:
            assert name.startswith("verifier") and parameter.grad is None
    for k in range(3):
        counted = [t for head, t in correct if head == k]
        chain = [t for t in counted if all(correct.get((j, t), False) for j in range(k + 1))]
        before = [t for t in counted if all(correct.get((j, t), False) for j in range(k))]
        before = [t for t in before if all((j, t) in correct for j in range(k))]
        assert metrics[f"full_acc_{k}_sum"] == len(chain) and metrics[f"full_acc_{k}_total"] == len(counted)
        assert metrics[f"cond_acc_{k}_total"] == len(before)


def test_packed_documents_equal_separate_documents(make_drafter):
    model, lengths = make_drafter(), [9, 6, 3, 8]
    batch = packed_batch(lengths, seed=2, padding=4, supervised=0.9)
    packed, sums, start = model(**batch)[2], {}, 0
    for length in lengths:
        alone = model(**{key: value[:, start : start + length] for key, value in batch.items()})[2]
        for key in alone:
            if key[-4:] == "_sum" and key != "loss_sum":
                sums[key] = sums.get(key, 0.0) + alone[key]
        start += length
    assert len(sums) == 9
    for key, value in sums.items():
        torch.testing.assert_close(packed[key], value)


def test_rows_of_a_batch_do_not_see_each_other(make_drafter):
    model = make_drafter()
    rows = [packed_batch([7, 5], seed=s) for s in (1, 2)]
    both = model(**{key: torch.cat([row[key] for row in rows]) for key in rows[0]})[2]
    for k in range(3):
        total = sum(model(**row)[2][f"loss_{k}_sum"] for row in rows)
        torch.testing.assert_close(both[f"loss_{k}_sum"], total)


def test_rows_too_short_or_unsupervised_have_loss_zero_and_gradients(make_drafter):
    for batch in (packed_batch([1]), packed_batch([2], padding=3), packed_batch([9], supervised=0.0)):
        model = make_drafter()
        loss = model(**batch)[1]
        loss.backward()
        assert loss == 0 and all(bool(p.grad.eq(0).all()) for p in model.parameters() if p.requires_grad)
    empty = {**packed_batch([], padding=6), "hidden_states": torch.zeros(1, 6, 0)}  # no sample could be had
    assert make_drafter()(**empty)[1] == 0


def test_a_new_drafter_is_the_verifiers_head_k_times(make_drafter, verifier):
    model, batch = make_drafter(random=False), packed_batch([12])
    states = batch["hidden_states"][:, :9]
    for logits in model(**batch)[0]:
        torch.testing.assert_close(logits, verifier.lm_head(verifier.model.norm(states)))


def test_bf16_autocast_stays_close_to_fp32(make_drafter):
    model, batch = make_drafter(random=False), packed_batch([20, 30], seed=5)
    exact = model(**batch)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch)[1]
    rounded.backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.03, atol=0.03)


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
    """A language of counting."""
    rows = [[(start + stride * i) % VOCAB for i in range(20)] for start in range(6) for stride in (1, 3)]
    data = [{"input_ids": ids, "loss_mask": [0] * 3 + [1] * 17, "seq_len": 20} for ids in rows]
    Dataset.from_list(data).save_to_disk(tmp_path / "data")
    losses = []

    def listen(event):
        if isinstance(event, StepDone):
            losses.append(event.metrics["loss"])

    argv = [
        "--speculator-type",
        "medusa",
        "--verifier-name-or-path",
        str(verifier_path),
        "--num-heads",
        "2",
        "--data-path",
        str(tmp_path / "data"),
        "--save-path",
        str(tmp_path / "run"),
        "--total-seq-len",
        "128",
        "--epochs",
        "15",
        "--lr",
        "0.01",
        "--train-data-ratio",
        "1.0",
        "--hidden-states-dtype",
        "float32",
        "--loss-fn",
        loss_fn,
    ]
    result = train(TrainConfig.resolve(argv), on_event=listen)
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    assert result.acceptance_length is not None and 1.0 < result.acceptance_length <= 3.0
    assert SpeculatorModel.from_pretrained(result.checkpoint).config.num_heads == 2
