"""What a `Trainer` is told, what it reports of its steps, what it answers, and the disk that a checkpoint takes."""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.table import Table

from speculators.losses.metrics import RecentSteps, expected_acceptance_length
from speculators.model import SpeculatorModel
from speculators.train.distributed import Ranks
from speculators.train.events import Listener, StepDone, arithmetic, describe
from speculators.train.flops import TERA, peak_flop_per_s
from speculators.train.keys import OptimizerKeys, SchedulerKeys, TrainerKeys
from speculators.training_keys import default_of
from speculators.utils.report import TableReport, facts_table, human_bytes

if TYPE_CHECKING:
    from speculators.deploy.report import CheckReport
    from speculators.evaluation.parity import ParityReport

BYTES_FP32, BYTES_BF16 = 4, 2
FIRST_ACCURACY = "full_acc_0"
OVERFITTED = 0.25
"""Accuracy of the first draft in training beyond that in validation, which says that the data were learnt by heart."""
WEAK = 1.3
"""Expected tokens per round below which drafting rarely pays its own cost."""
FINISHED = "finished ({} of {} steps); nothing to do"


@dataclass(frozen=True)
class TrainerConfig:
    """Values written here are the contract's for callers in Python; `train` gives every one by its key."""

    lr: float
    num_epochs: int
    save_path: str | Path
    resume_from_checkpoint: bool = False
    train_call_kwargs: dict[str, Any] = field(default_factory=dict)
    val_call_kwargs: dict[str, Any] = field(default_factory=dict)
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = default_of(OptimizerKeys, "weight_decay")
    muon_lr: float = 0.02
    muon_momentum: float = default_of(OptimizerKeys, "muon_momentum")
    muon_weight_decay: float = default_of(OptimizerKeys, "muon_weight_decay")
    muon_ns_steps: int = default_of(OptimizerKeys, "muon_ns_steps")
    muon_adjust_lr_fn: str = default_of(OptimizerKeys, "muon_adjust_lr_fn")
    scheduler_type: Literal["linear", "cosine", "none"] = default_of(SchedulerKeys, "scheduler_type")
    scheduler_warmup_steps: int | None = None
    scheduler_warmup_ratio: float | None = None
    scheduler_total_steps: int | None = None
    scheduler_num_cosine_cycles: float = default_of(SchedulerKeys, "scheduler_num_cosine_cycles")
    checkpoint_freq: float = default_of(TrainerKeys, "checkpoint_freq")
    save_best: bool = default_of(TrainerKeys, "save_best")
    hidden_states_dtype: torch.dtype = torch.bfloat16
    allow_changed_settings: bool = default_of(TrainerKeys, "allow_changed_settings")
    log_freq: int = default_of(TrainerKeys, "log_freq")
    log_every: int | None = default_of(TrainerKeys, "log_every")
    peak_tflops: float | None = default_of(TrainerKeys, "peak_tflops")
    """Of a rank's card; None: as `train.flops` knows it."""
    gradient_checkpointing: bool = default_of(TrainerKeys, "gradient_checkpointing")
    fsdp_shard: bool = default_of(TrainerKeys, "fsdp_shard")
    gradient_accumulation_steps: int = default_of(TrainerKeys, "gradient_accumulation_steps")
    """Packed rows of each rank in one optimizer step; each counts by its supervised tokens."""
    max_steps: int | None = None
    """Most optimizer steps, at least 1; None: as many as the epochs have."""
    train_command: str = ""
    """Written beside each checkpoint, for whoever finds it."""

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} trains nothing; give at least 1, or None for whole epochs")


@dataclass(frozen=True)
class TrainResult(TableReport, os.PathLike[str]):
    """Reports what a run leaves; a path wherever a checkpoint is asked for."""

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
    train_metrics: dict[str, float] = field(default_factory=dict, compare=False)
    """Of the last training steps of this process."""
    finished_before: bool = field(default=False, compare=False)
    """The run was over already: nothing was trained."""
    model_tflop_per_s: float | None = field(default=None, compare=False)
    """Of this process, from its second report on; None where the algorithm counts no model FLOPs."""
    mfu: float | None = field(default=None, compare=False)
    """The share of the card's peak; None where that is not known."""

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    def tables(self) -> list[Table]:
        facts: dict[str, object] = {"checkpoint": self.checkpoint, "steps": self.num_steps}
        if self.metrics:
            facts["metrics"] = describe(self.metrics, self.acceptance_length)
        if self.model_tflop_per_s is not None:
            facts["arithmetic"] = arithmetic(self.model_tflop_per_s, self.mfu)
        if self.check is not None:
            facts["check"] = self.check.verdict
        title = FINISHED.format(self.num_steps, self.num_steps) if self.finished_before else "Trained"
        findings = [] if self.check is None else self.check.findings_tables()
        return [*findings, facts_table(title, facts), *([] if self.parity is None else self.parity.tables())]

    def sentence(self) -> str:
        """With what speaks against the drafter: an accuracy that validation does not confirm, a short acceptance."""
        if self.acceptance_length is None:
            return f"trained for {self.num_steps} steps"
        against = weakness(self.train_metrics, self.metrics, self.acceptance_length)
        return f"expected acceptance length {self.acceptance_length:.2f}" + (f"; {against}" if against else "")

    def raise_for_errors(self) -> None:
        """Raises `ParityError` or `CheckError` when the gate or the check at the end of the run failed."""
        for report in (self.parity, self.check):
            if report is not None:
                report.raise_for_errors()


