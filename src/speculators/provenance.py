"""What made a result: package versions, the state of the source tree they came from, its recipe, and who is making it.

recipe.json      every setting that shapes the result, resolved; compared when the result is continued
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from speculators.utils.files import atomic_write, lock_if_free, read_json_object

__all__ = [
    "TRACKED_PACKAGES",
    "DoneSteps",
    "as_json",
    "atomic_write",
    "changed_settings",
    "columns",
    "find_package_repo",
    "find_repo_root",
    "git_diff",
    "git_sha",
    "output_lock",
    "package_versions",
    "pkg_version",
    "read_recipe",
    "read_steps",
    "refuse_changes",
    "run_git",
    "write_recipe",
]

TRACKED_PACKAGES = ("speculators", "torch", "transformers", "datasets", "safetensors", "pydantic", "numpy", "vllm")
GIT_TIMEOUT_S = 10.0
CLAIM_TIMEOUT_S = 1.0
"""Longest time between locking the file and writing one's name into it."""


def pkg_version(name: str) -> str | None:
    """Installed version of a distribution; None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    return {name: pkg_version(name) for name in TRACKED_PACKAGES}


def find_repo_root(path: str | os.PathLike) -> Path | None:
    """The git work tree that holds `path`."""
    start = Path(path).resolve()
    return next((folder for folder in (start, *start.parents) if (folder / ".git").exists()), None)


def find_package_repo(package: str = "speculators") -> Path | None:
    """The git work tree a package is imported from; None when it is installed, not checked out."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or "site-packages" in Path(spec.origin).parts:
        return None
    return find_repo_root(spec.origin)


def run_git(*args: str, cwd: str | os.PathLike) -> str | None:
    """Returns what a git command prints; None when git is missing or says no."""
    try:
        done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def git_sha(repo: str | os.PathLike | None) -> str | None:
    sha = run_git("rev-parse", "HEAD", cwd=repo) if repo is not None else None
    return sha.strip() if sha else None


def git_diff(repo: str | os.PathLike | None) -> str | None:
    """Uncommitted changes to tracked files; "" when there are none."""
    return run_git("diff", "HEAD", cwd=repo) if repo is not None else None


def read_recipe(file: Path) -> dict[str, Any] | None:
    """Reads a recipe; None when the output was begun by an earlier release. Raises `ValueError` for a damaged one."""
    if not file.is_file():
        return None
    try:
        recipe = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete it to continue with settings that nobody compared"
        ) from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{file} holds no recipe: delete it to continue with settings that nobody compared")
    return recipe


def write_recipe(file: Path, recipe: Mapping[str, Any]) -> None:
    with atomic_write(file) as writer:
        writer.write(as_json(recipe) + "\n")


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Returns setting -> "before -> now" for each that differs, "sampling.top_p" for one inside another. A missing one
    is none: a later release may add it."""
    now = json.loads(as_json(now))
    changes: dict[str, str] = {}
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old != new and {type(old), type(new)} <= {dict, type(None)}:
            changes |= {f"{name}.{inner}": change for inner, change in changed_settings(old or {}, new or {}).items()}
        elif old != new:
            changes[name] = f"{shown(old)} -> {shown(new)}"
    return changes


def as_json(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, indent=1, sort_keys=True, default=str)


def shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def columns(changes: Mapping[str, str]) -> str:
    """Returns the changes as indented lines."""
    width = max(map(len, changes), default=0) + 2
    return "\n".join(f"    {name + ':':<{width}}{change}" for name, change in changes.items())


def refuse_changes(changes: Mapping[str, str], what: str, ways_out: str) -> None:
    """Raises `ValueError` with two columns when a setting that shapes the result has changed."""
    if changes:
        raise ValueError(f"{what} was made with other settings:\n{columns(changes)}\n{ways_out}")


def read_steps(file: Path, ways_out: str) -> dict[str, Any]:
    """Reads what `DoneSteps` wrote: `settings` and `done`. Raises `ValueError` for a file of something else."""
    state = read_json_object(file, ways_out)
    if not all(isinstance(state.get(name), dict) for name in ("settings", "done")):
        raise ValueError(f"{file} holds no settings and steps: it is of something else; {ways_out}")
    return state


class DoneSteps:
    """What was done for a result, by name, in a file beside it: whatever ended the process, each step is done once."""

    def __init__(self, file: Path, settings: Mapping[str, Any], ways_out: str) -> None:
        """Opens the file, or begins it. Raises `ValueError`, with the `ways_out`, where it is of other settings."""
        self.file, self.settings = file, dict(settings)
        self.done: dict[str, Any] = {}
        if file.exists():
            state = read_steps(file, ways_out)
            refuse_changes(changed_settings(state["settings"], settings), str(file.parent), ways_out)
            self.done = state["done"]

    def once(self, name: str, do: Callable[[], Any]) -> Any:
        """Returns what `do` returned when it was called, now or in an earlier process."""
        if name not in self.done:
            text = json.dumps({"settings": self.settings, "done": {**self.done, name: do()}}, indent=1, default=str)
            with atomic_write(self.file) as writer:
                writer.write(text + "\n")
            self.done = json.loads(text)["done"]
        return self.done[name]


@contextmanager
def output_lock(path: Path, what: str, note: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file `path` while the block runs. The kernel frees it when the process ends, however it ends.

    The lock of a dead process is taken over with a note. Raises `ValueError` when another process holds it.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = acquire(path, what, note)
    try:
        yield
    finally:
        with suppress(
            OSError
        ):  # read-only by now; the kernel frees the lock, and the error of the block is the one to see
            path.unlink(missing_ok=True)
        os.close(handle)
        for parent in made:  # nothing was written there
            if any(parent.iterdir()):
                break
            parent.rmdir()


def acquire(path: Path, what: str, note: Callable[[str], None]) -> int:
    deadline = time.monotonic() + CLAIM_TIMEOUT_S
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_free = lock_if_free(handle)
        is_removed = os.fstat(handle).st_nlink == 0  # its holder ended meanwhile
        holder = os.pread(handle, 4096, 0).decode(errors="replace")
        if not is_removed and (is_free or holder or time.monotonic() > deadline):
            break
        os.close(handle)
        time.sleep(CLAIM_TIMEOUT_S / 20)
    if not is_free and holder:
        os.close(handle)
        raise ValueError(
            f"{what} is in use by {described(holder)}: two runs there would spoil each other. Wait until it ends or "
            f"stop it, or name another output (if it ended long ago on a file system without locks, delete {path})"
        )
    if not is_free:
        note(f"{path.parent} is on a file system without locks: a second run there would not be noticed")
    elif holder:
        note(f"{what}: continued in the place of {described(holder)}, which has died")
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(facts).encode(), 0)
    return handle


def described(holder: str) -> str:
    try:
        facts = json.loads(holder)
        return f"process {facts['pid']} on {facts['host']} (since {facts['since']})"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"
