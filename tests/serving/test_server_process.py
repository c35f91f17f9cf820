"""Starting, watching and stopping a server process: nothing it started outlives it, and its last words are shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ports import free_port

from speculators.deploy.process import ServerFailedError, ServerProcess, group_members
from speculators.deploy.serve import Launch, run_server

FAKE = str(Path(__file__).with_name("fake_server.py"))


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, FAKE, str(folder), *flags]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)
    return path.read_text()


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_healthy_server_is_waited_for_and_its_log_forwarded(tmp_path):
    port, lines = free_port(), []
    with ServerProcess(command(tmp_path, "--port", str(port)), on_line=lines.append) as server:
        waited_s = server.wait_until_healthy(f"http://127.0.0.1:{port}/health", timeout_s=20)
        assert 0 <= waited_s < 20
        assert server.is_running
    assert not is_alive(server.pid)
    assert any("fake server starting" in line for line in lines)


def test_a_port_that_is_taken_is_refused_before_its_owner_is_called_ready(start_fake, tmp_path):
    other = start_fake()
    launch = Launch(tuple(command(tmp_path / "second", "--port", str(other.port))), f"http://127.0.0.1:{other.port}")
    with pytest.raises(ValueError, match=rf"port {other.port} is taken.*--port {other.port + 1}"):
        run_server(launch, ready_timeout_s=10)
    assert not (tmp_path / "second").exists()


def test_a_server_that_fails_to_start_is_reported_with_its_last_lines(tmp_path):
    with (
        ServerProcess(command(tmp_path, "--fail")) as server,
        pytest.raises(ServerFailedError, match=r"exit code 3(.|\n)*no such model, says the fake server"),
    ):
        server.wait_until_healthy("http://127.0.0.1:1/health", timeout_s=20)


def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path):
    is_started = threading.Event()  # on a busy machine Python alone takes longer than the limit
    with (
        pytest.raises(ServerFailedError, match=r"not healthy after 1 s(.|\n)*--ready-timeout(.|\n)*fake server"),
        ServerProcess(command(tmp_path, "--never-healthy"), on_line=lambda line: is_started.set()) as server,
    ):
        waits = []
        assert is_started.wait(60)
        server.wait_until_healthy("http://127.0.0.1:1/health", 1, lambda s, line: waits.append((s, line)))
    assert not is_alive(server.pid)
    assert waits and waits[-1][1].startswith("fake server starting")


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(ServerFailedError, match="/no/such/vllm cannot be started"), ServerProcess(["/no/such/vllm"]):
        pass


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_workers_end_with_the_server_even_when_it_is_killed(tmp_path, how):
    port = free_port()
    with ServerProcess(command(tmp_path, "--port", str(port), "--with-worker")) as server:
        server.wait_until_healthy(f"http://127.0.0.1:{port}/health", timeout_s=20)
        worker = int((tmp_path / "worker.txt").read_text())
        if how == "killed":
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(ServerFailedError, match="SIGKILL"):
                server.wait()
        assert is_alive(worker)
        assert worker in group_members(server.pid)
    assert not is_alive(worker)
    assert group_members(server.pid) == []


def test_a_server_deaf_to_the_request_is_killed_after_the_grace_time(tmp_path):
    with ServerProcess(command(tmp_path, "--port", "0", "--stubborn")) as server:
        wait_for(tmp_path / "port.txt")
        start = time.monotonic()
        server.stop(grace_s=0.5)
        assert 0.5 <= time.monotonic() - start < 5
        assert not is_alive(server.pid)


RUN = """
import sys
from speculators.deploy.serve import Launch, run_server
launch = Launch(tuple(sys.argv[2:]), f"http://127.0.0.1:{sys.argv[1]}")
print("stopped by", run_server(launch, ready_timeout_s=20, on_ready=lambda s: print("ready", flush=True)), flush=True)
"""


def start_runner(folder: Path) -> subprocess.Popen[str]:
    port = free_port()
    fake = command(folder, "--port", str(port), "--with-worker")
    runner = subprocess.Popen([sys.executable, "-c", RUN, str(port), *fake], stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    assert runner.stdout.readline() == "ready\n"
    return runner


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_server_and_workers(tmp_path, number):
    runner = start_runner(tmp_path)
    runner.send_signal(number)
    out, _ = runner.communicate(timeout=20)
    assert out == f"stopped by {number.name}\n"
    assert runner.returncode == 0
    for name in ("pid.txt", "worker.txt"):
        assert not is_alive(int((tmp_path / name).read_text()))


def test_the_server_is_told_when_its_starter_is_killed(tmp_path):
    runner = start_runner(tmp_path)
    runner.kill()
    runner.communicate(timeout=20)
    wait_until_gone(int((tmp_path / "pid.txt").read_text()))
    worker = int((tmp_path / "worker.txt").read_text())
    if is_alive(worker):  # the fake's worker does not watch its parent, as vLLM's do
        os.kill(worker, signal.SIGKILL)


def test_a_server_that_ends_by_itself_is_a_failure(tmp_path):
    with pytest.raises(ServerFailedError, match="exit code 3"):
        run_server(Launch(tuple(command(tmp_path, "--fail")), None), ready_timeout_s=5)
