"""The progress bar of a training run, drawn from its events."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from speculators.train.events import Event, Note, Saved, Started, StepDone, Stopped, Validated, describe


class TrainingProgress(Progress):
    """A bar with loss, per-step accuracy and expected acceptance length; called with the events of a run."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False, soft_wrap=True),
        )
        self.bar: TaskID | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Note():
                self.console.print(f"[dim]{event.text}[/]")
            case Started():
                self.bar = self.add_task("starting", total=event.num_steps, completed=event.first_step)
                self.console.print(
                    f"{event.num_trainable_params:,} parameters, {event.num_documents:,} rows, "
                    f"{event.num_tokens:,} tokens an epoch, {event.num_steps} steps"
                )
            case StepDone():
                assert self.bar is not None
                self.update(
                    self.bar, completed=event.step, description=describe(event.metrics, event.acceptance_length)
                )
            case Validated():
                line = describe(event.metrics, event.acceptance_length)
                self.console.print(f"epoch {event.epoch + 1}, step {event.step}, validation: {line}")
            case Saved():
                self.console.print(f"[dim]saved {event.path}[/]")
            case Stopped():
                self.console.print(f"{event.signal_name}: saved {event.path}; the same command continues from there")
