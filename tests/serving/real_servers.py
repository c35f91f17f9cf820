"""Starting a real vLLM server on CPU by our own verbs, as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ports import free_port

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("SPECULATORS_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
SMALL = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20)]
READY_TIMEOUT_S = 420
STOP_TIMEOUT_S = 60


class RealServer:
    """`speculators VERB ... -- VLLM_ARGS`. Whoever makes one stops it."""

    def __init__(self, folder: Path, verb: list[str], vllm_args: list[str], port: int | None = None) -> None:
        assert Path(VLLM_PYTHON).exists(), f"{VLLM_PYTHON} does not exist; `make test-vllm` makes vLLM's environment"
        self.folder, self.verb, self.vllm_args = folder, verb, vllm_args
        self.port = port or free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}/v1"
        self.log = folder / f"{verb[0]}-{time.monotonic_ns()}.log"
        command = [
            sys.executable,
            "-m",
            "speculators",
            *verb,
            "--python",
            VLLM_PYTHON,
            "--ready-timeout",
            str(READY_TIMEOUT_S),
            "--",
            "--port",
            str(self.port),
            *SMALL,
            *vllm_args,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # spinning threads cost several times the work itself
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def again(self) -> RealServer:
        """The same command once more, on the same port."""
        return RealServer(self.folder, self.verb, self.vllm_args, self.port)

    def wait_until_ready(self) -> RealServer:
        while "ready after" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.5)
        return self

    @property
    def front_end(self) -> int:
        """vLLM's first process, the one child of the launcher; also the number of its process group."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def kill_front_end(self) -> int:
        group = self.front_end
        os.kill(group, signal.SIGKILL)
        return group

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(STOP_TIMEOUT_S)
