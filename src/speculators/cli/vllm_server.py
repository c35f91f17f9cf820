"""Finds vLLM and runs its server in the foreground, for `serve` and `launch-vllm`, and defines the flags of both."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from speculators.cli.shared import err, out, say

if TYPE_CHECKING:
    from speculators.deploy.process import VllmEnvironment
    from speculators.deploy.serve import Launch

READY_TIMEOUT_S = 1800.0
"""Loading and compiling a model of hundreds of billions of parameters takes many minutes."""
WAIT_NOTE_S = 10.0
"""How often the wait is reported where there is no terminal to draw in."""

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command and exit.")]
ReadyTimeout = Annotated[float, typer.Option(min=1, help="Seconds the server may take to become healthy.")]


def vllm_environment(python: str | None, dry_run: bool) -> VllmEnvironment | None:
    """None only in a dry run without vLLM: the command is then for another machine."""
    from speculators.deploy.process import TESTED_VERSION, find_vllm

    try:
        found = find_vllm(python)
    except ValueError as error:
        if not dry_run or python is not None:
            raise
        say(str(error), "dim")
        return None
    if not found.is_tested_version:
        say(f"vLLM {found.version} in {found.python}; checkpoints were tested with {TESTED_VERSION}", "yellow")
    return found


def start(
    launch: Launch, result: dict[str, Any], found: VllmEnvironment | None, dry_run: bool, ready_timeout_s: float
) -> dict[str, Any]:
    """Print the command, or run it until Ctrl-C or SIGTERM."""
    result |= {
        "command": list(launch.command),
        "endpoint": launch.endpoint,
        "vllm": found.version if found else None,
        "dry_run": dry_run,
    }
    if dry_run:
        out().print(shlex.join(launch.command), soft_wrap=True, markup=False)
        return result
    from speculators.deploy.serve import run_server

    say(shlex.join(launch.command), "dim")
    with WaitLine() as line:
        signal_name = run_server(
            launch,
            ready_timeout_s=ready_timeout_s,
            on_line=line.forward,
            on_wait=line.wait,
            on_ready=lambda seconds: line.ready(seconds, launch.endpoint),
        )
    say(f"{signal_name}: the server and its workers have ended")
    return {**result, "stopped_by": signal_name}


class WaitLine:
    """The server's log on stderr, and below it how long it has been starting."""

    def __init__(self) -> None:
        self.console = err()
        self.status = self.console.status("starting vLLM")
        self.next_note_s = WAIT_NOTE_S

    def __enter__(self) -> WaitLine:
        if self.console.is_terminal:
            self.status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.status.stop()

    def forward(self, line: str) -> None:
        self.console.print(line, markup=False)

    def wait(self, seconds: float, last_line: str) -> None:
        if self.console.is_terminal:
            self.status.update(f"waiting for vLLM: {seconds:.0f} s")
        elif seconds >= self.next_note_s:
            self.next_note_s += WAIT_NOTE_S
            self.console.print(f"waiting for vLLM: {seconds:.0f} s")

    def ready(self, seconds: float, endpoint: str | None) -> None:
        self.status.stop()
        self.console.print(f"[bold]ready[/] after {seconds:.0f} s: {escape(str(endpoint))}")
