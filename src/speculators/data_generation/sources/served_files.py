"""Reads the files that a vLLM server writes states into, and deletes them.

The server holds `<path>.lock` exclusively while it writes, and never deletes a file; the reader does. Files are opened
relative to the directory that the user named, and never through a link, so that nothing can be put in their place after
the check. Shapes: T tokens, S slots (layers in the file), H hidden size.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from speculators.data_generation.offline import check_hidden_states
from speculators.data_generation.vllm_client import InvalidResponseError

POLL_S = 0.01
MAX_BYTES_PER_TOKEN = 1 << 22
"""More than the states of 32 layers of 32,768 numbers in fp32."""


class DamagedStatesError(ValueError):
    """The server's file of states is missing, cut off or about other tokens. Worth another request."""


def read_and_delete(directory: Path, name: str, ids_T: Tensor, timeout_s: float) -> Tensor:
    """Reads and checks the states [T, S, H] of these tokens; deletes the file and its lock.

    Raises `DamagedStatesError` when the file is missing, damaged or about other tokens, and `InvalidResponseError` for
    a link, a directory or a device, which stays.
    """
    path = directory / name
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            wait_for_writer(folder, path, timeout_s)
            content = read_plain_file(folder, path, MAX_BYTES_PER_TOKEN * (len(ids_T) + 1))
            try:
                return states_of(content, ids_T, path)
            finally:
                os.unlink(name, dir_fd=folder)
        finally:
            with suppress(OSError):  # a directory under that name stays
                os.unlink(f"{name}.lock", dir_fd=folder)
            os.close(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedStatesError(
            f"the server wrote no {path}, or it is not on this machine: server and reader must share the directory "
            "(launch-vllm --hidden-states-path)"
        ) from error


def states_of(content: bytes, ids_T: Tensor, path: Path) -> Tensor:
    try:
        tensors = load(content)
        check_hidden_states(tensors, ids_T)
        states_TSH = tensors["hidden_states"]
        if states_TSH.dim() != 3 or not states_TSH.is_floating_point():
            shape = f"{tuple(states_TSH.shape)} of {states_TSH.dtype}"
            raise ValueError(f"hidden_states is {shape}, not [tokens, layers, hidden size] of floats")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedStatesError(f"{path}: {error}") from error
    return states_TSH


def read_plain_file(folder: int, path: Path, max_bytes: int) -> bytes:
    """Reads `path.name` in `folder`. Raises `InvalidResponseError` unless it is a plain file of at most that size."""
    handle = open_no_link(folder, path)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
        os.close(handle)
        found = f"holds {status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "is not a plain file"
        raise InvalidResponseError(f"{path} {found}; states of these tokens are a file of at most {max_bytes} bytes")
    with os.fdopen(handle, "rb") as file:
        return file.read(max_bytes + 1)


def open_no_link(folder: int, path: Path) -> int:
    """Opens a file, of a pipe without waiting for its writer. Raises `InvalidResponseError` for a link."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path.name, flags, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidResponseError(f"{path} is not a plain file that can be read: {error.strerror}") from error


def wait_for_writer(folder: int, path: Path, timeout_s: float) -> None:
    """Waits until the writer releases its lock, which it takes before it announces the path; a dead writer holds none.

    Raises `DamagedStatesError` after `timeout_s`.
    """
    import fcntl  # exists on POSIX only, as does vLLM

    try:
        handle = open_no_link(folder, path.with_name(f"{path.name}.lock"))
    except FileNotFoundError:
        return  # a server that writes without locks finishes before it answers
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DamagedStatesError(f"{path} was still being written after {timeout_s:.0f} s") from None
                time.sleep(POLL_S)
    finally:
        os.close(handle)
