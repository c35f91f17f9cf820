"""Progress bars: draws ours on request, keeps transformers and the hub from drawing theirs and from giving notices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text
from transformers.utils import logging

from speculators.utils.report import ReportConsole

Progress = Callable[[str, int, "int | None"], None]
"""Called with (name of the step, amount done, total amount or None)."""


class RateColumn(ProgressColumn):
    """How much was done per second, since the bar began."""

    def render(self, task: Task) -> Text:
        rate = task.completed / task.elapsed if task.completed and task.elapsed else 0.0
        return Text(f"{rate:.1f}/s" if rate else "")


class WorkProgress:
    """One bar on stderr per kind of work. Itself a `Progress`."""

    def __init__(self) -> None:
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=ReportConsole(stderr=True, soft_wrap=True),
        )
        self.bar_of: dict[str, TaskID] = {}

    def __enter__(self) -> WorkProgress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what not in self.bar_of:
            self.bar_of[what] = self.bars.add_task(what, total=total)
        self.bars.update(self.bar_of[what], completed=done, total=total)


@contextmanager
def reporting(progress: bool | Progress | None) -> Iterator[Progress]:
    """Yields the function to report to: bars for True, nothing for False or None, else the caller's own."""
    if progress is True:
        with WorkProgress() as bars:
            yield bars
    else:
        yield progress or (lambda what, done, total: None)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turns progress bars of loading and downloading off inside the block, or in a function that it decorates."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # the hub's too
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def no_notices() -> Iterator[None]:
    """Turns transformers' notices and Python's warnings off inside the block, or in a function that it decorates."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
