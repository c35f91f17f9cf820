"""Training runs in processes to which something happens at a chosen place: `kill -9`, a signal, a full disk.

A server imports everything once and forks the ranks of each run, so that a run costs no more than its own work. The
product knows nothing of this: an audit hook in the child sees every change of the file system below the run directory
(Python reports opening for writing, mkdir, rename, symlink, remove, rmdir), and steps of the optimizers and
backward passes report themselves likewise. A place is the number of such an event in one rank.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KILLED, ERROR, ENDED_BY_ANOTHER_RANK, STOPPED_BY_SIGNAL = -9, 1, 3, 130
"""Exit codes of a rank."""
LONGEST_S = 90.0
"""Of one run. A rank that does not notice the end of another one is killed then and has the exit code -14."""
FULL_DISK_BYTES = 4000
"""Longest file on a disk that is full: larger than a line of the curve, smaller than weights."""


@dataclass(frozen=True)
class Run:
    """One start of a training command, and what happens to it."""

    settings: dict[str, Any]
    notes: str
    """Directory outside the run's own, to which the main rank writes `curve.jsonl` and `places.txt`."""
    num_ranks: int = 1
    event: str | None = None
    """One of `EVENTS`."""
    place: int | str | None = None
    """It happens to the rank `who` before this place: its number, from 1, or the first of this name."""
    after_s: float = 0.0
    """Without a place it happens so long after the start."""
    who: int = 0


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    """By rank."""
    time_s: float
    """From the event to the end of the last rank; from the start without one."""
    output: str
    """What all ranks printed."""


class RunServer:
    """The process that has everything imported, and forks."""

    def __init__(self, python_path: list[str]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(python_path)}
        pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, **pipe)

    def __call__(self, run: Run) -> Ended:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(run)) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(LONGEST_S)
        self.process.stdout.close()


# -- in the server ----------------------------------------------------------------------------------------------------


def serve() -> None:
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import speculators.models.dflash.core
    import speculators.models.eagle3.core
    import speculators.train.run  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        run = Run(**json.loads(line))
        Path(run.notes).mkdir(exist_ok=True)
        print(json.dumps(asdict(supervise(run))), flush=True)


def supervise(run: Run) -> Ended:
    """Forks the ranks and waits for all of them."""
    notes = Path(run.notes)
    for file in ("output.txt", "event"):
        (notes / file).unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun_s = time.monotonic()
    pids = [fork(run, rank, port) for rank in range(run.num_ranks)]
    event_s = run.after_s if run.event is not None and run.place is None else None
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        passed_s = time.monotonic() - begun_s
        if event_s is not None and passed_s >= event_s:
            event_s = None
            (notes / "event").write_text(str(time.monotonic()))
            if pids[run.who] not in codes:
                os.kill(pids[run.who], signal.SIGKILL if run.event == "kill" else signal.SIGTERM)
        for pid in set(pids) - codes.keys():
            if passed_s > LONGEST_S:
                os.kill(pid, signal.SIGALRM)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    since_s = float((notes / "event").read_text()) if (notes / "event").exists() else begun_s
    return Ended([codes[pid] for pid in pids], time.monotonic() - since_s, (notes / "output.txt").read_text())


