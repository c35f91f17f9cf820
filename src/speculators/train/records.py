"""What a `Trainer` is told, and what it answers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.table import Table

from speculators.train.events import describe
from speculators.train.keys import OptimizerKeys, SchedulerKeys, TrainerKeys
from speculators.training_keys import default_of
from speculators.utils.report import TableReport, facts_table

if TYPE_CHECKING:
    from speculators.deploy.report import CheckReport
    from speculators.evaluation.parity import ParityReport


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
    log_freq: int = default_of(TrainerKeys, "log_freq")
    gradient_checkpointing: bool = default_of(TrainerKeys, "gradient_checkpointing")
    max_steps: int | None = None
    train_command: str = ""
    """Written beside each checkpoint, for whoever finds it."""


@dataclass(frozen=True)
class TrainResult(TableReport, os.PathLike[str]):
    """What a run leaves; a path wherever a checkpoint is asked for."""

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

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    def tables(self) -> list[Table]:
        facts: dict[str, object] = {"checkpoint": self.checkpoint, "steps": self.num_steps}
        if self.metrics:
            facts["metrics"] = describe(self.metrics, self.acceptance_length)
        if self.check is not None:
            facts["check"] = self.check.verdict
        findings = [] if self.check is None else self.check.findings_tables()
        return [*findings, facts_table("Trained", facts), *([] if self.parity is None else self.parity.tables())]

    def raise_for_errors(self) -> None:
        """Raises `ParityError` or `CheckError` when the gate or the check at the end of the run failed."""
        for report in (self.parity, self.check):
            if report is not None:
                report.raise_for_errors()
