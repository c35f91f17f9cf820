"""The training loop: forward, backward, step; report, validate, save; stop cleanly and continue exactly.

Weights are fp32 masters; the forward runs under autocast to `hidden_states_dtype` (float32 turns autocast off).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from speculators.data_generation import InvalidResponseError, ServerUnavailableError
from speculators.losses.chunks import chunks_of
from speculators.losses.metrics import MetricSums, expected_acceptance_length
from speculators.model import SpeculatorModel
from speculators.train.checkpoint_files import (
    DamagedCheckpointError,
    Position,
    is_saved_epoch,
    mid_epoch_saves,
    read_position,
)
from speculators.train.checkpointer import INTERRUPTED, checkpointer_of
from speculators.train.data import Batch, BatchLoader, as_loader
from speculators.train.distributed import Ranks, pick_device
from speculators.train.events import Listener, Note, Saved, Started, Stopped, Validated, ignore
from speculators.train.graceful_shutdown import GracefulShutdown, TrainingInterrupted
from speculators.train.optimizers import make_optimizers, num_steps_of, schedule_of
from speculators.train.parallel import parallelise
from speculators.train.records import FINISHED, StepReports, TrainerConfig, TrainResult
from speculators.train.validation import PromptDecoder

__all__ = ["TrainResult", "Trainer", "TrainerConfig"]

RowsDone = tuple[int, int, int]
"""Epoch, rows of it that were trained on, rows of the validation after them."""


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
        decoder: PromptDecoder | None = None,
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
        self.chunk_elements: int | None = None  # logits of a chunk of the losses; None: the device's own choice
        self.parallel = parallelise(model, self.ranks, config, self.tell)
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.optimizers = make_optimizers(model, config)
        self.checkpointer = checkpointer_of(
            self.parallel, config.save_path, save_best=config.save_best, train_command=config.train_command
        )
        self.ranks.main_first(self.open_run_directory)
        rows_a_step = partial(self.checkpointer.rows_a_step, config, self.ranks.world_size, self.tell)
        self.rows_a_step = self.ranks.told_by_main(self.ranks.main_first(rows_a_step))
        num_run_steps = num_steps_of(self.train_loader, config.num_epochs, self.rows_a_step)
        self.num_steps = min(num_run_steps, config.max_steps or num_run_steps)
        self.schedule = schedule_of(config, self.num_steps)
        self.position = Position()
        self.num_documents, self.num_tokens, self.decoder = num_documents, num_tokens, decoder
        self.weighs_rows = self.ranks.world_size * self.rows_a_step > 1
        self.step_weight, self.finished_before = 0.0, False
        late = self.ranks.device.type != "cpu"
        self.recent = StepReports(config, self.num_steps, self.ranks, self.on_event, late=late)
        self.last_saved: tuple[Path, int] | None = None
        if config.resume_from_checkpoint:
            self.resume()
        self.val_losses = self.checkpointer.val_losses()
        """Epoch -> validation loss, of the checkpoints on disk."""

    def tell(self, text: str) -> None:
        self.on_event(Note(text))

    def open_run_directory(self) -> None:
        """Finishes what a dead process left half done; refuses to mix a new run with an old one."""
        for text in self.checkpointer.recover():
            self.tell(text)
        if not self.config.resume_from_checkpoint:
            self.checkpointer.refuse_other_runs()

    def resume(self) -> None:
        """Continues from the newest checkpoint that can be read; damaged ones are set aside, with a line."""
        path = self.load_newest()
        if path is None:
            return
        position = self.position
        self.train_loader.set_epoch(position.epoch)
        finished = position.local_step == 0 or position.local_step >= len(self.train_loader)
        self.position = Position(position.epoch + 1, 0, position.global_step) if finished else position
        self.last_saved = (path, position.global_step)
        if self.checkpointer.finished_steps() == self.num_steps:
            self.position = Position(self.config.num_epochs, 0, self.num_steps)
        if not self.is_finished():
            self.tell(self.checkpointer.continuing(path, position))

    def load_newest(self) -> Path | None:
        """Loads the newest checkpoint that every rank can read: each reads parts of its own."""
        while name := self.ranks.told_by_main(str(self.checkpointer.newest() or "")):
            path, error = Path(name), None
            try:
                self.load(path)
            except ValueError as raised:
                error = raised
            error = self.ranks.first_error(error)
            if error is None:
                return path
            if not isinstance(error, DamagedCheckpointError):
                raise error
            self.ranks.main_first(partial(self.checkpointer.pass_over, path, error, self.tell))
        return None

    def load(self, path: Path) -> None:
        self.train_loader.set_epoch(read_position(path).epoch)
        of_rank: dict[str, Any] = {"ranks": self.ranks, "num_rows": len(self.train_loader)}
        self.position = self.checkpointer.load(path, self.model, self.optimizers, **of_rank)

    def run_training(self) -> TrainResult:
        with GracefulShutdown() as shutdown:
            deque(self.training(shutdown), maxlen=0)
        return self.result()

    def training(self, shutdown: GracefulShutdown) -> Generator[RowsDone]:
        """Trains to the end, or until `shutdown` is requested; yields after each row: several trainers take turns."""
        num_trainable, first_step = sum(param.numel() for param in self.params), self.position.global_step
        self.finished_before = self.is_finished()
        if self.finished_before:
            self.tell(FINISHED.format(first_step, self.num_steps))
            return
        compiles = self.model.attention_route(self.ranks.device.type).kernel is not None
        self.on_event(Started(self.num_steps, first_step, num_trainable, self.num_documents, self.num_tokens, compiles))
        while not self.is_finished():
            first_of_epoch = self.position.global_step
            try:
                yield from self.train_epoch(shutdown)
            except (ServerUnavailableError, InvalidResponseError) as error:
                self.save_what_was_trained(first_of_epoch, error)
        if self.last_saved is None or (self.last_saved[1] < self.position.global_step and not self.config.save_best):
            self.save()
        if self.ranks.is_main and self.last_saved is not None and self.last_saved[1] < self.position.global_step:
            self.checkpointer.finish(self.position.global_step)

    def is_finished(self) -> bool:
        is_last_step = self.config.max_steps is not None and self.position.global_step >= self.config.max_steps
        return is_last_step or self.position.epoch >= self.config.num_epochs

    def train_epoch(self, shutdown: GracefulShutdown) -> Generator[RowsDone]:
        """The rest of the current epoch, or as much of it as `max_steps` leaves."""
        epoch, first = self.position.epoch, self.position.local_step
        self.train_loader.set_epoch(epoch)
        num_rows, rows_a_step = len(self.train_loader), self.rows_a_step
        save_steps = mid_epoch_saves(self.config.checkpoint_freq, num_rows, rows_a_step)
        for local_step, batch in enumerate(self.recent.timed(self.train_loader.batches(first)), start=first + 1):
            is_last = local_step % rows_a_step == 0 or local_step == num_rows
            self.backward(batch, is_last)
            if not is_last:
                yield epoch, local_step, 0
                continue
            lr = self.step()
            self.position = Position(epoch, local_step, self.position.global_step + 1)
            self.recent.step_done(self.position.global_step, epoch, lr)
            # At the end of an epoch its validation and checkpoint come first; the next step stops.
            if self.ranks.any(shutdown.requested is not None) and local_step < num_rows:
                self.stop(shutdown.requested or "a signal on another rank")
            yield epoch, local_step, 0
            if self.is_finished():
                break
            if local_step in save_steps:
                yield from self.validate_and_save()
        ended = self.position.local_step >= num_rows
        if ended:
            self.position = Position(epoch, 0, self.position.global_step)
        is_last = self.is_finished() or epoch + 1 == self.config.num_epochs
        if is_last or is_saved_epoch(self.config.checkpoint_freq, epoch):
            yield from self.validate_and_save()
        if ended:
            self.position = Position(epoch + 1, 0, self.position.global_step)

    def backward(self, batch: Batch, is_last: bool) -> None:
        """Adds the gradients of one row, which counts by its supervised tokens where a step has several."""
        self.model.train()
        with self.parallel.row(is_last):
            loss, metrics = self.forward(self.parallel.module, batch, self.config.train_call_kwargs)
            if self.weighs_rows:
                weight = float(batch["loss_mask"].sum())
                self.step_weight += weight
                loss = loss * weight
            loss.backward()
        self.recent.add(metrics, num_tokens=int((batch["document_ids"] >= 0).sum()), model_flop=self.model.row_flop)

    def step(self) -> float:
        """One optimizer step; returns the scale of the learning rate it used."""
        if self.weighs_rows:
            self.parallel.divide_gradients(self.params, self.step_weight)
        self.step_weight = 0.0
        scale = self.schedule.scale(self.position.global_step)
        self.optimizers.clipped_step(self.params, scale)
        return scale

    def forward(
        self, module: nn.Module, batch: Batch, call_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        device, dtype = self.ranks.device, self.config.hidden_states_dtype
        inputs = self.ranks.moved(batch, left_out=("error_records",), on_host=self.model.columns_on_host)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32), chunks_of(self.chunk_elements):
            _, loss, metrics = module(**inputs, **call_kwargs)
        return (metrics["loss"] if loss is None else loss), metrics

    @torch.no_grad()
    def validate(self) -> Generator[RowsDone, None, dict[str, float] | None]:
        """Yields after each row; returns the metrics, None without a validation split."""
        self.recent.tell()
        if self.val_loader is None:
            return None
        self.model.eval()
        sums, at, num_counted = MetricSums(), self.position, len(self.val_loader) - self.val_loader.num_repeated
        for number, batch in enumerate(self.val_loader.batches()):
            sums.add(self.forward(self.model, batch, self.config.val_call_kwargs)[1], counts=number < num_counted)
            yield at.epoch, at.local_step or len(self.train_loader), number + 1
        metrics = sums.values(self.ranks.add_up)
        if self.decoder is not None:
            with self.parallel.whole() as model:
                metrics |= self.decoder.measure(model, self.ranks)
        self.on_event(Validated(at.global_step, at.epoch, metrics, expected_acceptance_length(metrics)))
        return metrics

    def validate_and_save(self) -> Generator[RowsDone]:
        started = time.perf_counter()
        metrics = yield from self.validate()
        loss = math.inf if metrics is None else metrics.get("loss", math.inf)
        if not self.config.save_best:
            self.save(metrics)
        elif loss < min(self.val_losses.values(), default=math.inf):
            self.val_losses = {self.position.epoch: loss}
            self.save(metrics)
        self.recent.leave_out(time.perf_counter() - started)

    def save(self, val_metrics: dict[str, float] | None = None, *, name: str | None = None) -> Path:
        """Write a checkpoint of this step: into the directory of the epoch, or of that name."""
        self.recent.tell()
        path = self.checkpointer.root / (name or str(self.position.epoch))
        states = self.ranks.random_states()
        if self.ranks.is_main:
            shares: dict[str, Any] = {"random_states": states, "num_rows": len(self.train_loader)}
            shares["rows_a_step"] = self.rows_a_step
            self.checkpointer.save(path, self.model, self.optimizers, self.position, val_metrics, **shares)
            self.checkpointer.mark_best()
        else:
            self.checkpointer.help_to_save(self.optimizers)
        self.last_saved = (path, self.position.global_step)
        self.on_event(Saved(path, self.position.global_step))
        self.ranks.wait()
        return path

    def save_what_was_trained(self, first_step_of_epoch: int, error: Exception) -> NoReturn:
        """The verifier states stopped coming: lose no step, and say how to go on."""
        position = self.position
        if position.global_step == first_step_of_epoch and position.local_step == 0:
            self.position = Position(position.epoch - 1, 0, position.global_step)  # on disk: that epoch is finished
        is_saved = self.last_saved is not None and self.last_saved[1] == position.global_step
        if position.global_step == 0 or is_saved or self.ranks.world_size > 1:  # other ranks would wait for ever
            raise error
        path = self.save(name=INTERRUPTED)
        goes_on = f"Saved {path}: the same command continues from step {position.global_step}"
        raise type(error)(f"{error}. {goes_on}") from error

    def stop(self, signal_name: str) -> None:
        path = self.save(name=INTERRUPTED)
        self.on_event(Stopped(path, signal_name))
        raise TrainingInterrupted(path, signal_name)

    def result(self) -> TrainResult:
        best = self.checkpointer.best
        path = best if best.exists() else (self.last_saved or (self.checkpointer.root, 0))[0]
        metrics = self.checkpointer.val_metrics(path) or self.recent.metrics
        told: dict[str, Any] = {**self.recent.of_run(), "finished_before": self.finished_before}
        length = expected_acceptance_length(metrics)
        return TrainResult(path.resolve(), metrics, length, self.position.global_step, **told)
