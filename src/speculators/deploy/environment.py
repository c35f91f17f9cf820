"""Finding vLLM: in a named environment, in this one, or behind the `vllm` command. Nothing of it is imported here.

vLLM pins its own torch, so it often lives in an environment of its own. Its version is asked of that environment's
Python through package metadata, which takes milliseconds and loads no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PYTHON_VARIABLE = "SPECULATORS_VLLM_PYTHON"
TESTED_VERSION = "0.32"
QUERY_TIMEOUT_S = 60.0
"""A cold Python on a network disk is slow; more than this is a hang."""
QUERY = "import importlib.metadata as m; print(m.version('vllm'))"


@dataclass(frozen=True)
class VllmEnvironment:
    """A Python that has vLLM."""

    python: Path
    version: str

    @property
    def command(self) -> list[str]:
        """What `vllm` is called here: its script beside that Python, else the module behind the script."""
        script = self.python.parent / "vllm"
        return [str(script)] if script.is_file() else [str(self.python), "-m", "vllm.entrypoints.cli.main"]

    @property
    def is_tested_version(self) -> bool:
        return self.version.startswith((f"{TESTED_VERSION}.", f"{TESTED_VERSION}+")) or self.version == TESTED_VERSION


def find_vllm(python: str | None = None) -> VllmEnvironment:
    """`python`: an interpreter or its environment's directory. Else $SPECULATORS_VLLM_PYTHON, this Python, `vllm`."""
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
    """The interpreter itself; of an environment's directory, the one in its bin/. Links stay: they make the venv."""
    path = Path(named).expanduser().absolute()
    if path.is_dir():
        path = path / "bin" / "python"
    if not path.is_file():
        found = shutil.which(named)
        if found is None:
            raise ValueError(f"{named} is no Python: give an interpreter, or the directory of its environment")
        path = Path(found)
    return path


def version_in(python: Path) -> str | None:
    """Version of vllm that this Python would run; None when it has none or does not run."""
    try:
        answer = subprocess.run([python, "-c", QUERY], capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def python_behind_the_command() -> Path | None:
    """The interpreter in the first line of the `vllm` script on PATH."""
    script = shutil.which("vllm")
    if script is None:
        return None
    with open(script, "rb") as file:
        first = file.readline().decode(errors="replace").strip()
    interpreter = first.removeprefix("#!").split(" ")[0]
    return Path(interpreter) if first.startswith("#!") and Path(interpreter).is_file() else None
