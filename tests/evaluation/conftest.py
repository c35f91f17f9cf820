"""Quantised copies of the embedded verifier are written by the toys of tests/verifier."""

from __future__ import annotations

import sys
from pathlib import Path

SHARED = str(Path(__file__).parents[1] / "verifier")
if SHARED not in sys.path:
    sys.path.append(SHARED)
