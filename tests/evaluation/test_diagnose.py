"""`diagnose` names each seeded fault first, and finds nothing on a healthy drafter."""

from __future__ import annotations

from pathlib import Path

import pytest
from diagnosis_toys import (
    LAYERS,
    Toys,
    copy_of,
    make_holes,
    make_toys,
    narrow_window,
    perturbed_verifier,
    roll_fc,
    set_rope_theta,
    shift_map,
    with_masks,
)

from speculators.data_generation.prepared import PreparedData


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return make_toys(tmp_path_factory.mktemp("toys"))


def test_nothing_is_found_on_the_healthy_drafter(toys):
    found = toys.diagnose(toys.healthy)
    assert found.healthy and found.sentence() == "nothing found"
    assert found.measured["acceptance length"] > 2


SEEDED_FILES = {
    "aux-layers": {"config": lambda values: values.update({LAYERS: [i + 1 for i in values[LAYERS]]})},
    "rope": {"config": set_rope_theta},
    "context": {"config": narrow_window},
    "norms": {"tensors": lambda w: w["layers.0.hidden_norm.weight"].sub_(1)},
    "aux-order": {"tensors": roll_fc},
    "options": {"config": lambda values: values.update(norm_before_residual=not values["norm_before_residual"])},
    "vocabulary-map": {"tensors": shift_map},
    "embedding": {"tensors": lambda w: w.update({"embed_tokens.weight": w["embed_tokens.weight"].flip(0)})},
}


@pytest.mark.parametrize("cause", SEEDED_FILES)
def test_a_fault_of_the_files_is_found_without_their_record(toys, tmp_path, cause):
    found = toys.diagnose(copy_of(toys, tmp_path / "copy", **SEEDED_FILES[cause]))
    assert found.first == cause


def of_masks(toys: Toys, tmp_path: Path) -> dict:
    """The questions are supervised, the answers are not."""
    return {"data": [toys.prompts, with_masks(toys, tmp_path / "data", lambda mask: [1 - bit for bit in mask])]}


def of_masks_one_late(toys: Toys, tmp_path: Path) -> dict:
    return {"data": [toys.prompts, with_masks(toys, tmp_path / "data", lambda mask: [0, *mask[:-1]])]}


SEEDED_CONDITIONS = {
    "mask": of_masks,
    "mask one late": of_masks_one_late,
    "temperature": lambda toys, tmp_path: {"temperature": 1.0},
    "inactive": lambda toys, tmp_path: {"num_speculative_tokens": 0},
    "inactive method": lambda toys, tmp_path: {"engine_config": {"method": "ngram", "num_speculative_tokens": 3}},
    "verifier": lambda toys, tmp_path: {"verifier": perturbed_verifier(tmp_path / "verifier")},
}


@pytest.mark.parametrize("cause", SEEDED_CONDITIONS)
def test_a_fault_of_the_conditions_is_found(toys, tmp_path, cause):
    found = toys.diagnose(toys.healthy, **SEEDED_CONDITIONS[cause](toys, tmp_path))
    assert found.first == cause.split()[0]


def test_holes_of_the_draft_vocabulary_are_found(toys, tmp_path):
    counts = PreparedData.open(toys.data).token_freq()
    tokens = sorted(counts, key=lambda token: -counts[token])[8:40]
    found = toys.diagnose(copy_of(toys, tmp_path / "copy", tensors=lambda w: make_holes(w, tokens)))
    assert found.first == "vocabulary-holes"
