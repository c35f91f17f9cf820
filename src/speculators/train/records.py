"""What a `Trainer` is told, and what it answers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.table import Table

from speculators.train.events import describe
from speculators.utils.report import TableReport, facts_table

if TYPE_CHECKING:
    from speculators.deploy.report import CheckReport
    from speculators.evaluation.parity import ParityReport


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
