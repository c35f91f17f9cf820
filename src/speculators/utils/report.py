"""Renders reports as tables, the same ones for a command, `print(report)` and a notebook, and foreign text as text;
says which errors are reports of work that failed, and which of a command that asked for something wrong.

A path, a config value, a row of data or a model's answer may hold control characters, which move the cursor or rewrite
what was printed, and words in brackets, which rich takes for styles. `visible` shows the first escaped, and a
`ReportConsole` does so with everything it prints; brackets are kept by `markup=False` or `rich.markup.escape`.
"""

from __future__ import annotations

import io
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

WIDTH = 120
"""Columns to assume without a terminal."""
CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""Control characters but tab and line feed, marks that reorder text, and halves of surrogate pairs."""
HTML = '<pre style="font-family:monospace;line-height:1.2">{code}</pre>'


def visible(text: str) -> str:
    """Returns the text with what a terminal would obey written out: "\\x1b[2J" for the code that clears the screen."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: Any) -> str:
    """Returns a figure of a report as its table shows it: three digits, parts of several beside each other."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class ReportConsole(Console):
    """A console that shows control characters of what it prints escaped, and takes `:smile:` for what it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Goes on without a word when nobody reads stderr: progress is no reason to lose work. Raises for stdout."""
        self.quiet = True
        if self.stderr:
            discard(sys.stderr)
            return
        raise ReaderGoneError


class ReaderGoneError(Exception):
    """Nobody reads stdout any more: `| head` has read enough."""


def discard(stream: TextIO) -> None:
    """Lets everything that is still written to a standard stream vanish, what is in its buffer included."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class TableReport(ABC):
    """Base of every report. `str()` gives its tables as text, notebooks show them in colour, rich prints them."""

    @abstractmethod
    def tables(self) -> Sequence[Table]:
        """Returns the tables from top to bottom."""

    def sentence(self) -> str:
        """Says in one sentence what came out; empty where the tables say it all."""
        return ""

    def __rich__(self) -> Group:
        return Group(*self.tables())

    def __str__(self) -> str:
        console = ReportConsole(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        console = ReportConsole(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False)
        console.print(self)
        return console.export_html(code_format=HTML, inline_styles=True)


class PathReport(TableReport, os.PathLike[str]):
    """A report of something written; accepted wherever its path is."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Makes a table of two columns, names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(escape(visible(name)), escape(visible(str(value))))
    return table


def human_bytes(num_bytes: float) -> str:
    """Returns a number of bytes for display: "1.5 GB" (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


# -- what an error means for the exit code

WRONG_INPUT, FAILED_WORK = 2, 1
WRONG_INPUT_ERRORS = (
    *(ValueError, NotImplementedError),
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError),
)
"""Before any work: what was asked for, or a path that was named, is wrong."""


class WorkFailedError(ValueError):
    """The work was done, or begun, and its result is a failure."""

    work_had_begun = True


@contextmanager
def work() -> Iterator[None]:
    """Marks errors that leave the block as failures of work that had begun, whatever their type."""
    try:
        yield
    except Exception as error:
        error.work_had_begun = True  # type: ignore[attr-defined]
        raise


def is_first_rank() -> bool:
    """Whether this process reports: of those that torchrun started all have the same results, and the first checks."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def exit_code_of(error: BaseException) -> int:
    """Returns 2 when the command line or what it names was wrong before work began, and 1 when the work failed."""
    begun = getattr(error, "work_had_begun", False)
    return WRONG_INPUT if isinstance(error, WRONG_INPUT_ERRORS) and not begun else FAILED_WORK
