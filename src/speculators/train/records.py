"""What a `Trainer` is told, what it answers, and the memory and disk space that a run is estimated to need."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.table import Table

from speculators.model import SpeculatorModel
from speculators.train.events import describe
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
    gradient_checkpointing: bool = default_of(TrainerKeys, "gradient_checkpointing")
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

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    def tables(self) -> list[Table]:
        facts: dict[str, object] = {"checkpoint": self.checkpoint, "steps": self.num_steps}
        if self.metrics:
            facts["metrics"] = describe(self.metrics, self.acceptance_length)
        if self.check is not None:
            facts["check"] = self.check.verdict
        title = FINISHED.format(self.num_steps, self.num_steps) if self.finished_before else "Trained"
        findings = [] if self.check is None else self.check.findings_tables()
        return [*findings, facts_table(title, facts), *([] if self.parity is None else self.parity.tables())]

    def sentence(self) -> str:
        """With what speaks against the drafter: an accuracy that validation does not confirm, a short acceptance."""
        if self.acceptance_length is None:
            return f"trained for {self.num_steps} steps"
        told = f"expected acceptance length {self.acceptance_length:.2f}"
        seen, held_out = (metrics.get(FIRST_ACCURACY) for metrics in (self.train_metrics, self.metrics))
        if seen is not None and held_out is not None and seen - held_out > OVERFITTED:
            told += f"; overfitted: accuracy {seen:.2f} in training, {held_out:.2f} in validation: too few data"
        elif self.acceptance_length < WEAK:
            told += "; a weak drafter, which may well be slower than plain decoding: train on more data"
        return told

    def raise_for_errors(self) -> None:
        """Raises `ParityError` or `CheckError` when the gate or the check at the end of the run failed."""
        for report in (self.parity, self.check):
            if report is not None:
                report.raise_for_errors()


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of a run, by use. `str()` is a sentence."""

    weights_bytes: int
    """Masters, gradients and optimizer moments of the drafter, and its frozen copies of verifier weights."""
    verifier_bytes: int
    states_bytes: int
    """Verifier states of one packed row."""
    activations_bytes: int
    """Drafter activations and one block of logits, for the backward pass."""
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.verifier_bytes + self.states_bytes + self.activations_bytes

    def __str__(self) -> str:
        parts = {
            "drafter and optimizer": self.weights_bytes,
            "verifier": self.verifier_bytes,
            "states": self.states_bytes,
            "activations": self.activations_bytes,
        }
        uses = ", ".join(f"{use} {human_bytes(num_bytes)}" for use, num_bytes in parts.items())
        checkpoint = human_bytes(self.checkpoint_bytes)
        return f"about {human_bytes(self.total_bytes)} of memory: {uses}; {checkpoint} of disk per checkpoint"


def estimate_memory(
    model: SpeculatorModel, *, num_tokens: int, hidden_size: int, num_states: int, num_unrolls: int, verifier_bytes: int
) -> MemoryEstimate:
    """Estimates a run on packed rows of `num_tokens`.

    `num_unrolls`: forwards of the draft layers per row; `num_states`: verifier states kept per token.
    """
    num_trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
    num_frozen = sum(param.numel() for param in model.parameters() if not param.requires_grad)
    num_layers = len(list(model.layers))  # type: ignore[arg-type]
    # A gated decoder layer keeps about 16 vectors of its hidden width for the backward pass, in 16 bits.
    activations = num_tokens * hidden_size * 16 * num_layers * num_unrolls * BYTES_BF16
    return MemoryEstimate(
        weights_bytes=num_trainable * 4 * BYTES_FP32 + num_frozen * BYTES_FP32,
        verifier_bytes=verifier_bytes,
        states_bytes=num_tokens * hidden_size * num_states * BYTES_BF16,
        activations_bytes=activations,
        checkpoint_bytes=num_trainable * 3 * BYTES_FP32 + (num_trainable + num_frozen) * BYTES_BF16,
    )


def refuse_lost(metrics: Mapping[str, float], step: int, lr: float) -> None:
    """Raises `ValueError` when the loss is not finite."""
    if not math.isfinite(metrics.get("loss", 0.0)):
        raise ValueError(
            f"the loss became {metrics['loss']} by step {step}: nothing of it was saved; lower --lr (now {lr}), or "
            "check the verifier states with --hidden-states-dtype float32"
        )


def check_disk_space(path: Path, num_bytes: int) -> None:
    """Raises `OSError` if the disk cannot hold a checkpoint: an error now is cheaper than one after an epoch."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            f"a checkpoint takes {human_bytes(num_bytes)} but {existing} has {human_bytes(free)} free: free some "
            "space, or choose another --output"
        )
