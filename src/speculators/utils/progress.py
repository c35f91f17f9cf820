"""Progress bars: draws ours on request, keeps transformers and the hub from drawing theirs and from giving notices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text
from transformers.utils import logging

from speculators.utils.report import ReportConsole

Progress = Callable[[str, int, "int | None"], None]
"""Called with (name of the step, amount done, total amount or None)."""
TOKENS_PER_UPDATE = 16
"""A bar is moved so often: drawing it ten times per second is a thread's work, counting is the decoder's."""


class HasTokens(Protocol):
    """An event of decoding."""

    @property
    def token_ids(self) -> Sequence[int]: ...


class RateColumn(ProgressColumn):
    """How much was done per second, since the bar began; where tokens are counted: how many, and their rate."""

    def __init__(self, work: WorkProgress) -> None:
        super().__init__()
        self.work = work

    def render(self, task: Task) -> Text:
        num_tokens = self.work.num_tokens
        rate = (num_tokens or task.completed) / task.elapsed if task.elapsed else 0.0
        if num_tokens:
            return Text(f"{num_tokens:,} tokens {rate:,.0f}/s")
        return Text(f"{rate:.1f}/s" if rate else "")


class WorkProgress:
    """One bar on stderr per kind of work. Itself a `Progress`. Where decoding is followed by `count_tokens`, the bar
    and its remaining time advance with tokens, between two finished answers too."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.tokens_when_done = (0, 0)
        """(items done, tokens when the last of them was done): what an item takes."""
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[done]}/{task.fields[all]}"),
            RateColumn(self),
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
            self.bar_of[what] = self.bars.add_task(what, total=total, done=0, all=total)
        if done > self.tokens_when_done[0]:
            self.tokens_when_done = (done, self.num_tokens)
        self.bars.update(self.bar_of[what], completed=done, total=total, done=done, all="?" if total is None else total)

    def count_tokens(self, event: HasTokens) -> None:
        """Follows an engine's events."""
        self.num_tokens += len(event.token_ids)
        done, num_tokens = self.tokens_when_done
        if done and len(self.bar_of) == 1 and self.num_tokens % TOKENS_PER_UPDATE < len(event.token_ids):
            (bar,) = self.bar_of.values()
            ahead = (self.num_tokens - num_tokens) * done / max(num_tokens, 1)
            total = self.bars.tasks[0].total
            self.bars.update(bar, completed=done + ahead if total is None else min(done + ahead, total))


def token_counter(progress: bool | Progress | None) -> Callable[[HasTokens], None] | None:
    """What an engine is given as `on_token`: bars count, a caller's own function does not."""
    return progress.count_tokens if isinstance(progress, WorkProgress) else None


@contextmanager
def reporting(progress: bool | Progress | None) -> Iterator[Progress]:
    """Yields the function to report to: bars for True, nothing for False or None, else the caller's own."""
    bars = WorkProgress() if progress is True else progress
    if isinstance(bars, WorkProgress):
        with bars:
            yield bars
    else:
        yield bars or (lambda what, done, total: None)


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
