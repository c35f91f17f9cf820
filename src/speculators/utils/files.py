"""Writes files so that a reader sees the old content or the new, never half of it; compares names of directories.

A process may die between any two steps, and the power may fail: contents and names are on disk before the next step.

    .NAME.partial        being written; its writer holds a lock on it
    .NAME.partial.new    a whole directory, about to become NAME
    .NAME.partial.old    the directory that NAME was before, about to be removed
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from speculators.utils.report import human_bytes


def absolute_if_directory(name: str) -> str:
    """Returns the name under which a model is recorded: a hub id unchanged, a directory or GGUF file as an absolute
    path, because a later reader has another working directory. Links are kept: they are the name that is meant to last
    (`models/current`, a mount), while their target may be a hash (the hub's cache) or missing on the next machine."""
    return os.path.abspath(name) if os.path.isdir(name) or (name.endswith(".gguf") and os.path.isfile(name)) else name


FILES_RECORD = ".speculators.json"
"""In a directory that `export` or `convert` wrote: the files that it wrote there."""


def refuse_to_replace(output: Path, made_from: str | os.PathLike, *, overwrite: bool) -> None:
    """Raises `ValueError` unless `output` may be written: replacing a directory deletes everything in it.

    Refuses an existing path without `overwrite`, a file, the source itself, and a directory that is neither empty nor
    one that `record_files` described and that holds nothing else.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists already: name another --output, or replace it with --overwrite")
    if not output.is_dir():
        raise ValueError(f"{output} is a file; name a directory")
    if Path(made_from).is_dir() and output.samefile(made_from):
        raise ValueError(f"{output} is the source itself; name another --output")
    others = sorted(files_below(output) - recorded_files(output))
    if others:
        raise ValueError(
            f"{output} holds {others[:5]}, which --overwrite would delete and which export and convert did not write "
            f"there (by its {FILES_RECORD}); name another --output, or delete the directory yourself"
        )


def record_files(directory: Path) -> None:
    """Writes down which files the directory holds now, so that `refuse_to_replace` knows them later."""
    text = json.dumps({"files": sorted({*files_below(directory), FILES_RECORD})}, indent=1)
    (directory / FILES_RECORD).write_text(text + "\n", encoding="utf-8")


def recorded_files(directory: Path) -> set[str]:
    """Returns the files that `record_files` wrote down; nothing without a readable record."""
    try:
        values = json.loads((directory / FILES_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    files = values.get("files") if isinstance(values, dict) else None
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def files_below(directory: Path) -> set[str]:
    """Lists every file and link below a directory, hidden ones too, by relative path."""
    found = set()
    for folder, folders, files in os.walk(directory):
        here = Path(folder).relative_to(directory)
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found |= {str(here / name) for name in (*files, *links)}
    return found


MOST_JSON_BYTES = 200_000_000
"""The index of a model of a hundred thousand tensors has 10 MB."""


def read_json_object(file: Path, fix: str = "fetch it again, or correct it") -> dict[str, Any]:
    """Reads a JSON object that others wrote. Raises `ValueError`, naming the file and the fix, for anything else."""
    try:
        if file.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"it has more than {human_bytes(MOST_JSON_BYTES)}")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ValueError(f"{file} cannot be read ({problem.strerror or problem}): {fix}") from problem
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{file} is not JSON ({problem}): {fix}") from problem
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a JSON {type(values).__name__}, not an object: {fix}")
    return values


def is_same_model(name: str, other: str) -> bool:
    """Says whether two names mean the same model: equal names, or two paths of one directory."""
    return name == other or (os.path.isdir(name) and os.path.isdir(other) and os.path.samefile(name, other))


UNFINISHED = re.compile(r"\.(?P<name>.+)\.(partial|[a-z0-9_]{8})(?P<state>\.new|\.old)?")
WHOLE, REPLACED = ".new", ".old"


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file for writing that replaces `path` only when the block ends without an error.

    with atomic_write("config.json") as file:
        file.write(text)
    """
    if "w" not in mode:
        raise ValueError(f"atomic_write replaces a file; mode={mode!r} does not write one, use 'w' or 'wb'")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path, is_directory=False) as (temporary, handle):
        with os.fdopen(os.dup(handle), mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        flush(path.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a fresh directory to fill; it replaces `path` only when the block ends without an error.

    with atomic_directory("checkpoint") as folder:
        model.save_pretrained(folder)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    finish_dead_writes(path.parent, lambda name: name == path.name)
    with _partial(path, is_directory=True) as (temporary, _):
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):  # whoever wrote it: safetensors leaves files to their owner
            os.chmod(entry, (0o777 if entry.is_dir() else 0o666) & ~_umask())
            flush(entry)
        replace_directory(temporary, path)


@contextmanager
def _partial(path: Path, *, is_directory: bool) -> Iterator[tuple[Path, int]]:
    """Yields an empty file or directory beside `path`, and its handle; removes it when the block ends in an error.

    Its name is the same each time, so that what a killed process left is written over by the next. Another process that
    writes the same path holds a lock on it: then a name of its own is taken.
    """
    usual = path.with_name(f".{path.name}.partial")
    handle = _lock_partial(usual, is_directory)
    temporary = usual
    if handle is None:
        own: dict[str, Any] = {"dir": path.parent, "prefix": f".{path.name}."}
        handle, name = (-1, tempfile.mkdtemp(**own)) if is_directory else tempfile.mkstemp(**own)
        temporary = Path(name)
        handle = os.open(temporary, os.O_RDONLY) if is_directory else handle
        lock_if_free(handle)
    try:
        yield temporary, handle
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True) if is_directory else temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _lock_partial(path: Path, is_directory: bool) -> int | None:
    """Opens, locks and empties it, made if it is not there. None: another process writes it, or there are no locks."""
    try:
        if is_directory:
            path.mkdir(exist_ok=True)
        handle = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None
    try:
        if not lock_path_if_free(handle, path):
            raise BlockingIOError
        if is_directory:
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        else:
            os.ftruncate(handle, 0)
    except OSError:
        os.close(handle)
        return None
    return handle


