"""Finds the name or path nearest to an unknown one, for error messages; says at once which model or file does not
exist; imports the names of a package on first use."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import os
import pkgutil
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache


class NamedModel(Protocol):
    """A model of transformers, as far as its name goes."""

    @property
    def name_or_path(self) -> str | None: ...


def excerpt(value: object, most: int = 80) -> str:
    """Returns `repr` of a value, of a longer one the beginning: "'What is the cap...'"."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[: most - 4]}...{shown[-1]}"


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


Settings = TypeVar("Settings")


def refusing_unknown(config: type[Settings]) -> type[Settings]:
    """Decorates a dataclass of settings: an unknown keyword raises `ValueError` with the nearest field."""
    init = config.__init__
    known = list(inspect.signature(config).parameters)

    @functools.wraps(init)
    def checked(self: Settings, *args: Any, **settings: Any) -> None:
        refuse_unknown(f"setting of {config.__name__}", settings, known)
        init(self, *args, **settings)

    config.__init__ = checked  # type: ignore[method-assign, assignment]
    return config


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


GGUF = ".gguf"
TYPO = 0.85
"""Least likeness (difflib's ratio) of a name that has the form of a hub id and is taken for a misspelt path."""
HUB_TIMEOUT_S = 3.0


def nearest_path(name: str) -> str | None:
    """Returns the existing path most like one that does not exist: where the first part that is missing is misspelt."""
    path = missing = Path(name).expanduser()
    while not missing.parent.exists():
        missing = missing.parent
    guess = nearest(missing.name, names_in(missing.parent))
    if guess is None:
        return None
    found = missing.parent / guess
    whole = found / path.relative_to(missing)
    return str(whole if whole.exists() else found)


def names_in(directory: Path) -> list[str]:
    try:
        return [entry for entry in os.listdir(directory) if not entry.startswith(".")]
    except OSError:
        return []


def did_you_mean_path(name: str) -> str:
    """Returns " Did you mean 'x'?" to append to a message; an empty string when no existing path is near."""
    guess = nearest_path(name)
    return f" Did you mean '{guess}'?" if guess else ""


def refuse_missing_path(name: str | os.PathLike[str], what: str, fix: str) -> None:
    """Raises `ValueError` for a path that does not exist. `fix` begins with a verb."""
    if not os.path.exists(os.path.expanduser(name)):
        raise ValueError(f"{what} {os.fspath(name)!r} does not exist.{did_you_mean_path(os.fspath(name))} Please {fix}")


def looks_like_a_path(name: str) -> bool:
    """Says whether a model's name means a directory. `org/name` is a hub id unless such a directory exists."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def refuse_path_without_model(name: str, what: str, kind: str) -> None:
    """Raises `ValueError` for a path without a model, also one that a hub id could be but for a letter."""
    if looks_like_a_path(name):
        if not has_model(name):
            ways_out = f"Give the directory of {kind}, or a model id of the Hugging Face hub"
            raise ValueError(f"no {what} at {name!r}: {why_no_model(Path(name))} {ways_out}")
    elif is_misspelt_path(name) and not is_in_hub_cache(name):
        raise ValueError(
            f"no {what} at {name!r}: it does not exist.{did_you_mean_path(name)} If it is a model of the Hugging Face "
            f"hub, fetch it first: hf download {name}"
        )


def has_model(path: str) -> bool:
    """Says whether a path is a directory with a config.json, or a GGUF file (which holds its own), or a directory of
    one."""
    return os.path.isfile(os.path.join(path, "config.json")) or gguf_file_of(path) is not None


def refuse_missing_model(name: str, what: str, kind: str) -> None:
    """Raises `ValueError` at once for a path without a model, and for a hub id that nothing here can resolve.

    transformers would ask the hub six times over half a minute."""
    refuse_path_without_model(name, what, kind)
    if looks_like_a_path(name) or is_in_hub_cache(name):
        return
    reason = why_hub_is_unreachable()
    if reason is not None:
        raise ValueError(
            f"no {what} {name!r}: there is no such directory, the hub's cache has no such model, and the hub cannot be "
            f"reached from here ({reason}).{did_you_mean_path(name)} Please give the directory of {kind}, or a model "
            "id of the Hugging Face hub"
        )


def refuse_missing_checkpoint(name: str) -> None:
    """Raises `ValueError` for a path that does not exist, also one that a hub id could be but for a letter."""
    if looks_like_a_path(name) or (is_misspelt_path(name) and not is_in_hub_cache(name)):
        refuse_missing_path(name, "the checkpoint", "give its directory, or a model id of the Hugging Face hub")


def why_no_model(path: Path) -> str:
    if not path.exists():
        return f"it does not exist.{did_you_mean_path(str(path))}"
    return "it has no config.json." if path.is_dir() else "it is a file."


def is_in_hub_cache(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no name that the hub could have
        return False


def gguf_file_of(name: str | os.PathLike[str]) -> Path | None:
    """Returns the GGUF file that a model's name means; None for a hub id or a directory with other weights.

    Raises `ValueError` for a directory of several, of which one must be named."""
    path = Path(name)
    if path.suffix == GGUF:
        return path if path.is_file() else None
    if not path.is_dir():
        return None
    files = sorted(path.iterdir())
    found = [file for file in files if file.suffix == GGUF]
    if not found or any(file.suffix in (".safetensors", ".bin") for file in files):
        return None
    if len(found) > 1:
        raise ValueError(f"{path} has {len(found)} GGUF files; name one of them, such as {found[0]}")
    return found[0]


def is_misspelt_path(name: str) -> bool:
    """Says whether a name of the form of a hub id is almost an existing path.

    Other digits are another model, not a typo: beside `org/model-8b`, `org/model-4b` is asked for at the hub."""
    guess = nearest_path(name)
    if guess is None or Path(guess).parent != Path(name).parent:
        return False
    mine, other = Path(name).name.lower(), Path(guess).name.lower()
    is_other_size = "/" in name and re.sub(r"\d", "", mine) == re.sub(r"\d", "", other)
    return not is_other_size and difflib.SequenceMatcher(None, mine, other).ratio() >= TYPO


def why_hub_is_unreachable() -> str | None:
    """Returns why no connection to the hub can be opened; None when one can, or when a proxy would open it."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    where = urlsplit(constants.ENDPOINT)
    if where.scheme in getproxies() or "all" in getproxies():
        return None
    try:
        port = where.port or (443 if where.scheme == "https" else 80)
        socket.create_connection((where.hostname or "", port), timeout=HUB_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def refuse_missing_verifier(name: str) -> None:
    """Raises `ValueError` for a path without a verifier."""
    refuse_missing_model(name, "verifier", "a saved causal LM")
