"""`speculators train`: the configuration reads its own flags; here are only the progress bar and the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from speculators.cli.console import err, out, say
from speculators.train.config import TrainConfig
from speculators.train.events import describe

if TYPE_CHECKING:
    from speculators.train.events import Event


def train(context: typer.Context) -> dict[str, Any]:
    config = TrainConfig.resolve(context.args)
    say(f"training {config.speculator_type} for {config.verifier.verifier_name_or_path}")

    from speculators.train.run import train as run_training

    with TrainingProgress() as progress:
        result = run_training(config, on_event=progress)
    out().print(result)
    result.raise_for_errors()
    check, parity = result.check, result.parity
    return {
        "verb": "train",
        "speculator_type": config.speculator_type,
        "checkpoint": str(result.checkpoint),
        "num_steps": result.num_steps,
        "acceptance_length": result.acceptance_length,
        "metrics": result.metrics,
        "check": None if check is None else check.as_dict(),
        "parity": None if parity is None else {"passed": parity.passed, "checks": parity.facts()},
    }


class TrainingProgress(Progress):
    """A bar with loss, per-step accuracy and expected acceptance length; called with the events of a run."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err(),
        )
        self.bar: TaskID | None = None

    def __call__(self, event: Event) -> None:
        from speculators.train import events

        match event:
            case events.Note():
                self.console.print(f"[dim]{event.text}[/]")
            case events.Started():
                self.bar = self.add_task("starting", total=event.num_steps, completed=event.first_step)
                self.console.print(
                    f"{event.num_trainable_params:,} parameters, {event.num_documents:,} rows, "
                    f"{event.num_tokens:,} tokens an epoch, {event.num_steps} steps"
                )
            case events.StepDone():
                assert self.bar is not None
                self.update(
                    self.bar, completed=event.step, description=describe(event.metrics, event.acceptance_length)
                )
            case events.Validated():
                line = describe(event.metrics, event.acceptance_length)
                self.console.print(f"epoch {event.epoch + 1}, step {event.step}, validation: {line}")
            case events.Saved():
                self.console.print(f"[dim]saved {event.path}[/]")
            case events.Stopped():
                self.console.print(f"{event.signal_name}: saved {event.path}; the same command continues from there")
