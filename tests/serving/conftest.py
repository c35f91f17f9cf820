"""Fake servers that end with the test, retries without their waits, and what `serve` is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fakes import FakeServer, launch

from speculators import assets
from speculators.data_generation import vllm_client

SHARED = str(Path(__file__).parents[1] / "evaluation")
if SHARED not in sys.path:  # the drafter of the tests of `diagnose`
    sys.path.append(SHARED)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def start_fake(tmp_path) -> Iterator[Callable[..., FakeServer]]:
    """start_fake("--slots", "4", ..., name=..., port=...): a running fake server."""
    servers: list[FakeServer] = []

    def start(*flags: str, name: str = "fake", port: int = 0) -> FakeServer:
        servers.append(launch(tmp_path / name, *flags, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture
def fast_retries(monkeypatch):
    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.01)


@pytest.fixture
def fake_environment(tmp_path, monkeypatch) -> Path:
    """A Python that has a distribution named vllm 0.32.0+cpu, and nothing else of it."""
    monkeypatch.delenv("SPECULATORS_VLLM_PYTHON", raising=False)
    folder = tmp_path / "environment"
    metadata = folder / "site" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def verifier() -> str:
    return str(assets.tiny_verifier_path())


@pytest.fixture
def speculator(tmp_path, verifier) -> str:
    """What `serve` reads of a checkpoint: its config.json."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.proposals import GreedyTokenProposalConfig

    config = Eagle3SpeculatorConfig(
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=5)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_pretrained(verifier),
        )
    )
    config.save_pretrained(tmp_path / "speculator")
    return str(tmp_path / "speculator")
