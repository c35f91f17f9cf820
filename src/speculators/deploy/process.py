"""Finds vLLM, and runs one server process: started in a group of its own, watched until it is healthy, stopped with
everything it started. Imports neither vLLM nor torch.

vLLM pins its own torch, so it often lives in an environment of its own. `find_vllm` asks that environment's Python for
the version of vLLM through package metadata, which takes milliseconds.

vLLM's front end starts engine and worker processes. They share the front end's process group, so that whatever happens
to it (a crash, a kill -9) the rest can be found and ended: no `VLLM::EngineCore` outlives the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

from speculators.checkpoint.engine_profile import VLLM, profile_of_version

PYTHON_VARIABLE = "SPECULATORS_VLLM_PYTHON"
QUERY_TIMEOUT_S = 60.0
"""A cold Python on a network disk is slow; more than this is a hang."""
QUERY = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"

POLL_S = 0.5
GRACE_S = 20.0
"""From the request to stop until everything left is killed. Kubernetes allows 30 s in all."""
NUM_KEPT_LINES = 400
NUM_SHOWN_LINES = 25
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: between fork and exec one must not


@dataclass(frozen=True)
class VllmEnvironment:
    """A Python that has vLLM."""

    python: Path
    version: str

    @property
    def command(self) -> list[str]:
        """Returns how to call `vllm` here: its script beside that Python, else the module behind the script."""
        script = self.python.parent / "vllm"
        return [str(script)] if script.is_file() else [str(self.python), "-m", "vllm.entrypoints.cli.main"]

    @property
    def is_tested_version(self) -> bool:
        """Whether our tests run this release, patches aside."""
        profile = profile_of_version(VLLM, self.version)
        return profile.held_against == "process" and profile.describes(self.version)


def find_vllm(python: str | None = None) -> VllmEnvironment:
    """Finds a Python that has vLLM: the named one, else this Python, else the one behind `vllm` on PATH.

    `python`: an interpreter or the directory of its environment; None reads $SPECULATORS_VLLM_PYTHON. Raises
    `ValueError` when the named Python, or none of them, has vLLM.
    """
    named = python or os.environ.get(PYTHON_VARIABLE)
    if named:
        path = interpreter_of(named)
        version = version_in(path)
        if version is None:
            origin = "--python" if python else f"${PYTHON_VARIABLE}"
            raise ValueError(f"{origin} {named}: that Python has no vllm; install it there, or name another Python")
        return VllmEnvironment(path, version)
    for candidate in (Path(sys.executable), python_behind_the_command()):
        version = None if candidate is None else version_in(candidate)
        if candidate is not None and version is not None:
            return VllmEnvironment(candidate, version)
    raise ValueError(
        f"no vLLM was found: neither {sys.executable} nor a `vllm` command on PATH has it; install it "
        f"(https://docs.vllm.ai), or name the Python that has it with --python or ${PYTHON_VARIABLE}"
    )


def interpreter_of(named: str) -> Path:
    """Returns the interpreter, or the one in bin/ of an environment's directory. Links stay: they make the venv."""
    path = Path(named).expanduser().absolute()
    if path.is_dir():
        path = path / "bin" / "python"
    if not path.is_file():
        found = shutil.which(named)
        if found is None:
            raise ValueError(f"{named} is not a Python: give an interpreter, or the directory of its environment")
        path = Path(found)
    return path


def version_in(python: Path, package: str = VLLM) -> str | None:
    """Returns the version of the package that this Python would run; None when it lacks it or does not start."""
    if python == Path(sys.executable):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None
    query = [str(python), "-c", QUERY, package]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def python_behind_the_command() -> Path | None:
    """Returns the interpreter that the first line of the `vllm` script on PATH names."""
    script = shutil.which("vllm")
    if script is None:
        return None
    with open(script, "rb") as file:
        first = file.readline().decode(errors="replace").strip()
    interpreter = first.removeprefix("#!").split(" ")[0]
    return Path(interpreter) if first.startswith("#!") and Path(interpreter).is_file() else None


