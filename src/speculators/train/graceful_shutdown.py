"""Ends a run between two steps on Ctrl-C or SIGTERM, so that it can save first; a second Ctrl-C does not wait."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal asked training to stop; it saved a checkpoint at `path`."""

    def __init__(self, path: Path, signal_name: str):
        super().__init__(f"stopped by {signal_name}; saved {path}: run the same command to continue from there")
        self.path = path
        self.signal_name = signal_name


class GracefulShutdown:
    """Context manager: the first signal only sets `requested` to its name. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
