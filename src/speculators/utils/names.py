"""Finds the name nearest to an unknown one, for error messages; imports the names of a package on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Returns the option most like `name`, or None when nothing is near."""
    options = sorted(options)
    by_lower = {option.lower(): option for option in options}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    matches = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" to append to a message; an empty string when nothing is near."""
    guess = nearest(name, options)
    return f" Did you mean '{guess}'?" if guess else ""


def lazy_attributes(package: str, module_of: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a package that imports each public name on first use.

    `module_of`: name -> module below the package that defines it. Unknown names raise `AttributeError`.
    """

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return get, lambda: sorted(module_of)