def replace_directory(new: Path, path: Path) -> None:
    """Renames a whole directory to `path`. A process that dies on the way leaves one of both under a name that
    `finish_dead_writes` knows."""
    if not path.exists() and not path.is_symlink():
        os.rename(new, path)
        flush(path.parent)
        return
    # a directory cannot be renamed over a filled one: the old one is moved aside first, and back if the rename fails
    whole, old = (new.with_name(new.name + state) for state in (WHOLE, REPLACED))
    os.rename(new, whole)
    flush(path.parent)
    os.rename(path, old)
    try:
        os.rename(whole, path)
    except BaseException:
        os.rename(old, path)
        shutil.rmtree(whole, ignore_errors=True)
        raise
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Removes a directory at once for every reader: the name is gone before the first file is."""
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.rename(path, old)  # over an empty directory
    shutil.rmtree(old)


def finish_dead_writes(directory: Path, is_ours: Callable[[str], bool]) -> list[str]:
    """Completes or removes what processes that died while writing left in `directory`; returns a line for each.

    `is_ours` is asked for the name that was being written. A whole directory gets its name if nothing has it: its
    process died between the two renames. What a living process writes is left alone.
    """
    found = [(entry, match) for entry in sorted(directory.iterdir()) if (match := UNFINISHED.fullmatch(entry.name))]
    lines = []
    for entry, match in sorted(found, key=lambda pair: pair[1]["state"] != WHOLE):
        name = match["name"]
        if not is_ours(name) or entry.is_symlink():
            continue
        with locked_if_dead(entry) as is_dead:
            if is_dead and match["state"] == WHOLE and not (directory / name).exists():
                os.rename(entry, directory / name)
                flush(directory)
                lines.append(f"{directory / name} was whole but not in place when its process died: completed")
            elif is_dead:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                lines.append(f"removed {entry}: its process died while it wrote {name}")
    return lines


@contextmanager
def locked_if_dead(path: Path) -> Iterator[bool]:
    """Says whether no process writes a file or directory, and lets none begin to while the block runs."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # its writer has just finished
        yield False
        return
    try:
        yield lock_path_if_free(handle, path)
    finally:
        os.close(handle)


def lock_path_if_free(handle: int, path: Path, *, without_locks: bool = False) -> bool:
    """Locks an open file or directory, unless `path` is no longer its name: its writer finished and renamed it."""
    try:
        return lock_if_free(handle, without_locks=without_locks) and os.fstat(handle).st_ino == os.stat(path).st_ino
    except FileNotFoundError:
        return False


def lock_if_free(handle: int, *, without_locks: bool = False) -> bool:
    """Locks an open file or directory until it is closed or this process ends, however it ends. False: another process
    holds it. `without_locks`: the answer of a file system that knows none."""
    if os.name != "posix":
        return without_locks
    import fcntl  # exists on POSIX only

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return without_locks and not isinstance(error, BlockingIOError)
    return True


def flush(path: Path) -> None:
    """Waits until a file's contents, or a directory's names, are on disk."""
    if path.is_symlink() or (path.is_dir() and os.name != "posix"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
