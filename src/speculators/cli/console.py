"""Where the command line writes: tables and the JSON line on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape

from speculators.utils.report import WIDTH, facts_table


def out() -> Console:
    """For people: tables and text. Made on each call, so that a redirected stdout is honoured."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def err() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints a line of progress on stderr: stdout holds the result alone."""
    err().print(text)


def say_error(message: str, hint: str | None = None) -> None:
    err().print(f"[bold red]error:[/] {escape(message)}")
    if hint:
        err().print(f"[dim]{escape(hint)}[/]")


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    out().print(facts_table(title, facts))
