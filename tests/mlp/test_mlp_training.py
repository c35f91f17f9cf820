"""Loss and gradients against loops over the formulas; documents; that it learns."""

import pytest
from drafter_toys import HIDDEN, VOCAB, train_on_counting
from last_state_toys import (
    check_loss_and_gradients,
    check_that_bfloat16_stays_close,
    check_that_documents_add_up,
    check_that_nothing_to_learn_has_loss_zero,
    packed_batch,
)
from mlp_toys import NaiveMLP

from speculators import SpeculatorModel
from speculators.models import MLPSpeculator, MLPSpeculatorConfig
from speculators.train.config import TrainConfig

CASES = {
    "tied": {},
    "one step": {"n_predict": 1, "inner_dim": 0},
    "untied, scaled input": {"tie_weights": False, "scale_input": True},
}


@pytest.mark.parametrize("loss_fn", ["ce", "kl_div"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_loops_over_the_formulas(make_drafter, case, loss_fn):
    model, batch = make_drafter(**CASES[case]), packed_batch([9, 2, 5, 11], seed=1, padding=4)
    check_loss_and_gradients(model, NaiveMLP(model), batch, 0.7, loss_fn)


def test_packed_documents_equal_separate_documents(make_drafter):
    check_that_documents_add_up(make_drafter())


def test_rows_too_short_or_unsupervised_have_loss_zero_and_gradients(make_drafter):
    check_that_nothing_to_learn_has_loss_zero(make_drafter)


def test_initial_weights_have_the_spread_of_the_width():
    config = MLPSpeculatorConfig(hidden_size=HIDDEN, intermediate_size=400, vocab_size=VOCAB, num_layers=3)
    model = MLPSpeculator(config)
    for part in (model.emb, model.proj, model.head):
        for module in part:
            assert module.weight.std().item() == pytest.approx(1 / 20, rel=0.05)
    assert model.ln[0].weight.eq(1).all() and model.ln[0].bias.eq(0).all()


def test_bf16_autocast_stays_close_to_fp32(make_drafter):
    check_that_bfloat16_stays_close(make_drafter(random=False))


def test_the_command_line_trains_it(tmp_path, verifier_path):
    result, remaining = train_on_counting(tmp_path, "mlp", verifier_path, n_predict=2, lr=0.03, loss_fn="ce")
    assert remaining < 0.7
    assert result.acceptance_length is not None and 1.0 < result.acceptance_length <= 3.0
    assert SpeculatorModel.from_pretrained(result.checkpoint).config.num_layers == 2


def test_the_optimizer_is_adamw_unless_said_otherwise():
    argv = ["--speculator-type", "mlp", "--verifier-name-or-path", "x"]
    assert TrainConfig.resolve(argv).flatten()["optimizer"] == "adamw"
