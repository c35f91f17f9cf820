"""Verbs made of other verbs: each step is a command line of this program, shown and then run in this process."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from typing import Any

from speculators.cli.app import Interrupted, perform
from speculators.cli.shared import out, show


def run_step(number: int, title: str, command: Sequence[str], kept: str) -> tuple[dict[str, Any], str]:
    """Shows and runs a step. Returns its record, with the seconds it took as `time_s`, and its sentence.

    `kept`: where the work of a stopped run stays, which Ctrl-C says. Errors of the step travel to the caller.
    """
    out().rule(f"[bold]{number} {title}", align="left")
    out().print(f"$ speculators {shlex.join(command)}", style="cyan", markup=False, soft_wrap=True)
    begun_s = time.perf_counter()
    try:
        result = perform(command)
    except (KeyboardInterrupt, Interrupted) as stop:
        raise KeyboardInterrupt(
            f"stopped in step {number}: what was done is kept in {kept}; the same command goes on from there"
        ) from stop
    show(result, is_last=False)
    if isinstance(result.error, KeyboardInterrupt):
        raise KeyboardInterrupt(f"{result.error}, and goes on from step {number}") from result.error
    if result.error is not None:
        raise result.error
    return {**result.record, "time_s": time.perf_counter() - begun_s}, result.sentence