def weakness(trained: Mapping[str, float], validated: Mapping[str, float], acceptance_length: float | None) -> str:
    """Says what speaks against a drafter, by its metrics in training and validation; empty where nothing does."""
    seen, held_out = (metrics.get(FIRST_ACCURACY) for metrics in (trained, validated))
    if seen is not None and held_out is not None and seen - held_out > OVERFITTED:
        return f"overfitted: accuracy {seen:.2f} in training, {held_out:.2f} in validation: too few data"
    if acceptance_length is not None and acceptance_length < WEAK:
        return "a weak drafter, which may well be slower than plain decoding: train on more data"
    return ""


RECENT_REPORTS = 50


class StepReports(RecentSteps):
    """Reports training steps as `StepDone`, with what was measured since the report before.

    `late`: a report is told at the next one, or at `tell`, when its numbers have arrived on the host without having
    been waited for.
    """

    def __init__(self, config: TrainerConfig, num_steps: int, ranks: Ranks, on_event: Listener, *, late: bool = False):
        super().__init__()
        self.config, self.num_steps, self.ranks, self.on_event, self.late = config, num_steps, ranks, on_event, late
        self.metrics: dict[str, float] = {}
        """Of the newest report."""
        self.untold: tuple[StepDone, Callable[[], dict[str, float]]] | None = None
        self.recent: deque[tuple[float, int]] = deque(maxlen=RECENT_REPORTS)
        """When reports were made, and of which step. Before the first, things are compiled."""
        self.peak = peak_flop_per_s(ranks.device, config.hidden_states_dtype, config.peak_tflops)
        self.num_reports = 0
        self.counted = 0.0, 0.0
        """Model FLOPs of this rank, and their seconds: of all reports but the first, until there is another of that."""

    def step_done(self, step: int, epoch: int, lr_scale: float) -> None:
        """Reports every `log_freq` steps, every `log_every` steps and at the last one."""
        every = self.config.log_every
        is_logged = every is not None and step % every == 0
        if step % self.config.log_freq and not is_logged and step != self.num_steps:
            return
        self.tell()
        tflop_per_s = self.count()
        done = StepDone(
            step=step,
            num_steps=self.num_steps,
            epoch=epoch,
            lr=self.config.lr * lr_scale,
            metrics={},
            acceptance_length=None,
            tokens_per_s=self.tokens_per_s() * self.ranks.world_size,
            waiting=self.waiting(),
            left_s=self.left_s(step),
            peak_bytes=peak_bytes(self.ranks.device),
            is_logged=is_logged,
            model_tflop_per_s=tflop_per_s,
            mfu=self.share_of_peak(tflop_per_s),
        )
        self.untold = done, self.sums.reading(self.ranks.add_up)
        self.restart()
        if not self.late or step == self.num_steps:
            self.tell()

    def tell(self) -> None:
        """Tells of the report that is untold, if there is one. Raises `ValueError` when its loss is not finite."""
        if self.untold is None:
            return
        (done, read), self.untold = self.untold, None
        self.metrics = read()
        refuse_lost(self.metrics, done.step, self.config.lr)
        self.on_event(replace(done, metrics=self.metrics, acceptance_length=expected_acceptance_length(self.metrics)))

    def count(self) -> float | None:
        """Counts what was computed since the report before; returns its model TFLOP/s, None where none are counted."""
        if self.model_flop is None:
            return None
        flop, time_s = self.counted if self.num_reports > 1 else (0.0, 0.0)
        self.num_reports += 1
        self.counted = flop + self.model_flop, time_s + self.time_s
        return self.model_flop / self.time_s / TERA

    def of_run(self) -> dict[str, Any]:
        """Returns what a `TrainResult` says of the steps of this process."""
        flop, time_s = self.counted
        tflop_per_s = flop / time_s / TERA if flop else None
        speed = {"model_tflop_per_s": tflop_per_s, "mfu": self.share_of_peak(tflop_per_s)}
        return {"train_metrics": self.metrics, **speed}

    def share_of_peak(self, tflop_per_s: float | None) -> float | None:
        return None if tflop_per_s is None or self.peak is None else tflop_per_s * TERA / self.peak

    def left_s(self, step: int) -> float | None:
        """Seconds until the last step, at the pace of recent reports: a first epoch that makes states is slower."""
        now = time.perf_counter()
        self.recent.append((now, step))
        since, first = self.recent[0]
        return (now - since) / (step - first) * (self.num_steps - step) if step > first else None


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory that this process had: of its GPU, or on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def refuse_lost(metrics: Mapping[str, float], step: int, lr: float) -> None:
    """Raises `ValueError` when the loss is not finite."""
    if not math.isfinite(metrics.get("loss", 0.0)):
        raise ValueError(
            f"the loss became {metrics['loss']} by step {step}: nothing of it was saved; lower --lr (now {lr}), or "
            "check the verifier states with --hidden-states-dtype float32"
        )


def checkpoint_bytes(model: SpeculatorModel) -> int:
    """Most that a checkpoint takes: weights, and two moments of what is trained."""
    num_trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    num_all = sum(param.numel() for param in model.parameters())
    return num_trained * 3 * BYTES_FP32 + num_all * BYTES_BF16


def check_disk_space(path: Path, num_bytes: int) -> None:
    """Raises `OSError` if the disk cannot hold a checkpoint: an error now is cheaper than one after an epoch."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            f"a checkpoint takes {human_bytes(num_bytes)} but {existing} has {human_bytes(free)} free: free some "
            "space, or choose another --output"
        )
