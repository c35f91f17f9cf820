"""The training loop: forward, backward, step; report, validate, save; stop cleanly and continue exactly.

Weights are fp32 masters; the forward runs under autocast to `hidden_states_dtype` (float32 turns autocast off).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from speculators.data_generation import InvalidResponseError, ServerUnavailableError
from speculators.model import SpeculatorModel
from speculators.train.checkpointer import Checkpointer, Position
from speculators.train.distributed import Ranks, pick_device
from speculators.train.events import Listener, Note, Saved, Started, StepDone, Stopped, Validated, ignore
from speculators.train.graceful_shutdown import GracefulShutdown, TrainingInterrupted
from speculators.train.loader import Batch, BatchLoader, as_loader, num_steps_of
from speculators.train.metrics import MetricSums, expected_acceptance_length
from speculators.train.optimizers import OptimizerConfig, make_optimizers
from speculators.train.schedulers import make_schedule

if TYPE_CHECKING:
    from speculators.deploy.report import CheckReport
    from speculators.evaluation.parity import ParityReport

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TrainerConfig:
    lr: float
    num_epochs: int
    save_path: str | Path
    resume_from_checkpoint: bool = False
    train_call_kwargs: dict[str, Any] = field(default_factory=dict)
    val_call_kwargs: dict[str, Any] = field(default_factory=dict)
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.01
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.1
    muon_ns_steps: int = 5
    muon_adjust_lr_fn: str = "match_rms_adamw"
    scheduler_type: Literal["linear", "cosine", "none"] = "linear"
    scheduler_warmup_steps: int | None = None
    scheduler_warmup_ratio: float | None = None
    scheduler_total_steps: int | None = None
    scheduler_num_cosine_cycles: float = 0.5
    checkpoint_freq: float = 1
    save_best: bool = False
    hidden_states_dtype: torch.dtype = torch.bfloat16
    log_freq: int = 1
    gradient_checkpointing: bool = False
    max_steps: int | None = None
    train_command: str = ""
    """Written beside each checkpoint, for whoever finds it."""


@dataclass(frozen=True)
class TrainResult:
    checkpoint: Path
    """The speculator directory to use: the best by validation loss, or the last when nothing was validated."""
    metrics: dict[str, float]
    """Of the validation of that checkpoint; of the last training steps when nothing was validated."""
    acceptance_length: float | None
    num_steps: int
    parity: ParityReport | None = None
    """Of the gate at the end of a run; None when it was not made."""
    check: CheckReport | None = None
    """Of the contract check at the end of a run; None when it was not made."""


class Trainer:
    def __init__(
        self,
        model: SpeculatorModel,
        config: TrainerConfig,
        train_loader: BatchLoader | Sequence[Batch],
        val_loader: BatchLoader | Sequence[Batch] | None = None,
        *,
        ranks: Ranks | None = None,
        on_event: Listener = ignore,
        num_documents: int = 0,
        num_tokens: int = 0,
    ):
        SpeculatorModel.verify_training_compatible(model)
        self.config = config
        self.ranks = ranks or Ranks(device=pick_device())
        self.on_event = on_event if self.ranks.is_main else ignore
        self.train_loader = as_loader(train_loader)
        self.val_loader = None if val_loader is None else as_loader(val_loader)
        if len(self.train_loader) == 0:
            raise ValueError("not one packed row to train on: add documents, or use fewer processes")
        self.model = model.to(self.ranks.device)  # type: ignore[arg-type]
        self.params = [param for param in model.parameters() if param.requires_grad]
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.optimizers = make_optimizers(model, optimizer_config(config))
        num_run_steps = num_steps_of(self.train_loader, config.num_epochs)
        self.num_steps = min(num_run_steps, config.max_steps or num_run_steps)
        self.schedule = make_schedule(
            config.scheduler_type,
            self.num_steps,
            total_steps=config.scheduler_total_steps,
            warmup_steps=config.scheduler_warmup_steps,
            warmup_ratio=config.scheduler_warmup_ratio,
            num_cosine_cycles=config.scheduler_num_cosine_cycles,
        )
        self.checkpointer = Checkpointer(
            config.save_path, save_best=config.save_best, train_command=config.train_command
        )
        self.position = Position()
        self.sizes = (num_documents, num_tokens)
        self.recent = MetricSums()
        self.recent_since = (0, time.perf_counter())  # tokens, and the time they are counted from
        self.last_metrics: dict[str, float] = {}
        self.last_saved: tuple[Path, int] | None = None
        if config.resume_from_checkpoint:
            self.best_loss = self.checkpointer.best_loss()
            self.resume()
        else:
            self.best_loss = math.inf
            self.checkpointer.refuse_other_runs()

    def resume(self) -> None:
        path = self.checkpointer.newest()
        if path is None:
            return
        position = self.checkpointer.load(path, self.model, self.optimizers)
        self.train_loader.set_epoch(position.epoch)
        finished = position.local_step == 0 or position.local_step >= len(self.train_loader)
        self.position = Position(position.epoch + 1, 0, position.global_step) if finished else position
        self.last_saved = (path, position.global_step)
        self.on_event(Note(f"continuing from {path} at step {position.global_step}"))

    def run_training(self) -> TrainResult:
        config = self.config
        num_trainable = sum(param.numel() for param in self.params)
        self.on_event(Started(self.num_steps, self.position.global_step, num_trainable, *self.sizes))
        with GracefulShutdown() as shutdown:
            while self.position.epoch < config.num_epochs and not self.is_finished():
                first_step = self.position.global_step
                try:
                    self.train_epoch(shutdown)
                except (ServerUnavailableError, InvalidResponseError) as error:
                    self.save_what_was_trained(first_step, error)
        if self.last_saved is None or (self.last_saved[1] < self.position.global_step and not config.save_best):
            self.save()
        return self.result()

    def is_finished(self) -> bool:
        return self.config.max_steps is not None and self.position.global_step >= self.config.max_steps

    def train_epoch(self, shutdown: GracefulShutdown) -> None:
        """The rest of the current epoch, or as much of it as `max_steps` leaves."""
        epoch, first = self.position.epoch, self.position.local_step
        self.train_loader.set_epoch(epoch)
        save_steps = mid_epoch_saves(self.config.checkpoint_freq, len(self.train_loader))
        for local_step, batch in enumerate(self.train_loader.batches(first), start=first + 1):
            lr = self.step(batch)
            self.position = Position(epoch, local_step, self.position.global_step + 1)
            self.report(lr)
            # At the end of an epoch its validation and checkpoint come first; the next step stops.
            if self.ranks.any(shutdown.requested is not None) and local_step < len(self.train_loader):
                self.stop(shutdown.requested or "a signal on another rank")
            if self.is_finished():
                break
            if local_step in save_steps:
                self.validate_and_save()
        ended = self.position.local_step >= len(self.train_loader)
        if ended:
            self.position = Position(epoch, 0, self.position.global_step)
        is_last = self.is_finished() or epoch + 1 == self.config.num_epochs
        if is_last or is_saved_epoch(self.config.checkpoint_freq, epoch):
            self.validate_and_save()
        if ended:
            self.position = Position(epoch + 1, 0, self.position.global_step)

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the scale of the learning rate it used."""
        self.model.train()
        loss, metrics = self.forward(batch, self.config.train_call_kwargs)
        loss.backward()
        self.ranks.average_gradients(self.params)
        torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        scale = self.schedule.scale(self.position.global_step)
        self.optimizers.step(scale)
        self.optimizers.zero_grad()
        self.recent.add(metrics)
        self.recent_since = (self.recent_since[0] + int((batch["document_ids"] >= 0).sum()), self.recent_since[1])
        return scale

    def forward(self, batch: Batch, call_kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        device, dtype = self.ranks.device, self.config.hidden_states_dtype
        inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "error_records"}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            _, loss, metrics = self.model(**inputs, **call_kwargs)
        return (metrics["loss"] if loss is None else loss), metrics

    def report(self, lr_scale: float) -> None:
        """Every `log_freq` steps and at the last one: metrics since the last report."""
        step = self.position.global_step
        if step % self.config.log_freq and step != self.num_steps:
            return
        metrics = self.recent.values(self.ranks.add_up)
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise ValueError(
                f"the loss became {metrics['loss']} by step {step}: nothing of it was saved; lower --lr "
                f"(now {self.config.lr}), or check the verifier states with --hidden-states-dtype float32"
            )
        now = time.perf_counter()
        num_tokens, since = self.recent_since
        self.last_metrics = metrics
        self.on_event(
            StepDone(
                step,
                self.num_steps,
                self.position.epoch,
                self.config.lr * lr_scale,
                metrics,
                expected_acceptance_length(metrics),
                num_tokens * self.ranks.world_size / max(now - since, 1e-9),
            )
        )
        self.recent, self.recent_since = MetricSums(), (0, now)

    @torch.no_grad()
    def validate(self) -> dict[str, float] | None:
        if self.val_loader is None:
            return None
        self.model.eval()
        sums = MetricSums()
        for batch in self.val_loader.batches():
            sums.add(self.forward(batch, self.config.val_call_kwargs)[1])
        metrics = sums.values(self.ranks.add_up)
        self.last_metrics = metrics
        position = self.position
        self.on_event(Validated(position.global_step, position.epoch, metrics, expected_acceptance_length(metrics)))
        self.recent_since = (self.recent_since[0], time.perf_counter())
        return metrics

    def validate_and_save(self) -> None:
        metrics = self.validate()
        is_best = metrics is not None and metrics.get("loss", math.inf) < self.best_loss
        if is_best and metrics is not None:
            self.best_loss = metrics["loss"]
        if is_best or not self.config.save_best:
            self.save(metrics, is_best=is_best)

    def save(
        self, val_metrics: dict[str, float] | None = None, *, is_best: bool = False, name: str | None = None
    ) -> None:
        path = self.checkpointer.root / (name or str(self.position.epoch))
        if self.ranks.is_main:
            self.checkpointer.save(path, self.model, self.optimizers, self.position, val_metrics)
            if is_best:
                self.checkpointer.mark_best(path)
        self.last_saved = (path, self.position.global_step)
        self.on_event(Saved(path, self.position.global_step))
        self.ranks.wait()

    def save_what_was_trained(self, first_step_of_epoch: int, error: Exception) -> NoReturn:
        """The verifier states stopped coming: lose no step, and say how to go on."""
        position = self.position
        if position.global_step == first_step_of_epoch and position.local_step == 0:
            self.position = Position(position.epoch - 1, 0, position.global_step)  # on disk: that epoch is finished
        is_saved = self.last_saved is not None and self.last_saved[1] == position.global_step
        if position.global_step == 0 or is_saved or self.ranks.world_size > 1:  # other ranks would wait for ever
            raise error
        self.save(name="interrupted")
        where = self.checkpointer.root / "interrupted"
        goes_on = f"Saved {where}: the same command continues from step {position.global_step}"
        raise type(error)(f"{error}. {goes_on}") from error

    def stop(self, signal_name: str) -> None:
        self.save(name="interrupted")
        path = self.checkpointer.root / "interrupted"
        self.on_event(Stopped(path, signal_name))
        raise TrainingInterrupted(path, signal_name)

    def result(self) -> TrainResult:
        best = self.checkpointer.root / "checkpoint_best"
        path = best if best.exists() else (self.last_saved or (self.checkpointer.root, 0))[0]
        metrics = self.checkpointer.val_metrics(path) or self.last_metrics
        return TrainResult(path.resolve(), metrics, expected_acceptance_length(metrics), self.position.global_step)


def optimizer_config(config: TrainerConfig) -> OptimizerConfig:
    return OptimizerConfig(
        name=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        muon_lr=config.muon_lr,
        muon_momentum=config.muon_momentum,
        muon_weight_decay=config.muon_weight_decay,
        muon_ns_steps=config.muon_ns_steps,
        muon_adjust_lr_fn=config.muon_adjust_lr_fn,
    )


def mid_epoch_saves(checkpoint_freq: float, num_steps: int) -> set[int]:
    """Steps inside an epoch after which to save: freq 0.25 of 8 steps -> {2, 4, 6}; the end of the epoch is not one."""
    if checkpoint_freq >= 1:
        return set()
    count = round(1 / checkpoint_freq)
    return {num_steps * part // count for part in range(1, count)} - {0, num_steps}


def is_saved_epoch(checkpoint_freq: float, epoch: int) -> bool:
    """Epoch 0 always, then every `checkpoint_freq`-th."""
    return epoch % max(1, int(checkpoint_freq)) == 0
