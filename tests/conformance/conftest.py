"""The counting and the wandering verifier, and one trained drafter of each algorithm (made once a session)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from counting import BUILT_IN, FIXTURES, THIRD_PARTY, counted_text, counting_verifier, train_config, wandering_verifier
from transformers import AutoModelForCausalLM

from speculators.train.events import StepDone
from speculators.train.run import train


@dataclass(frozen=True)
class TrainedDrafter:
    checkpoint: Path
    losses: list[float]


@pytest.fixture(scope="session")
def third_party():
    """Makes the fixtures importable, as a `--plugins` module is."""
    if str(FIXTURES) not in sys.path:
        sys.path.insert(0, str(FIXTURES))
    import myalgo  # noqa: F401


@pytest.fixture(params=[*BUILT_IN, THIRD_PARTY])
def name(request, third_party) -> str:
    return request.param


@pytest.fixture(scope="session")
def counting_path(tmp_path_factory) -> Path:
    return counting_verifier(tmp_path_factory.mktemp("counting"))


@pytest.fixture(scope="session")
def counting(counting_path):
    return AutoModelForCausalLM.from_pretrained(counting_path).eval()


@pytest.fixture(scope="session")
def wandering_path(tmp_path_factory) -> Path:
    return wandering_verifier(tmp_path_factory.mktemp("wandering"))


@pytest.fixture(scope="session")
def wandering(wandering_path):
    return AutoModelForCausalLM.from_pretrained(wandering_path).eval()


@pytest.fixture(scope="session")
def data_path(tmp_path_factory) -> Path:
    return counted_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def trained(third_party, counting_path, data_path, tmp_path_factory):
    """Name -> the drafter that `train` made of it."""
    made: dict[str, TrainedDrafter] = {}

    def get(name: str) -> TrainedDrafter:
        if name not in made:
            losses: list[float] = []

            def listen(event):
                if isinstance(event, StepDone):
                    losses.append(event.metrics["loss"])

            config = train_config(name, counting_path, data_path, tmp_path_factory.mktemp(name))
            result = train(config, on_event=listen)
            made[name] = TrainedDrafter(result.checkpoint, losses)
        return made[name]

    return get
