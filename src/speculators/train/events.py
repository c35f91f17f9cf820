"""What a training run tells while it runs. Consoles, loggers and tests listen through `on_event`; nothing prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Note:
    """Something a person should read: a choice made, rows left out, a checkpoint continued from."""

    text: str


@dataclass(frozen=True)
class Started:
    num_steps: int
    """Optimizer steps of the whole run."""
    first_step: int
    """Steps already done by the run this one continues; 0 for a new one."""
    num_trainable_params: int
    num_documents: int
    num_tokens: int
    """Tokens of the training split, one epoch."""


@dataclass(frozen=True)
class StepDone:
    """Metrics since the last such event (every `log_freq` steps)."""

    step: int
    num_steps: int
    epoch: int
    lr: float
    metrics: dict[str, float]
    acceptance_length: float | None
    """Expected tokens a round, from the drafter's accuracy on training data; None when the algorithm reports none."""
    tokens_per_s: float


@dataclass(frozen=True)
class Validated:
    step: int
    epoch: int
    metrics: dict[str, float]
    acceptance_length: float | None


@dataclass(frozen=True)
class Saved:
    path: Path
    step: int


@dataclass(frozen=True)
class Stopped:
    """A signal ended the run early; the checkpoint at `path` continues it."""

    path: Path
    signal_name: str


Event = Note | Started | StepDone | Validated | Saved | Stopped
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener that does nothing."""
