"""What needs a process of its own: the command, several ranks."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import free_port
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training_toys import FIXTURES, HIDDEN_SIZE, VOCAB_SIZE, run_on_two_ranks

from speculators.interfaces import VerifierStates
from speculators.model import SpeculatorModel
from speculators.train.__main__ import main
from speculators.train.config import TrainConfig
from speculators.train.run import estimate
from speculators.utils.report import human_bytes

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SEARCHED = os.pathsep.join([str(FIXTURES), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "PYTHONPATH": SEARCHED, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def flags(verifier_path, data_path, save_path, *more: str) -> list[str]:
    return [
        "--speculator-type",
        "myalgo",
        "--plugins",
        "myalgo",
        "--verifier-name-or-path",
        str(verifier_path),
        "--num-layers",
        "1",
        "--block-size",
        "8",
        "--data-path",
        str(data_path),
        "--save-path",
        str(save_path),
        "--epochs",
        "2",
        "--draft-arch",
        "llama",
        "--total-seq-len",
        "64",
        "--hidden-states-dtype",
        "float32",
        *more,
    ]


def test_the_script_of_the_guide_trains_and_prints_the_checkpoint(
    tmp_path, verifier_path, data_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags(verifier_path, data_path, tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    assert Path(capsys.readouterr().out.strip()).joinpath("config.json").exists()


def test_the_line_of_the_readme_trains_on_two_ranks(tmp_path, verifier_path, data_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [line] = [line for line in readme.splitlines() if line.startswith("torchrun ")]
    line = line.replace("MODEL", str(verifier_path)).replace("--data data", f"--data {data_path}")
    words = line.replace("--output run", f"--output {tmp_path / 'run'}").split()
    assert words[:4] == ["torchrun", "--standalone", "--nproc-per-node", "2"]
    small = ["--max-steps", "2", "--total-seq-len", "64", "--draft-arch", "llama", "--hidden-states-dtype", "float32"]
    started = [sys.executable, "-m", "torch.distributed.run", *words[1:], *small]
    done = subprocess.run(started, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "run" / "checkpoint_best" / "config.json").read_text())
    assert state["speculators_model_type"] == "eagle3"
    assert len(curve(tmp_path / "run")) == 2


def test_of_sharded_ranks_the_memory_of_one_is_estimated(tmp_path, verifier_path, data_path):
    words = flags(verifier_path, data_path, tmp_path / "run")
    alone = estimate(TrainConfig.resolve(words)).memory
    estimating = [*words, "--estimate", "--fsdp-shard"]
    in_one_process = estimate(TrainConfig.resolve([*estimating, "--estimate-ranks", "2"])).memory
    told = run_on_two_ranks(SCRIPT, *estimating, folder=tmp_path, timeout_s=120)
    assert told[1] == ""
    shown = {cells[1].strip(): cells[2].strip() for line in told[0].splitlines() if len(cells := line.split("│")) == 4}
    assert shown["weights"] == shown["gradients"] == human_bytes(alone.weights_bytes / 2)
    assert shown["frozen"] == human_bytes(alone.frozen_bytes)
    assert {use: shown[use] for use in in_one_process.uses()} == {
        use: human_bytes(num_bytes) for use, num_bytes in in_one_process.uses().items()
    }
    assert not (tmp_path / "run").exists()


def test_wrong_flags_and_wrong_input_end_with_one_line_and_a_code(capsys):
    assert main(["--verifier-name-or-path", "m", "--epoch", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown flag --epoch. Did you mean '--epochs'?")
    assert main(["--verifier-name-or-path", "/no/such/model"]) == 2
    assert capsys.readouterr().err.startswith("error: no verifier at '/no/such/model': it does not exist")


def curve(run: Path) -> list[tuple[int, float]]:
    """Step and loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]


def test_two_ranks_then_one_then_two_again_train_as_one_that_nobody_stopped(tmp_path, verifier_path, data_path):
    """The rows of a step count by their supervised tokens, whoever computes them, and each part of a run reads what the
    one before it left: by DistributedDataParallel, and by FSDP2, whose parts one process reads and replaces."""
    common = [*FIXED, "--verifier", str(verifier_path), "--data", str(data_path)]
    runs = {"ddp": [], "fsdp": ["--fsdp-shard"]}

    def until(num_steps: int, name: str, *more: str) -> list[str]:
        return [*common, *runs.get(name, []), "--output", str(tmp_path / name), "--max-steps", str(num_steps), *more]

    assert main(until(6, "whole", "--gradient-accumulation-steps", "2")) == 0
    on_two_ranks(tmp_path, [until(2, name) for name in runs])
    assert all((tmp_path / name / "0" / "sharded_state").is_dir() == (name == "fsdp") for name in runs)
    assert [main(until(4, name)) for name in runs] == [0, 0]
    assert not any((tmp_path / name / "0" / "sharded_state").exists() for name in runs)
    on_two_ranks(tmp_path, [until(6, name) for name in runs])

    whole, drafted = trained(tmp_path / "whole"), drafts(tmp_path / "whole")
    assert len(set(map(tuple, drafted))) > 4
    for name in runs:
        assert [step for step, _ in curve(tmp_path / name)] == [1, 2, 3, 4, 5, 6]
        pairs = zip(curve(tmp_path / name), curve(tmp_path / "whole"), strict=True)
        assert max(abs(loss - of_whole) for (_, loss), (_, of_whole) in pairs) < 1e-5
        left = trained(tmp_path / name)
        assert left.keys() == whole.keys() and all((left[key] - whole[key]).abs().max() < 1e-5 for key in whole)
        assert drafts(tmp_path / name) == drafted


FIXED = ["--scheduler-type", "none", "--scheduler-warmup-steps", "0", "--optimizer", "adamw", "--log-freq", "1"]
FIXED += ["--total-seq-len", "64", "--hidden-states-dtype", "float32", "--epochs", "2", "--draft-arch", "llama"]
FIXED += ["--no-parity-gate", "--no-contract-check"]
COMMANDS = """
import json, os, sys
from speculators.train.__main__ import main
for port, words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)  # each command is a run of its own
    if code := main(words):
        sys.exit(code)
"""


def on_two_ranks(folder: Path, commands: list[list[str]]) -> None:
    """Runs one command after the other on the same two ranks."""
    script = folder / "commands.py"
    script.write_text(COMMANDS)
    run_on_two_ranks(script, json.dumps([(free_port(), words) for words in commands]), folder=folder, timeout_s=300)


def trained(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights that the last steps left, as torch's own converter reads parts of several ranks."""
    newest = max(run.glob("[0-9]"))
    if not (newest / "sharded_state").is_dir():
        return load_file(newest / "master_weights.fp32")
    whole = run / "whole.pt"
    dcp_to_torch_save(newest / "sharded_state", whole)
    read = torch.load(whole)
    return {name.removeprefix("weights/"): tensor for name, tensor in read.items() if name.startswith("weights/")}


def drafts(run: Path) -> list[list[int]]:
    """What the checkpoint for serving drafts after random states and tokens."""
    model = SpeculatorModel.from_pretrained(max(run.glob("[0-9]")), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    drafted = []
    for length in range(4, 20):
        states = VerifierStates(
            torch.randint(0, VOCAB_SIZE, (length,), generator=generator),
            torch.randn(length, len(model.capture.aux_layer_ids) * HIDDEN_SIZE, generator=generator),
            torch.randn(length, HIDDEN_SIZE, generator=generator),
        )
        with torch.no_grad():
            drafted.append(model.draft_logits(states, 2).argmax(-1).flatten().tolist())
    return drafted