def fork(run: Run, rank: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        code = ERROR
        try:
            code = run_rank(run, rank, port)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


# -- in a rank --------------------------------------------------------------------------------------------------------


def run_rank(run: Run, rank: int, port: int) -> int:
    from speculators.train.config import TrainConfig
    from speculators.train.distributed import RankError
    from speculators.train.events import Event, Note, StepDone, Validated
    from speculators.train.run import train

    output = os.open(Path(run.notes) / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if run.num_ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run.num_ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    curve = Path(run.notes) / "curve.jsonl"

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            print(event.text, file=sys.stderr)
        if isinstance(event, StepDone | Validated):
            rate = event.lr if isinstance(event, StepDone) else None
            with curve.open("a") as file:
                file.write(json.dumps([type(event).__name__, event.step, rate, event.metrics["loss"]]) + "\n")

    watch(run, rank)
    try:
        train(TrainConfig.from_flat(run.settings), on_event=listen)
    except RankError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return ENDED_BY_ANOTHER_RANK
    except (ValueError, OSError) as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return STOPPED_BY_SIGNAL
    return 0


def watch(run: Run, rank: int) -> None:
    """Notes every place that the rank passes, and lets the event happen before the chosen one."""
    roots = [run.settings[key] for key in ("save_path", "hidden_states_path") if key in run.settings]
    number, happened = 0, run.event is None
    places = Path(run.notes) / f"places{rank}.txt"
    places.unlink(missing_ok=True)
    handle = os.open(places, os.O_WRONLY | os.O_CREAT)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number, happened
        place = described(name, arguments, roots)
        if place is None:
            return
        number += 1
        os.write(handle, f"{place}\n".encode())
        if rank == run.who and not happened and run.place in (number, place):
            happened = True
            (Path(run.notes) / "event").write_text(str(time.monotonic()))
            EVENTS[run.event](roots)

    report_steps()
    sys.addaudithook(hook)


def described(name: str, arguments: tuple[Any, ...], roots: list[str]) -> str | None:
    """Returns what an audit event does to the directories of the run, without the numbers of epochs; None: nothing."""
    if name == "train.step":
        return str(arguments[0])
    if name == "open":
        path, _, flags = arguments
        names = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
    elif name in ("os.rename", "os.symlink"):
        names = list(arguments[:2])
    elif name == "os.mkdir":
        # every rank makes the directory of parts; which one is first is no place that a number could name
        is_told = not os.path.exists(arguments[0]) and os.path.basename(arguments[0]) != "sharded_state"
        names = [arguments[0]] if is_told else []
    elif name in ("os.remove", "os.rmdir"):
        if arguments[-1] != -1:  # relative to a directory that is being removed
            return f"{name} inside"
        names = [arguments[0]] if os.path.lexists(arguments[0]) else []
    else:
        return None
    names = [os.fspath(path) for path in names if isinstance(path, str | os.PathLike)]
    if not any(path == root or path.startswith(f"{root}/") for path in names for root in roots):
        return None
    return " ".join([name, *(re.sub(r"\d+", "N", relative(path, roots)) for path in names)])


def relative(path: str, roots: list[str]) -> str:
    return next((path.removeprefix(f"{root}/") for root in roots if path.startswith(f"{root}/")), path)


def report_steps() -> None:
    import torch

    for owner, name in ((torch.optim.AdamW, "step"), (torch.optim.Muon, "step"), (torch.Tensor, "backward")):
        setattr(owner, name, reporting(getattr(owner, name), f"{owner.__name__}.{name}"))


def reporting(function: Any, name: str) -> Any:
    def reported(*args: Any, **kwargs: Any) -> Any:
        sys.audit("train.step", name)
        return function(*args, **kwargs)

    return reported


# -- what happens -----------------------------------------------------------------------------------------------------


def die(roots: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(roots: list[str]) -> None:
    """Cuts the file that was written last to its half, unless it has its final name, and dies."""
    everything = [entry for root in roots for entry in Path(root).rglob("*")]
    files = [entry for entry in everything if ".partial/" in f"{entry}/" and entry.is_file()]
    if files:
        newest = max(files, key=lambda file: file.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)
    die(roots)


def terminate(roots: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk(roots: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, resource.RLIM_INFINITY))


def make_read_only(roots: list[str]) -> None:
    """For root too: without its capabilities the permissions of a directory hold."""
    for root in roots:
        os.chmod(root, 0o555)
    version, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version, data) == 0


EVENTS = {
    "kill": die,
    "kill half-written": die_half_written,
    "SIGTERM": terminate,
    "full disk": fill_the_disk,
    "read-only": make_read_only,
}

if __name__ == "__main__":
    serve()
