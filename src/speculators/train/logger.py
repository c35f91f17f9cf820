"""Listeners of a training run: the progress bar, drawn from its events, the loss curve in the run directory, and
experiment trackers, `--logger wandb,tensorboard`. Imports only the trackers that are named.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from speculators.train.checkpointer import CURVE_FILE
from speculators.train.config import TrainConfig
from speculators.train.events import (
    ConfigError,
    Event,
    Listener,
    Note,
    Saved,
    Started,
    StepDone,
    Stopped,
    Validated,
    decoded,
    describe,
    pace,
    pace_numbers,
)
from speculators.utils.files import atomic_write
from speculators.utils.names import did_you_mean
from speculators.utils.progress import Lines, SlowStepBars, doing, waiting_line
from speculators.utils.report import ReportConsole

SHOWN_WAITING = 0.01
"""Smaller shares of waiting stand in the log alone, not beside the bar."""


class TrainingProgress(SlowStepBars):
    """A bar with loss, per-step accuracy and expected acceptance length; called with the events of a run."""

    first_step = ""
    """Says what is done until the first report: reading, computing states and, on a GPU, compiling take their time."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.fields[heading]}step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=ReportConsole(stderr=True, soft_wrap=True),
        )
        self.bars: dict[str, TaskID] = {}
        """By the name of a drafter; "" where one is trained alone."""
        self.say, self.waiting = Lines(self.console), ExitStack()
        self.decoded: dict[str, str] = {}
        """Of the newest validation: shown on while training goes on."""

    def of_each(self, num_drafters: int) -> Callable[[str], Listener]:
        """Returns what gives the listener of a drafter by its name, which is shown where there are several."""
        return lambda name: partial(self, name=name if num_drafters > 1 else "")

    def stop(self) -> None:
        self.waiting.close()
        super().stop()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Below the bar: what was learned, in lines of its own, as both together are wider than 80 columns."""
        yield from super().get_renderables()
        if self.first_step and not waiting_line():
            yield Text(f"{self.first_step} ...", "dim")
        yield from (Text(task.description, no_wrap=False, overflow="fold") for task in self.tasks if task.description)

    def __call__(self, event: Event, name: str = "") -> None:
        heading = f"{name}: " if name else ""
        match event:
            case Note():
                self.console.print(heading + event.text, style="dim", markup=False)
            case Started():
                self.first_step = "first step: compiling the attention kernels" if event.compiles else "first step"
                self.waiting.enter_context(doing(self.first_step))
                total, done = event.num_steps, event.first_step
                self.bars[name] = self.add_task("", total=total, completed=done, speed="", heading=heading)
                self.console.print(
                    f"{heading}{event.num_trainable_params:,} parameters, {event.num_documents:,} rows, "
                    f"{event.num_tokens:,} tokens per epoch, {event.num_steps} steps"
                )
            case StepDone():
                self.first_step = ""
                self.waiting.close()
                told = describe(event.metrics, event.acceptance_length) + self.decoded.get(name, "")
                waiting = f", {event.waiting:.0%} waiting for states" if event.waiting >= SHOWN_WAITING else ""
                speed = f"{event.tokens_per_s:,.0f} tokens/s"
                self.update(self.bars[name], completed=event.step, description=heading + told + waiting, speed=speed)
                line = f"{heading}step {event.step}/{event.num_steps}: {told}, {pace(event)}"
                self.say(line, at_once=event.is_logged)
            case Validated():
                self.decoded[name] = decoded(event.metrics)
                line = describe(event.metrics, event.acceptance_length)
                self.console.print(f"{heading}epoch {event.epoch}, step {event.step}, validation: {line}")
            case Saved():
                self.console.print(f"saved {event.path}", style="dim", markup=False)
            case Stopped():
                self.console.print(
                    f"{event.signal_name}: saved {event.path}; the same command continues from there", markup=False
                )


class CurveFile:
    """Writes the loss curve to `metrics.jsonl`: one line per report of training steps and per validation.

    A continued run drops the lines past the checkpoint that it continues from, so each step stands there once.
    """

    def __init__(self, run_directory: str | Path):
        self.path = Path(run_directory) / CURVE_FILE

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.keep_until(event.first_step)
            case StepDone():
                self.append(event, "train", lr=event.lr, **pace_numbers(event))
            case Validated():
                self.append(event, "val")

    def keep_until(self, step: int) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        with atomic_write(self.path, "w") as file:
            file.writelines(f"{line}\n" for line in lines if 0 < step_of(line) <= step)

    def append(self, event: StepDone | Validated, split: str, **more: float) -> None:
        values = {**event.metrics, "acceptance_length": event.acceptance_length, **more}
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": event.step, "epoch": event.epoch, "split": split, **finite}) + "\n")


def step_of(line: str) -> int:
    """The step of a line of the curve; 0 for one that a dead process left half written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


