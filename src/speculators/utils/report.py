"""Renders reports as tables, the same ones for a command, `print(report)` and a notebook."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

WIDTH = 120
"""Columns to assume without a terminal."""
HTML = '<pre style="font-family:monospace;line-height:1.2">{code}</pre>'


class TableReport(ABC):
    """Base of every report. `str()` gives its tables as text, notebooks show them in colour, rich prints them."""

    @abstractmethod
    def tables(self) -> Sequence[Table]:
        """Returns the tables from top to bottom."""

    def __rich__(self) -> Group:
        return Group(*self.tables())

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, highlight=False, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, highlight=False, record=True, force_jupyter=False)
        console.print(self)
        return console.export_html(code_format=HTML, inline_styles=True)


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Makes a table of two columns, names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    return table
