"""Finds the name nearest to an unknown one, for error messages; imports the names of a package on first use."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol


class NamedModel(Protocol):
    """A model of transformers, as far as its name goes."""

    @property
    def name_or_path(self) -> str | None: ...


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


def exported_classes(package_path: Iterable[str]) -> dict[str, str]:
    """Returns class name -> the package below `package_path` that exports it, read without importing any of them."""
    packages = [module for module in pkgutil.iter_modules(package_path) if module.ispkg]
    return {
        name: package.name
        for package in packages
        for folder in package_path
        for name in names_in_all(Path(folder) / package.name / "__init__.py")
        if name[0].isupper()
    }


def names_in_all(file: Path) -> list[str]:
    """Returns what a file's `__all__ = [...]` lists; nothing where the file or the list is missing."""
    for statement in ast.parse(file.read_text()).body if file.is_file() else []:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    return []


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises `ValueError` for the first unknown name, and suggests the nearest known one."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}")


def refuse_option(name: str) -> str:
    """Returns a model's name as it is. Raises `ValueError` where a command that is given the name would read an option
    or several lines: names come from checkpoints that other people wrote."""
    if name.startswith("-") or not name.isprintable():
        raise ValueError(
            f"the model name {name!r} is not passed to a command: names begin with no '-', which commands take for an "
            "option, and have no control characters; write a hub id, or ./ before a directory"
        )
    return name


def model_name(model: str | os.PathLike[str] | NamedModel) -> str:
    """Returns the hub id or directory of a model, given as such or loaded from there. Raises `ValueError` otherwise."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    if not model.name_or_path:
        raise ValueError(
            f"the {type(model).__name__} was not loaded from a directory or hub id, which is written down as its name; "
            "save it and load it from there"
        )
    return model.name_or_path


def looks_like_a_path(name: str) -> bool:
    """Says whether a model's name means a directory. `org/name` is a hub id unless such a directory exists."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def refuse_missing_model(name: str, what: str, kind: str) -> None:
    """Raises `ValueError` for a path without a model, before the hub is asked for a model of that name."""
    if looks_like_a_path(name) and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"no {what} at {name!r}: it is not a directory with a config.json; give the directory of {kind}, or a "
            "model id of the Hugging Face hub"
        )


def refuse_missing_verifier(name: str) -> None:
    """Raises `ValueError` for a path without a verifier."""
    refuse_missing_model(name, "verifier", "a saved causal LM")
