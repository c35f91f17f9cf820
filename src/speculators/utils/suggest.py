"""The nearest name, for error messages about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, or None when nothing is near."""
    options = sorted(options)
    by_lower = {option.lower(): option for option in options}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    matches = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The words " Did you mean 'x'?" to append to a message; empty when nothing is near."""
    guess = nearest(name, options)
    return f" Did you mean '{guess}'?" if guess else ""
