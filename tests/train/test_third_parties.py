"""Algorithms of third parties train by the command, whichever way they were written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toys import HIDDEN_SIZE, VOCAB_SIZE, random_batch
from transformers import LlamaConfig

from speculators import SpeculatorModel
from speculators.cli.app import run

sys.path.insert(0, str(Path(__file__).parent))


def train_one_step(name, verifier_path, data_path, tmp_path, *flags):
    settings = {
        "speculator-type": name,
        "plugins": "third_parties",
        "verifier-name-or-path": verifier_path,
        "data-path": data_path,
        "save-path": tmp_path / "run",
        "total-seq-len": 64,
        "max-steps": 1,
        "draft-arch": "llama",
        "target-layer-ids": 1,
    }
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    answer = run(["train", *argv, "--no-parity-gate", "--no-contract-check", *flags])
    assert answer["num_steps"] == 1 and torch.isfinite(torch.tensor(answer["metrics"]["loss"]))
    return Path(answer["checkpoint"]), answer


@pytest.mark.parametrize("name", ["own_serializer", "three_columns", "hooked"])
def test_each_trains_by_the_command_and_loads(name, verifier_path, data_path, tmp_path):
    path, _ = train_one_step(name, verifier_path, data_path, tmp_path)
    model = SpeculatorModel.from_pretrained(path)
    assert type(model).__module__ == "third_parties" and model.config.speculators_model_type == name


def test_a_field_serializer_of_any_name_writes_config_json(verifier_path, data_path, tmp_path):
    path, _ = train_one_step("own_serializer", verifier_path, data_path, tmp_path)
    nested = json.loads((path / "config.json").read_text())["transformer_layer_config"]
    assert nested["written_by"] == "a third party" and nested["hidden_size"] == HIDDEN_SIZE


def test_without_one_the_nested_config_is_written_complete(verifier_path, data_path, tmp_path):
    path, _ = train_one_step("three_columns", verifier_path, data_path, tmp_path)
    nested = json.loads((path / "config.json").read_text())["transformer_layer_config"]
    assert nested["model_type"] == "llama" and nested["vocab_size"] == VOCAB_SIZE and "written_by" not in nested


def test_the_guides_algorithm_trains_as_it_is_printed(verifier_path, data_path, tmp_path):
    """In a process of its own: its name is that of another toy."""
    guide = (Path(__file__).parents[2] / "docs" / "adding-an-algorithm.md").read_text()
    (tmp_path / "myalgo.py").write_text(guide.split("```python\n")[1].split("```")[0])
    [command] = [line.strip() for line in guide.splitlines() if line.startswith("    speculators train")]
    argv = [*command.replace("MODEL", str(verifier_path)).split()[1:-1], str(data_path)]
    flags = ["--save-path", str(tmp_path / "run"), "--total-seq-len", "64", "--max-steps", "2", "--hint", "0.25"]
    code = "import sys; from speculators.cli.app import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run(
        [sys.executable, "-c", code, *argv, *flags, "--no-parity-gate", "--no-contract-check"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    answer = json.loads(ended.stdout.splitlines()[-1])
    assert answer["num_steps"] == 2 and answer["acceptance_length"] >= 1.0
    written = json.loads((Path(answer["checkpoint"]) / "config.json").read_text())
    assert written["speculators_model_type"] == "myalgo" and written["draft_vocab_size"] == VOCAB_SIZE


def test_typed_hooks_get_the_flag_or_the_default_by_every_door(verifier_path, data_path, tmp_path):
    path, answer = train_one_step("hooked", verifier_path, data_path, tmp_path, "--depth-weight", "0.25")
    assert answer["metrics"]["weight"] == 0.25 and SpeculatorModel.from_pretrained(path).config.trained_with == 0.25

    hooked = SpeculatorModel.get_class("hooked")
    layers = LlamaConfig(vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, num_attention_heads=2)
    model = hooked.from_training_args(layers, verifier_name_or_path=str(verifier_path))
    assert model.config.trained_with == 0.5
    assert hooked.get_trainer_kwargs()[0]["depth_weight"] == 0.5
    batch = {**random_batch(0), "hidden_states": torch.randn(1, 24, HIDDEN_SIZE)}
    default, given = model(**batch), model(**batch, depth_weight=2.0)
    assert default[2]["weight_sum"] == 0.5 and default[2]["loss_total"] == 1.0
    torch.testing.assert_close(given[1], 4.0 * default[1])
    with pytest.raises(ValueError, match=r"depth_weight=-1.0: .*greater than 0"):
        model(**batch, depth_weight=-1.0)
