"""A ninth algorithm as a third party would ship it: a distribution of its own, found by its entry point.

tests/fixtures/myalgo was written from docs/adding-an-algorithm.md. It is installed here under another module name; the
package is not told of it, and no file of the package names it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from counting import FIXTURES

import speculators

JOURNEY = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from speculators import SpeculatorModel
from speculators.decoding import Engine, SamplingParams
from speculators.train.config import TrainConfig
from speculators.train.run import train

torch.set_num_threads(1)
verifier_path, data_path, save_path = sys.argv[1:]
known = "myalgo" in SpeculatorModel.available_names(), "acme_drafters" in sys.modules
result = train(TrainConfig.resolve([
    "--speculator-type", "myalgo", "--verifier-name-or-path", verifier_path, "--data-path", data_path, "--save-path",
    save_path, "--total-seq-len", "64", "--lr", "0.01", "--epochs", "10", "--checkpoint-freq", "1000", "--optimizer",
    "adamw",
]))
verifier = AutoModelForCausalLM.from_pretrained(verifier_path).eval()
prompts, sampling = [[3, 4, 5], [7, 8]], SamplingParams(max_tokens=20)
plain = Engine(verifier, max_batch_size=2).generate(prompts, sampling)
engine = Engine(verifier, {"model": str(result.checkpoint)}, max_batch_size=2)
drafted = engine.generate(prompts, sampling)
print(json.dumps({
    "known_before_it_was_imported": known,
    "module": type(SpeculatorModel.from_pretrained(result.checkpoint)).__module__,
    "expected": result.acceptance_length, "measured": engine.stats.acceptance_length,
    "lossless": [output.token_ids for output in plain] == [output.token_ids for output in drafted],
}))
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """A directory of installed packages with the third party's in it."""
    site = tmp_path / "site-packages"
    shutil.copytree(FIXTURES / "myalgo", site / "acme_drafters" / "myalgo")
    (site / "acme_drafters" / "__init__.py").touch()
    info = site / "acme_drafters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-drafters\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[speculators.models]\nmyalgo = acme_drafters.myalgo\n")
    return site


def test_it_trains_saves_loads_and_drafts_without_the_package_knowing_of_it(
    installed, counting_path, data_path, tmp_path
):
    journey = subprocess.run(
        [sys.executable, "-c", JOURNEY, str(counting_path), str(data_path), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert journey.returncode == 0, journey.stderr[-3000:]
    seen = json.loads(journey.stdout.splitlines()[-1])
    assert seen["known_before_it_was_imported"] == [True, False]
    assert seen["module"] == "acme_drafters.myalgo.core"
    assert seen["lossless"]
    # a verifier that counts can be learnt in full: one draft a round, accepted
    assert seen["expected"] == pytest.approx(2.0, abs=0.1) and seen["measured"] > 1.9


def test_no_file_of_the_package_names_it():
    source = Path(speculators.__file__).parent
    naming = [file for file in source.rglob("*.py") if "myalgo" in file.read_text()]
    assert naming == [source / "models" / "__init__.py"]  # the guide's example
