"""scripts/install_arctic_inference.sh where it cannot build: said, and no failure. Building is left to `make`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "install_arctic_inference.sh"


def test_without_a_compiler_it_says_what_will_be_skipped(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    finished = subprocess.run(
        [SCRIPT, tmp_path], env={**os.environ, "CXX": "no-such-compiler"}, capture_output=True, text=True
    )
    assert finished.returncode == 0
    assert f"not installed in {tmp_path} (no C++ compiler: no-such-compiler): tests of suffix" in finished.stderr
    assert subprocess.run([SCRIPT], capture_output=True).returncode != 0
