"""A context manager that may be entered again inside itself: sets up once, restores once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class NestedContext:
    """Calls `set_up` on the first entry and undoes it after the last exit; entries in between are only counted."""

    _num_entered = 0
    _undo: ExitStack

    def set_up(self, stack: ExitStack) -> None:
        """Prepares the object; pushes on the stack what must be undone, also when it fails half way."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self._num_entered == 0:
            with ExitStack() as stack:
                self.set_up(stack)
                self._undo = stack.pop_all()
        self._num_entered += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._num_entered -= 1
        if self._num_entered == 0:
            self._undo.close()
