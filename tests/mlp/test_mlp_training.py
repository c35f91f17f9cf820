"""Loss and gradients against loops over the formulas; documents; that it learns."""

import pytest
import torch
from datasets import Dataset
from drafter_toys import HIDDEN, VOCAB
from last_state_toys import packed_batch
from mlp_toys import NaiveMLP

from speculators import SpeculatorModel
from speculators.models import MLPSpeculator, MLPSpeculatorConfig
from speculators.train.config import TrainConfig
from speculators.train.events import StepDone
from speculators.train.run import train

CASES = {
    "tied": {},
    "one step": {"n_predict": 1, "inner_dim": 0},
    "untied, scaled input": {"tie_weights": False, "scale_input": True},
}


@pytest.mark.parametrize("loss_fn", ["ce", "kl_div"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_loops_over_the_formulas(make_drafter, case, loss_fn):
    model, batch = make_drafter(**CASES[case]), packed_batch([9, 2, 5, 11], seed=1, padding=4)
    naive = NaiveMLP(model)
    expected, _ = naive.loss(batch, 0.7, hard=loss_fn == "ce")
    expected.backward()
    kwargs, _ = model.get_trainer_kwargs(loss_fn=loss_fn, head_weight_decay=0.7, lr=1.0)
    logits, loss, _ = model(**batch, **kwargs)
    loss.backward()
    assert logits == []
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=name)
        else:
            assert name.startswith("verifier") and parameter.grad is None


def test_packed_documents_equal_separate_documents(make_drafter):
    model, lengths = make_drafter(), [9, 6, 3, 8]
    batch = packed_batch(lengths, seed=2, padding=4, supervised=0.9)
    packed, start = model(**batch)[2], 0
    sums = dict.fromkeys([f"{name}_{k}_sum" for name in ("loss", "full_acc", "cond_acc") for k in range(3)], 0.0)
    for length in lengths:
        alone = model(**{key: value[:, start : start + length] for key, value in batch.items()})[2]
        sums = {key: value + alone[key] for key, value in sums.items()}
        start += length
    for key, value in sums.items():
        torch.testing.assert_close(packed[key], value)


def test_rows_too_short_or_unsupervised_have_loss_zero_and_gradients(make_drafter):
    for batch in (packed_batch([1]), packed_batch([2], padding=3), packed_batch([9], supervised=0.0)):
        model = make_drafter()
        loss = model(**batch)[1]
        loss.backward()
        assert loss == 0 and all(bool(p.grad.eq(0).all()) for p in model.parameters() if p.requires_grad)


def test_initial_weights_have_the_spread_of_the_width():
    config = MLPSpeculatorConfig(hidden_size=HIDDEN, intermediate_size=400, vocab_size=VOCAB, num_layers=3)
    model = MLPSpeculator(config)
    for part in (model.emb, model.proj, model.head):
        for module in part:
            assert module.weight.std().item() == pytest.approx(1 / 20, rel=0.05)
    assert model.ln[0].weight.eq(1).all() and model.ln[0].bias.eq(0).all()


def test_bf16_autocast_stays_close_to_fp32(make_drafter):
    model, batch = make_drafter(random=False), packed_batch([20, 30], seed=5)
    exact = model(**batch)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch)[1]
    rounded.backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.03, atol=0.03)


def test_the_command_line_trains_it(tmp_path, verifier_path):
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
        "mlp",
        "--verifier-name-or-path",
        str(verifier_path),
        "--n-predict",
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
        "0.03",
        "--train-data-ratio",
        "1.0",
        "--hidden-states-dtype",
        "float32",
        "--loss-fn",
        "ce",
    ]
    config = TrainConfig.resolve(argv)
    assert config.flatten()["optimizer"] == "adamw"
    result = train(config, on_event=listen)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert result.acceptance_length is not None and 1.0 < result.acceptance_length <= 3.0
    assert SpeculatorModel.from_pretrained(result.checkpoint).config.num_layers == 2
