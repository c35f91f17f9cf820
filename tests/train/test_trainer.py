"""The loop: against a naive one, resumed bit for bit, stopped by a signal."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from training_toys import random_batch

from speculators.train.checkpointer import Checkpointer
from speculators.train.data import ListLoader
from speculators.train.events import Saved, StepDone, Stopped, Validated
from speculators.train.graceful_shutdown import TrainingInterrupted
from speculators.train.trainer import Trainer, TrainerConfig

BATCHES = [random_batch(seed) for seed in range(5)]


def config(path, **changes) -> TrainerConfig:
    settings = {"lr": 0.01, "num_epochs": 2, "save_path": path, "hidden_states_dtype": torch.float32, "muon_lr": 0.01}
    return TrainerConfig(**{**settings, **changes})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_it_is_adamw_with_clipping_and_a_linear_schedule(tmp_path, make_model):
    trained = make_model()
    torch.manual_seed(5)
    Trainer(trained, config(tmp_path, scheduler_warmup_steps=2), BATCHES).run_training()

    naive = make_model()
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(naive.parameters(), lr=0.01, weight_decay=0.01)
    scales = [1 / 3, 2 / 3] + [1 - step / 8 for step in range(8)]
    naive.train()
    for scale, batch in zip(scales, BATCHES + BATCHES, strict=True):
        optimizer.param_groups[0]["lr"] = 0.01 * scale
        optimizer.zero_grad()
        naive(**batch)[1].backward()
        torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
        optimizer.step()
    assert_same_bits(weights(trained), weights(naive))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stopped_anywhere_and_continued_it_ends_with_the_same_bits(tmp_path, make_model, optimizer, dtype):
    settings = {"num_epochs": 3, "optimizer": optimizer, "hidden_states_dtype": dtype}
    whole = make_model()
    torch.manual_seed(7)
    Trainer(whole, config(tmp_path / "whole", **settings), BATCHES, BATCHES[:2]).run_training()

    stopped_at = []
    for attempt, stop_step in enumerate((3, 5, 9, None)):  # inside an epoch, at its end, inside another, to the end
        model = make_model(seed=100 + attempt)  # whatever it starts from, the checkpoint must replace it
        torch.manual_seed(7 if attempt == 0 else 50 + attempt)
        if attempt == 0:
            model.load_state_dict(make_model().state_dict())
            torch.manual_seed(7)

        def stop_there(event, stop_step=stop_step):
            if isinstance(event, StepDone) and event.step == stop_step:
                os.kill(os.getpid(), signal.SIGTERM)

        run = config(tmp_path / "parts", resume_from_checkpoint=True, **settings)
        trainer = Trainer(model, run, BATCHES, BATCHES[:2], on_event=stop_there)
        stopped_at.append(trainer.position.global_step)
        if stop_step is None:
            trainer.run_training()
        else:
            with pytest.raises(TrainingInterrupted, match="SIGTERM"):
                trainer.run_training()
    assert stopped_at == [0, 3, 6, 9]  # asked at the end of epoch 0: its validation and checkpoint come first
    assert_same_bits(weights(model), weights(whole))


def test_starting_anew_where_a_run_lies_is_refused(tmp_path, make_model):
    Trainer(make_model(), config(tmp_path), BATCHES).run_training()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"holds a run \(1 at step 10\).*another --output"):
        Trainer(make_model(), config(tmp_path), BATCHES)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_result_has_the_metrics_of_the_checkpoint_it_names(tmp_path, make_model):
    finished = config(tmp_path, num_epochs=1)
    trained = Trainer(make_model(), finished, BATCHES, BATCHES[:2]).run_training()
    nothing_left = Trainer(
        make_model(), config(tmp_path, num_epochs=1, resume_from_checkpoint=True), BATCHES, BATCHES[:2]
    )
    assert nothing_left.run_training() == trained
    assert trained.metrics["loss"] == min(Checkpointer(tmp_path).val_losses().values())


def test_a_killed_run_continues_from_the_last_epoch(tmp_path, make_model):
    whole = make_model()
    torch.manual_seed(7)
    Trainer(whole, config(tmp_path / "whole"), BATCHES).run_training()

    class PowerCut(Exception):
        pass

    def cut(event):
        if isinstance(event, StepDone) and event.step == 8:
            raise PowerCut

    first = make_model()
    torch.manual_seed(7)
    with pytest.raises(PowerCut):
        Trainer(first, config(tmp_path / "parts"), BATCHES, on_event=cut).run_training()
    second = make_model(seed=3)
    trainer = Trainer(second, config(tmp_path / "parts", resume_from_checkpoint=True), BATCHES)
    assert trainer.position.global_step == 5
    trainer.run_training()
    assert_same_bits(weights(second), weights(whole))


def test_a_resumed_epoch_does_not_touch_the_batches_before(tmp_path, make_model):
    class Watched(ListLoader):
        def __init__(self):
            super().__init__(BATCHES)
            self.firsts = []

        def batches(self, first=0):
            self.firsts.append(first)
            return super().batches(first)

    Trainer(make_model(), config(tmp_path, max_steps=3), BATCHES).run_training()
    loader = Watched()
    Trainer(make_model(), config(tmp_path, max_steps=4, resume_from_checkpoint=True), loader).run_training()
    assert loader.firsts == [3]


def test_a_finished_run_is_left_as_it_is(tmp_path, make_model):
    Trainer(make_model(), config(tmp_path), BATCHES).run_training()
    events = []
    model = make_model(seed=1)
    result = Trainer(
        model, config(tmp_path, resume_from_checkpoint=True), BATCHES, on_event=events.append
    ).run_training()
    assert not [event for event in events if isinstance(event, StepDone | Saved)]
    assert result.checkpoint == (tmp_path / "1").resolve()


def test_ctrl_c_finishes_the_step_saves_and_says_where(tmp_path, make_model):
    events, before = [], signal.getsignal(signal.SIGINT)  # a job of a shell's background ignores it

    def listen(event):
        events.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="run the same command to continue"):
        Trainer(make_model(), config(tmp_path), BATCHES, on_event=listen).run_training()
    assert isinstance(events[-1], Stopped) and events[-1].path == tmp_path / "interrupted"
    assert max(event.step for event in events if isinstance(event, StepDone)) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_validation_uses_its_own_arguments_no_dropout_and_leaves_the_weights(tmp_path, make_model):
    events = []
    model = make_model()
    run = config(
        tmp_path, num_epochs=1, val_call_kwargs={"label_smoothing": 0.0}, train_call_kwargs={"label_smoothing": 0.5}
    )
    result = Trainer(model, run, BATCHES, BATCHES[:2], on_event=events.append).run_training()
    model.eval()
    with torch.no_grad():
        losses = [model(**batch, label_smoothing=0.0)[1] for batch in BATCHES[:2]]
    [validated] = [event for event in events if isinstance(event, Validated)]
    assert validated.metrics["loss"] == pytest.approx(float(sum(losses) / 2))
    assert result.metrics == validated.metrics


def test_the_best_validation_is_what_the_result_points_to(tmp_path, make_model):
    # the second epoch takes a step so large that it must be worse
    run = config(tmp_path, num_epochs=2, scheduler_type="none", lr=3.0)
    result = Trainer(make_model(), run, BATCHES, BATCHES).run_training()
    losses = {epoch: float_loss(tmp_path / str(epoch)) for epoch in (0, 1)}
    best = min(losses, key=losses.get)
    assert (tmp_path / "checkpoint_best").resolve() == result.checkpoint == (tmp_path / str(best)).resolve()


def float_loss(path):
    import json

    return json.loads((path / "val_metrics.json").read_text())["loss"]


def test_a_loss_that_is_not_a_number_ends_the_run_unsaved(tmp_path, make_model):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ValueError, match="loss became nan by step 1"):
        Trainer(model, config(tmp_path), BATCHES).run_training()
    assert list(tmp_path.iterdir()) == []


def test_max_steps_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps=0 trains nothing"):
        config(tmp_path, max_steps=0)


def test_max_steps_ends_inside_an_epoch_and_is_saved(tmp_path, make_model):
    result = Trainer(make_model(), config(tmp_path, max_steps=3), BATCHES).run_training()
    assert result.num_steps == 3
    assert (tmp_path / "epoch0_step3").resolve() == result.checkpoint == (tmp_path / "0").resolve()


def test_the_speed_of_training_counts_no_validation(tmp_path, make_model, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(ListLoader):
        def __init__(self, ready, seconds):
            super().__init__(ready)
            self.seconds = seconds

        def batches(self, first=0):
            for batch in super().batches(first):
                clock[0] += self.seconds
                yield batch

    events = []
    settings = config(tmp_path, num_epochs=1, log_freq=5, checkpoint_freq=0.5)  # validated after steps 2 and 5
    Trainer(make_model(), settings, Slow(BATCHES, 2.0), Slow(BATCHES, 100.0), on_event=events.append).run_training()
    (done,) = [event for event in events if isinstance(event, StepDone)]
    assert done.tokens_per_s == sum(int((batch["document_ids"] >= 0).sum()) for batch in BATCHES) / 10.0


def test_an_empty_loader_is_an_error(tmp_path, make_model):
    with pytest.raises(ValueError, match="not one packed row"):
        Trainer(make_model(), config(tmp_path), [])
