"""Fake servers as processes, and retries without their waits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from speculators.data_generation import vllm_client

FAKE = str(Path(__file__).with_name("fake_server.py"))


@dataclass
class FakeServer:
    folder: Path
    process: subprocess.Popen[bytes]
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def inject(self, *faults: str) -> None:
        (self.folder / "faults.json").write_text(json.dumps({"faults": list(faults)}))

    @property
    def log(self) -> list[str]:
        path = self.folder / "log.txt"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    @property
    def files(self) -> list[str]:
        """What lies in the directory of the states, the starter's note aside."""
        directory = self.folder / "states"
        return sorted(f.name for f in directory.iterdir() if f.name != "extraction.json") if directory.exists() else []


@pytest.fixture
def start_fake(tmp_path) -> Iterator[Callable[..., FakeServer]]:
    """start_fake("--slots", "4", ..., name=..., port=...): a running fake server, ended with the test."""
    servers: list[FakeServer] = []

    def start(*flags: str, name: str = "fake", port: int = 0) -> FakeServer:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "port.txt").unlink(missing_ok=True)
        command = [sys.executable, FAKE, str(folder), "--port", str(port), *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not ((folder / "port.txt").exists() and (folder / "port.txt").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, "the fake server did not start"
            time.sleep(0.02)
        servers.append(FakeServer(folder, process, int((folder / "port.txt").read_text())))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def fast_retries(monkeypatch):
    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.01)
