"""Fake servers that end with the test, and retries without their waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fakes import FakeServer, launch

from speculators.data_generation import vllm_client


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
