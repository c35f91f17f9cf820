"""One server of the embedded verifier for all tests of this folder: ngram and suffix draft, up to 6 tokens."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from speculators import assets
from speculators.decoding import Engine
from speculators.local_server.app import LocalServer
from speculators.local_server.protocol import ServeConfig

NGRAM = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SUFFIX = {"method": "suffix", "num_speculative_tokens": 6}


@pytest.fixture(scope="session")
def plain() -> Engine:
    """The verifier without drafts: what every text is compared with."""
    return Engine.from_pretrained(str(assets.tiny_verifier_path()), max_length=512)


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine.from_pretrained(
        str(assets.tiny_verifier_path()), NGRAM, other_methods=[SUFFIX], max_batch_size=4, max_length=512
    )


@pytest.fixture(scope="session")
def server(engine: Engine) -> Iterator[LocalServer]:
    config = ServeConfig(port=0, model_name="tiny", max_waiting=8, max_body_bytes=20_000, playground=True)
    with LocalServer(engine, config, model=str(assets.tiny_verifier_path())) as running:
        yield running


@pytest.fixture
def http(server: LocalServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
