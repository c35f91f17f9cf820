"""Reports a training run: events while it runs, their lines of text, and the error for wrong settings.

The run itself prints nothing: consoles, trackers and tests listen through `on_event`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from speculators.utils.report import WRONG_INPUT, human_bytes


class ConfigError(ValueError):
    """A flag, a YAML key or a combination of them is wrong. The command line exits with `exit_code`."""

    exit_code = WRONG_INPUT


@dataclass(frozen=True)
class Note:
    """A message for a person: a choice made, rows left out, the checkpoint that the run continues from."""

    text: str


@dataclass(frozen=True)
class Started:
    """The run is about to take its first step."""

    num_steps: int
    """Optimizer steps of the whole run."""
    first_step: int
    """Steps that the continued run has done; 0 for a new run."""
    num_trainable_params: int
    num_documents: int
    num_tokens: int
    """Tokens of the training split, per epoch."""
    compiles: bool = False
    """Whether the first step compiles kernels."""


@dataclass(frozen=True)
class StepDone:
    """Metrics since the last such event (every `log_freq` and every `log_every` steps)."""

    step: int
    num_steps: int
    epoch: int
    lr: float
    metrics: dict[str, float]
    acceptance_length: float | None
    """Expected tokens per round, from the drafter's accuracy on training data; None when it is not reported."""
    tokens_per_s: float
    waiting: float = 0.0
    """Share of the time that was spent waiting for verifier states."""
    left_s: float | None = None
    """Estimated time to the last step, validations and checkpoints included; None at the first report."""
    peak_bytes: int = 0
    """Most memory that this process had so far: of the GPU, or on a CPU of the whole process."""
    model_tflop_per_s: float | None = None
    """Model FLOPs per second of this rank (`nn.flops`), in 10^12; None where the algorithm counts none."""
    mfu: float | None = None
    """Their share of the card's peak; None where that is not known."""
    is_logged: bool = False
    """Whether `log_every` asks for a line where there is no terminal."""


@dataclass(frozen=True)
class Validated:
    """Metrics on the validation split."""

    step: int
    epoch: int
    metrics: dict[str, float]
    acceptance_length: float | None


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

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
    """A listener that does nothing."""


def telling(listeners: Sequence[Listener]) -> Listener:
    """One listener for several."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


def as_notes(listener: Listener) -> Callable[[str], None]:
    """A function that says a line to a listener."""
    return lambda text: listener(Note(text))


DECODED = "decoded_acceptance_length"
"""Metric of a validation that decoded prompts: tokens per round, counted."""
STEP_ACCURACY = re.compile(r"full_acc_(\d+)")
"""Metric of one unrolled step: the share of positions whose drafts are right up to and including this step."""


def print_event(event: Event) -> None:
    """A listener that prints each event as a line to stderr."""
    print(line(event), file=sys.stderr, flush=True)


def printing(name: str) -> Listener:
    """Prints the events of one of several drafters."""
    return lambda event: print(f"{name}: {line(event)}", file=sys.stderr, flush=True)


def line(event: Event) -> str:
    """Returns an event as one line of text."""
    match event:
        case Note(text):
            return text
        case Started():
            return (
                f"{event.num_documents} documents of {event.num_tokens} tokens, {event.num_trainable_params:,} "
                f"trainable parameters, steps {event.first_step}..{event.num_steps}"
            )
        case StepDone():
            step = f"step {event.step}/{event.num_steps} epoch {event.epoch}"
            return f"{step} {numbers(event)} lr {event.lr:.2e} {pace(event)}"
        case Validated():
            return f"validation after step {event.step}: {numbers(event)}"
        case Saved(path, _):
            return f"saved {path}"
        case Stopped(path, signal_name):
            return f"{signal_name}: saved {path}"


PACE = ("tokens_per_s", "waiting", "left_s", "peak_bytes", "model_tflop_per_s", "mfu")
"""Fields of `StepDone` that say what steps cost, not what they learn: another run of the same bits has others."""


def pace(event: StepDone) -> str:
    """Returns speed, arithmetic, waiting, what is left and memory, as far as they are known, for a line."""
    parts = [f"{event.tokens_per_s:,.0f} tokens/s"]
    parts += [] if event.model_tflop_per_s is None else [arithmetic(event.model_tflop_per_s, event.mfu)]
    parts.append(f"{event.waiting:.0%} waiting for states")
    parts += [] if event.left_s is None else [f"{timedelta(seconds=round(event.left_s))} left"]
    parts += [f"peak {human_bytes(event.peak_bytes)}"] if event.peak_bytes else []
    return ", ".join(parts)


def arithmetic(model_tflop_per_s: float, mfu: float | None) -> str:
    share = "" if mfu is None else f" (MFU {mfu:.1%})"
    return f"{model_tflop_per_s:.3g} model TFLOP/s{share}"


def pace_numbers(event: StepDone) -> dict[str, float]:
    """Returns what curves and trackers get of it."""
    values = {name: getattr(event, name) for name in PACE}
    return {name: value for name, value in values.items() if value is not None and (value or name != "peak_bytes")}


def numbers(event: StepDone | Validated) -> str:
    length = "" if event.acceptance_length is None else f" acceptance length {event.acceptance_length:.2f}"
    return f"loss {event.metrics.get('loss', float('nan')):.4f}{length}{decoded(event.metrics)}"


def decoded(metrics: Mapping[str, float]) -> str:
    """Returns the decoded acceptance length as the end of a line; nothing where nothing was decoded."""
    return f", decoded {metrics[DECODED]:.2f}" if DECODED in metrics else ""


def describe(metrics: dict[str, float], acceptance_length: float | None) -> str:
    """Returns the loss, accuracy by unrolled step, expected and decoded acceptance length that the event has."""
    parts = [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
    accuracies = {int(name[1]): value for key, value in metrics.items() if (name := STEP_ACCURACY.fullmatch(key))}
    if accuracies:
        parts.append("accuracy " + " ".join(f"{accuracies[step]:.2f}" for step in sorted(accuracies)))
    if acceptance_length is not None:
        parts.append(f"expected acceptance length {acceptance_length:.2f}")
    return ", ".join(parts) + decoded(metrics)
