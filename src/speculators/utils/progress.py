"""Progress: draws bars on request, says what slow steps do (loading, compiling) where a command listens, and keeps
transformers and the hub from drawing their bars and from giving notices."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.status import Status
from rich.text import Text
from transformers.utils import logging

from speculators.utils.report import ReportConsole

Progress = Callable[[str, int, "int | None"], None]
"""Called with (name of the step, amount done, total amount or None)."""
TOKENS_PER_UPDATE = 16
"""A bar is moved so often: drawing it ten times per second is a thread's work, counting is the decoder's."""


Items = TypeVar("Items")
Answers = TypeVar("Answers", bound=Sequence[Any])

FIRST_LINE_S, NEXT_LINES_S = 3.0, 30.0
"""Without a terminal a slow step is a line after so long, and again each time that so long passed."""
SPINNER_AFTER_S, REDRAWN_S = 0.5, 0.2
"""What is quick shows no spinner."""


class Waiting:
    """Tells people, while a command runs, what it is doing: a spinner on a terminal, under the bar where there is one,
    and a plain line every so often elsewhere. Libraries and tests say nothing: nobody listens."""

    listener: ClassVar[Waiting | None] = None

    def __init__(self) -> None:
        self.steps: list[str] = []
        """What is being done, the innermost last."""
        self.num_bars = 0
        self.console = ReportConsole(stderr=True, soft_wrap=True)

    def line(self) -> str:
        """The innermost step; a thread that draws may ask while it ends."""
        return "".join(f"{what} ..." for what in self.steps[-1:])

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        self.steps.append(what)
        try:
            with self.spinner() if self.console.is_terminal else self.lines():
                yield
        finally:
            self.steps.pop()

    @contextmanager
    def spinner(self) -> Iterator[None]:
        if self.num_bars or len(self.steps) > 1:  # a bar, or the spinner around this one, shows the line
            yield
            return
        status, starting = Status("", console=self.console), [True]

        def draw(waited_s: float) -> None:
            status.update(Text(self.line()))
            if starting:
                starting.clear()
                status.start()

        try:
            with repeating(SPINNER_AFTER_S, REDRAWN_S, draw):
                yield
        finally:
            status.stop()

    @contextmanager
    def lines(self) -> Iterator[None]:
        what = self.line()

        def say(waited_s: float) -> None:
            self.console.print(f"{what} ({waited_s:.0f} s)", markup=False)

        with repeating(FIRST_LINE_S, NEXT_LINES_S, say):
            yield


@contextmanager
def listening() -> Iterator[None]:
    """Inside, slow steps are told to people."""
    before, Waiting.listener = Waiting.listener, Waiting.listener or Waiting()
    try:
        yield
    finally:
        Waiting.listener = before


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Says that a slow step is being done, where a command listens. Also decorates functions."""
    if Waiting.listener is None:
        yield
        return
    with Waiting.listener.step(what):
        yield


def waiting_line() -> str:
    """The slow step that is being done; empty without one."""
    return "" if Waiting.listener is None else Waiting.listener.line()


@contextmanager
def repeating(first_s: float, next_s: float, call: Callable[[float], None]) -> Iterator[None]:
    """Calls with the seconds waited, in a thread, after `first_s` and then every `next_s`, until the block ends."""
    over, begun_s = threading.Event(), time.perf_counter()

    def repeat() -> None:
        wait_s = first_s
        while not over.wait(wait_s):
            call(time.perf_counter() - begun_s)
            wait_s = next_s

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class HasTokens(Protocol):
    """An event of decoding."""

    @property
    def token_ids(self) -> Sequence[int]: ...


class RateColumn(ProgressColumn):
    """How much was done per second, since the bar began; where tokens are counted: how many, and their rate."""

    def render(self, task: Task) -> Text:
        num_tokens = task.fields.get("tokens", 0)
        rate = (num_tokens or task.completed) / task.elapsed if task.elapsed else 0.0
        if num_tokens:
            return Text(f"{num_tokens:,} tokens {rate:,.0f}/s")
        return Text(f"{rate:.1f}/s" if rate else "")


class SlowStepBars(Bars):
    """Bars with the slow step that is being done below them, in place of its spinner."""

    def start(self) -> None:
        if Waiting.listener is not None:
            Waiting.listener.num_bars += 1
        super().start()

    def stop(self) -> None:
        super().stop()
        if Waiting.listener is not None:
            Waiting.listener.num_bars -= 1

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if waiting_line():
            yield Text(waiting_line(), "dim")


class Lines:
    """Where no bar is drawn, as stderr is no terminal: a line every so often, and those that are asked for."""

    def __init__(self, console: Console) -> None:
        self.console, self.said_s = console, time.perf_counter()

    def __call__(self, line: str, *, at_once: bool = False) -> None:
        is_due = at_once or time.perf_counter() - self.said_s >= NEXT_LINES_S
        if not self.console.is_terminal and is_due:
            self.said_s = time.perf_counter()
            self.console.print(line, markup=False)


class WorkProgress:
    """One bar on stderr per kind of work. Itself a `Progress`. Where decoding is followed by `count_tokens`, the bar
    and its remaining time advance with tokens, between two finished answers too."""

    def __init__(self) -> None:
        self.num_tokens = 0
        """Of the newest bar."""
        self.tokens_when_done = (0, 0)
        """(items done, tokens when the last of them was done): what an item takes."""
        self.lock = threading.Lock()
        self.bars = SlowStepBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[done]}/{task.fields[all]}"),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=ReportConsole(stderr=True, soft_wrap=True),
        )
        self.bar_of: dict[str, TaskID] = {}
        self.say = Lines(self.bars.console)

    def __enter__(self) -> WorkProgress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what not in self.bar_of:
            self.bar_of[what] = self.bars.add_task(what, total=total, done=0, all=total)
            self.num_tokens, self.tokens_when_done = 0, (0, 0)
        if done > self.tokens_when_done[0]:
            self.tokens_when_done = (done, self.num_tokens)
        of, bar = "?" if total is None else total, self.bar_of[what]
        self.bars.update(bar, completed=done, total=total, done=done, all=of, tokens=self.num_tokens)
        self.say(f"{what}: {done} of {of}" + (f", {self.num_tokens:,} tokens" if self.num_tokens else ""))

    def count_tokens(self, event: HasTokens) -> None:
        """Follows an engine's events, or the answers of servers, from any thread."""
        self.add_tokens(len(event.token_ids))

    def add_tokens(self, num_new: int) -> None:
        """Counts tokens for the newest bar."""
        with self.lock:
            self.num_tokens += num_new
        if not self.bar_of or self.num_tokens % TOKENS_PER_UPDATE >= num_new:
            return
        task = self.bars.tasks[-1]
        done, num_tokens = self.tokens_when_done
        completed = task.completed
        if done:
            ahead = (self.num_tokens - num_tokens) * done / max(num_tokens, 1)
            completed = done + ahead if task.total is None else min(done + ahead, task.total)
        self.bars.update(task.id, completed=completed, tokens=self.num_tokens)


def counting(generate: Callable[[Items], Answers], progress: bool | Progress | None) -> Callable[[Items], Answers]:
    """A function that answers as `generate` does, and whose tokens the bars count."""
    if not isinstance(progress, WorkProgress):
        return generate
    count = progress.count_tokens

    def counted(questions: Items) -> Answers:
        answers = generate(questions)
        for answer in answers:
            if hasattr(answer, "token_ids"):  # else an error
                count(answer)
        return answers

    return counted


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
