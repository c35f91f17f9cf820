"""`diagnose --server` on a real vLLM: nothing on the drafter that it should serve, and each fault of what it serves.

`pytest -m vllm tests/serving/test_diagnose_vllm.py`. Everything is greedy and fp32, so that our engine and vLLM accept
the same drafts for each prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from diagnosis_toys import LAYERS, VERIFIER, Toys, copy_of, make_toys
from real_servers import RealServer

from speculators.cli.app import main

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return make_toys(tmp_path_factory.mktemp("toys"))


@contextmanager
def serving(folder: Path, checkpoint: Path) -> Iterator[str]:
    server = RealServer(folder, ["serve", str(checkpoint), "-k", "3"], ["--max-model-len", "512"])
    try:
        yield server.wait_until_ready().endpoint
    finally:
        server.stop()


def diagnosed(toys: Toys, checkpoint: Path, server: str, capsys, *flags: str) -> tuple[int, dict]:
    """The exit code, and the report."""
    small = ["--data", str(toys.prompts), "--limit", "5", "--max-tokens", "24", "--num-samples", "16", *flags]
    capsys.readouterr()
    code = main(["diagnose", str(checkpoint), "--verifier", VERIFIER, "--server", server, "--json", *small])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_nothing_is_found_on_the_served_drafter_and_another_k_is_named(toys, tmp_path, capsys):
    with serving(tmp_path, toys.healthy) as server:
        code, found = diagnosed(toys, toys.healthy, server, capsys, "--data", str(toys.data))
        assert (code, found["causes"]) == (0, [])
        measured = found["measured"]
        assert measured["accepted by position, server"] == pytest.approx(measured["accepted by position, our engine"])
        code, found = diagnosed(toys, toys.healthy, server, capsys, "-k", "2")
        assert (code, found["causes"][0]["name"]) == (1, "draft-tokens")


def test_layers_that_the_served_config_names_wrongly_are_found(toys, tmp_path, capsys):
    copy = copy_of(toys, tmp_path / "copy", config=lambda values: values.update({LAYERS: [3, 7, 10]}))
    with serving(tmp_path, copy) as server:
        for checkpoint in (toys.healthy, copy):  # the one that should be served, and the one that is
            code, found = diagnosed(toys, checkpoint, server, capsys, "--data", str(toys.data))
            assert (code, found["causes"][0]["name"]) == (1, "aux-layers")
