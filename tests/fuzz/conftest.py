"""Property tests of everything that other people write. `make fuzz` runs many cases, drawn anew each time; CI few, the
same ones."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from fuzz_toys import ALGORITHMS, save_checkpoint, save_verifier
from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("SPECULATORS_FUZZ_CASES", "0"))
"""Cases of each property; 0: as in CI."""

PLAIN = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("ci", PLAIN, max_examples=40, derandomize=True)
settings.register_profile("fuzz", PLAIN, max_examples=max(CASES, 1))
settings.load_profile("fuzz" if CASES else "ci")


@pytest.fixture(autouse=True)
def nothing_asks_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def verifier(tmp_path_factory) -> str:
    return save_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, verifier) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(name, root / name, verifier) for name in ALGORITHMS}
