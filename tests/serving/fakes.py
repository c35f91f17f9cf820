"""Starting the fake server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FAKE = str(Path(__file__).with_name("fake_server.py"))


@dataclass
class FakeServer:
    folder: Path
    process: subprocess.Popen[bytes]
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def states(self) -> Path:
        """The directory it writes to."""
        return self.folder / "states"

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

    def when_it_dies(self, action: Callable[[], object]) -> threading.Thread:
        """Wait for its end in a thread, then do that."""
        thread = threading.Thread(target=lambda: (self.process.wait(), action()))
        thread.start()
        return thread

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def launch(folder: Path, *flags: str, port: int = 0) -> FakeServer:
    """A fake server that answers; whoever starts it ends it."""
    folder.mkdir(exist_ok=True)
    (folder / "port.txt").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, FAKE, str(folder), "--port", str(port), *flags], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while not ((folder / "port.txt").exists() and (folder / "port.txt").read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the fake server did not start"
        time.sleep(0.02)
    return FakeServer(folder, process, int((folder / "port.txt").read_text()))


def speculative_config(result: dict) -> dict:
    """Of the command that `serve --dry-run` printed."""
    command = result["command"]
    return json.loads(command[command.index("--speculative-config") + 1])
