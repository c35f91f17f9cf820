"""Which parameter goes to which optimizer, Muon's update against its definition, and the learning-rate schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from training_toys import trainer_config

from speculators.train.optimizers import FUSED_ON, Schedule, make_optimizers, make_schedule


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.fc = nn.Linear(4, 6)
        self.gate = nn.Linear(4, 1, bias=False)
        self.markov_w1 = nn.Parameter(torch.randn(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.lm_head = nn.Linear(4, 8, bias=False)


def test_muon_gets_matrices_but_no_tables_vectors_or_frozen_weights():
    toy = Toy()
    muon, adamw = make_optimizers(toy, trainer_config(optimizer="muon")).optimizers
    assert [id(param) for param in muon.param_groups[0]["params"]] == [id(toy.fc.weight)]
    expected = {
        id(toy.embed_tokens.weight),
        id(toy.fc.bias),
        id(toy.gate.weight),
        id(toy.markov_w1),
        id(toy.lm_head.weight),
    }
    assert {id(param) for param in adamw.param_groups[0]["params"]} == expected


def test_muon_takes_an_orthogonal_step_as_large_as_adamw_would():
    toy = nn.Linear(64, 32, bias=False)
    before = toy.weight.detach().clone()
    optimizers = make_optimizers(toy, trainer_config(optimizer="muon", muon_lr=0.5, muon_weight_decay=0.0))
    toy.weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    optimizers.step(1.0)
    step = (before - toy.weight.detach()) / (0.5 * 0.2 * 64**0.5)  # match_rms_adamw: 0.2 * sqrt(larger side)
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.6 and singular.max() < 1.3  # five Newton-Schulz steps reach 1 only roughly
    u, _, v = torch.linalg.svd(toy.weight.grad, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.97


def test_the_learning_rate_is_a_share_of_each_peak():
    optimizers = make_optimizers(Toy(), trainer_config(optimizer="muon", lr=0.1, muon_lr=0.4))
    optimizers.step(0.5)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers.optimizers] == [0.2, 0.05]
    optimizers.step(0.5)  # not cumulative
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers.optimizers] == [0.2, 0.05]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizers(nn.Linear(2, 2).requires_grad_(False), trainer_config())


def test_linear_rises_over_the_warmup_then_falls_to_zero():
    scales = [Schedule("linear", 2, 6).scale(step) for step in range(7)]
    assert scales == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_is_half_at_half_way_and_none_stays():
    assert [Schedule("cosine", 0, 4).scale(step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert [Schedule("none", 0, 4).scale(step) for step in (0, 2, 9)] == [1.0, 1.0, 1.0]


def test_it_stays_at_zero_past_the_end():
    assert Schedule("linear", 0, 4).scale(10) == 0.0


@pytest.mark.parametrize(
    ("options", "warmup", "total"),
    [
        ({}, 10, 1000),
        ({"warmup_ratio": 0.2}, 200, 1000),
        ({"warmup_steps": 7}, 7, 1000),
        ({"total_steps": 500}, 5, 500),
    ],
)
def test_where_the_numbers_come_from(options, warmup, total):
    schedule = make_schedule("linear", 1000, **options)
    assert (schedule.num_warmup_steps, schedule.num_steps) == (warmup, total)


def test_steps_win_over_the_ratio_and_a_ratio_is_a_share():
    with pytest.warns(UserWarning, match="using the steps"):
        assert make_schedule("linear", 100, warmup_steps=3, warmup_ratio=0.5).num_warmup_steps == 3
    with pytest.raises(ValueError, match=r"scheduler_warmup_ratio=1\.5 .* within 0\.\.1"):
        make_schedule("linear", 100, warmup_ratio=1.5)


def test_what_was_allowed_to_change_is_used_when_a_run_continues(make_model):
    before, now = (make_optimizers(make_model(), trainer_config(weight_decay=decay)) for decay in (0.01, 0.5))
    now.load_state_dict(before.state_dict())
    assert [group["weight_decay"] for part in now.optimizers for group in part.param_groups] == [0.5]


def stepped(optimizers, model, num_steps):
    """Takes steps with the same gradients for every model of this shape."""
    params = [param for param in model.parameters() if param.requires_grad]
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizers.clipped_step(params, 0.5)
    return [param.detach() for param in params]


def toys():
    """Two models with the same weights."""
    first, second = Toy(), Toy()
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fused_step_is_the_step_of_the_loop(optimizer):
    """The twin on a CPU of what GPUs run; rounding of fp32 alone."""
    loop, fused = toys()
    config = trainer_config(optimizer=optimizer, weight_decay=0.1, lr=0.1)
    plain, together = make_optimizers(loop, config), make_optimizers(fused, config, fused=True)
    assert [part.param_groups[0].get("fused") for part in together.optimizers if type(part) is AdamW] == [True]
    torch.testing.assert_close(stepped(together, fused, 5), stepped(plain, loop, 5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("devices", "fused"), [(FUSED_ON, None), (("cpu",), True)])
def test_the_device_of_the_parameters_chooses_the_fused_step(devices, fused, monkeypatch):
    """Not what the machine has: on a CPU it is the loop, whose bits are those of earlier releases."""
    monkeypatch.setattr("speculators.train.optimizers.FUSED_ON", devices)
    [on_cpu] = make_optimizers(Toy(), trainer_config(optimizer="adamw")).optimizers
    assert on_cpu.param_groups[0]["fused"] is fused


@pytest.mark.parametrize(("before", "after"), [(None, True), (True, None)])
def test_a_run_continues_from_a_loop_into_a_fused_step_and_back(before, after):
    """As from a CPU to a GPU: the moments go on, and the step is the one that this run chose."""
    model, reference = toys()
    config = trainer_config(optimizer="adamw", lr=0.1)
    plain = make_optimizers(reference, config)
    stepped(plain, reference, 2)
    first = make_optimizers(model, config, fused=before)
    stepped(first, model, 2)
    second = make_optimizers(model, config, fused=after)
    second.load_state_dict(first.state_dict())
    assert second.optimizers[0].param_groups[0]["fused"] is after
    torch.testing.assert_close(stepped(second, model, 3), stepped(plain, reference, 3), rtol=1e-5, atol=1e-6)