Log = Callable[[dict[str, float], int], None]


def wandb_log(module: Any, log_dir: str, run_name: str | None, settings: dict[str, Any]) -> Log:
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    run = module.init(project="speculators", name=run_name, dir=log_dir, config=settings)
    return lambda values, step: run.log(values, step=step)


def trackio_log(module: Any, log_dir: str, run_name: str | None, settings: dict[str, Any]) -> Log:
    run = module.init(project="speculators", name=run_name, config=settings)
    return lambda values, step: run.log(values, step=step)


def tensorboard_log(module: Any, log_dir: str, run_name: str | None, settings: dict[str, Any]) -> Log:
    writer = module.SummaryWriter(str(Path(log_dir) / (run_name or "")))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def mlflow_log(module: Any, log_dir: str, run_name: str | None, settings: dict[str, Any]) -> Log:
    module.start_run(run_name=run_name)
    module.log_params({key: str(value)[:250] for key, value in settings.items()})
    return lambda values, step: module.log_metrics(values, step=step)


TRACKERS: dict[str, tuple[str, Callable[..., Log]]] = {
    "trackio": ("trackio", trackio_log),
    "wandb": ("wandb", wandb_log),
    "tensorboard": ("torch.utils.tensorboard", tensorboard_log),
    "mlflow": ("mlflow", mlflow_log),
}


def trackers_of(configs: Sequence[TrainConfig]) -> list[list[Listener]]:
    """The trackers that configs name, for each of them; several drafters share one run in which each has a heading."""
    keys = configs[0].logging
    if len(configs) == 1:
        return [make_trackers(keys.logger, keys.log_dir, keys.run_name, configs[0].flatten())]
    settings = {f"{config.speculator_type}.{k}": v for config in configs for k, v in config.flatten().items()}
    logs = make_logs(keys.logger, keys.log_dir, keys.run_name, settings)
    return [[as_listener(log, f"{config.speculator_type}/") for log in logs] for config in configs]


def make_trackers(names: str, log_dir: str, run_name: str | None, settings: dict[str, Any]) -> list[Listener]:
    """Makes a listener for each name of a comma-separated list. Raises `ConfigError` for an unknown or missing one."""
    return [as_listener(log) for log in make_logs(names, log_dir, run_name, settings)]


def make_logs(names: str, log_dir: str, run_name: str | None, settings: dict[str, Any]) -> list[Log]:
    return [make_log(name.strip(), log_dir, run_name, settings) for name in names.split(",") if name.strip()]


def make_log(name: str, log_dir: str, run_name: str | None, settings: dict[str, Any]) -> Log:
    if name not in TRACKERS:
        known = ", ".join(TRACKERS)
        raise ConfigError(f"--logger {name} is unknown.{did_you_mean(name, TRACKERS)} Known trackers: {known}")
    module_name, make = TRACKERS[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"--logger {name} needs a package that is not installed: pip install {name}") from error
    return make(module, log_dir, run_name, settings)


def as_listener(log: Log, heading: str = "") -> Listener:
    def listen(event: Event) -> None:
        if isinstance(event, StepDone | Validated):
            prefix = heading + ("train" if isinstance(event, StepDone) else "val")
            values = {f"{prefix}/{key}": value for key, value in event.metrics.items()}
            if event.acceptance_length is not None:
                values[f"{prefix}/acceptance_length"] = event.acceptance_length
            if isinstance(event, StepDone):
                measured = {"lr": event.lr, **pace_numbers(event)}
                values |= {f"{prefix}/{key}": value for key, value in measured.items()}
            log(values, event.step)

    return listen
