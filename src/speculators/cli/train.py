"""`speculators train`: the configuration reads its own flags; here are only the progress bar and the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from speculators.cli.console import err, print_facts, say
from speculators.train.config import TrainConfig

if TYPE_CHECKING:
    from speculators.train.events import Event

STEP_ACCURACY = "full_acc_"
"""Metric of one unrolled step: the share of positions whose drafts are right up to and including this step."""


def train(context: typer.Context) -> dict[str, Any]:
    config = TrainConfig.resolve(context.args)
    say(f"training {config.speculator_type} for {config.verifier.verifier_name_or_path}")

    from speculators.cli.check import show_findings
    from speculators.cli.verify import print_report
    from speculators.deploy.report import CheckError
    from speculators.evaluation.parity import ParityError
    from speculators.train.run import train as run_training

    with TrainingProgress() as progress:
        result = run_training(config, on_event=progress)
    facts: dict[str, Any] = {"checkpoint": result.checkpoint, "steps": result.num_steps}
    if result.metrics:
        facts["metrics"] = describe(result.metrics, result.acceptance_length)
    check, parity = result.check, result.parity
    if check is not None:
        show_findings(check)
        facts["check"] = check.verdict
    print_facts("Trained", facts)
    if parity is not None:
        print_report(parity)
        if not parity.passed:
            raise ParityError(parity)
    if check is not None and not check.ok:
        raise CheckError(check)
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


def describe(metrics: dict[str, float], acceptance_length: float | None) -> str:
    parts = [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
    accuracies = {int(key.removeprefix(STEP_ACCURACY)): value for key, value in metrics.items() if is_accuracy(key)}
    if accuracies:
        parts.append("accuracy " + " ".join(f"{accuracies[step]:.2f}" for step in sorted(accuracies)))
    if acceptance_length is not None:
        parts.append(f"expected acceptance length {acceptance_length:.2f}")
    return ", ".join(parts)


def is_accuracy(key: str) -> bool:
    return key.startswith(STEP_ACCURACY) and key.removeprefix(STEP_ACCURACY).isdigit()