class ServerFailedError(OSError):
    """The server ended, or never became healthy. The message carries the end of its log."""


def ignore(*_: object) -> None:
    pass


class ServerProcess:
    """Context manager: starts the server and stops it with everything it started.

    `env` is added to this process's environment. `on_line` receives each line that the server prints, from a thread.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, on_line: Callable[[str], None] = ignore
    ) -> None:
        self.command = list(command)
        self.env = None if env is None else {**os.environ, **env}
        self.on_line = on_line
        self.lines: deque[str] = deque(maxlen=NUM_KEPT_LINES)

    def __enter__(self) -> ServerProcess:
        # The kernel sends the signal when the starting THREAD ends: only the main one lives as long as the process.
        is_main = threading.current_thread() is threading.main_thread()
        try:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=end_with_parent if is_main and LIBC is not None else None,
            )
        except OSError as error:
            raise ServerFailedError(f"{self.command[0]} cannot be started: {error}") from error
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))
                self.on_line(line.rstrip("\n"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_until_healthy(
        self, health_url: str, timeout_s: float, on_wait: Callable[[float, str], None] = ignore
    ) -> float:
        """Waits until `health_url` answers 200; returns the seconds it took.

        Calls `on_wait(seconds, last line of the log)` at each poll. Raises `ServerFailedError` when the server ends or
        `timeout_s` passes.
        """
        start = time.monotonic()
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while True:
                waited_s = time.monotonic() - start
                if not self.is_running:
                    raise ServerFailedError(f"the server ended with {self.describe_end()}{self.end_of_log()}")
                with contextlib.suppress(httpx.TransportError):
                    if client.get(health_url).status_code == 200:
                        return waited_s
                if waited_s > timeout_s:
                    raise ServerFailedError(
                        f"the server was not healthy after {timeout_s:.0f} s ({health_url}); large models need longer: "
                        f"--ready-timeout{self.end_of_log()}"
                    )
                on_wait(waited_s, self.lines[-1] if self.lines else "")
                time.sleep(POLL_S)

    def wait(self) -> None:
        """Waits until the server ends by itself, then raises `ServerFailedError`."""
        self.process.wait()
        raise ServerFailedError(f"the server ended with {self.describe_end()}{self.end_of_log()}")

    def describe_end(self) -> str:
        code = self.process.poll()
        assert code is not None
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def end_of_log(self) -> str:
        """Returns the last lines of the log, for a message."""
        self.reader.join(timeout=2.0)  # what is still in the pipe
        lines = list(self.lines)
        if not lines:
            return "; it printed nothing"
        shown = lines[-NUM_SHOWN_LINES:]
        return f". Its last {len(shown)} lines:\n" + "\n".join(f"  {line}" for line in shown)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Asks the front end to stop, waits `grace_s` seconds, then ends the rest of its group.

        An interrupt while it waits kills the group at once.
        """
        try:
            if self.is_running:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(grace_s)
            deadline = time.monotonic() + min(grace_s, 5.0)
            while group_members(self.pid) and time.monotonic() < deadline:
                signal_group(self.pid, signal.SIGTERM)
                time.sleep(0.1)
        finally:
            if group_members(self.pid):
                signal_group(self.pid, signal.SIGKILL)
            self.process.wait()
            self.reader.join(timeout=2.0)


def end_with_parent() -> None:
    """Asks the kernel, in the child before it becomes the server, to end it when its parent dies, however that dies."""
    assert LIBC is not None
    LIBC.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def group_members(group: int) -> list[int]:
    """Lists the living processes of a group; zombies that nobody has reaped do not count."""
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return []
        return [group]
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # pid (comm) state ppid pgrp ...; comm may hold spaces and parentheses
            state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                members.append(int(entry.name))
    return members
