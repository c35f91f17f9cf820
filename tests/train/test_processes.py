"""What needs a process of its own: the command, several ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from training_toys import FIXTURES

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


def test_the_script_of_the_guide_trains_and_prints_the_checkpoint(tmp_path, verifier_path, data_path):
    command = [sys.executable, str(SCRIPT), *flags(verifier_path, data_path, tmp_path / "run")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).joinpath("config.json").exists()


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
    command = [sys.executable, str(SCRIPT), *estimating]
    environment = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0] and told[1] == ""
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


def curve(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_two_ranks_learn_what_one_learns_from_two_rows_a_step(tmp_path, verifier_path, data_path):
    """The rows of a step count by their supervised tokens, whoever computes them."""
    code = (
        "import sys, torch\n"
        "from speculators.train.__main__ import main\n"
        "torch.set_num_threads(1)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    common = ["--max-steps", "8", "--scheduler-type", "none", "--no-parity-gate", "--no-contract-check"]
    common += ["--optimizer", "adamw", "--log-freq", "1", "--total-seq-len", "64", "--hidden-states-dtype", "float32"]
    common += ["--verifier", str(verifier_path), "--data", str(data_path), "--epochs", "2", "--draft-arch", "llama"]

    def start(name: str, *more: str, **environment: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", code, "--output", str(tmp_path / name), *common, *more]
        return subprocess.Popen(argv, env={**ENVIRONMENT, **environment}, stdout=subprocess.DEVNULL)

    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start("two", **both, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    processes.append(start("one", "--gradient-accumulation-steps", "2"))
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    two, one = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert len(two) == len(one) == 8
    assert max(abs(a - b) for a, b in zip(two, one, strict=True)) < 1e-5
    weights = [load_file(tmp_path / name / "checkpoint_best" / "master_weights.fp32") for name in ("two", "one")]
    assert all((weights[0][name] - tensor).abs().max() < 1e-5 for name, tensor in weights[1].items())


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_two_ranks_see_different_rows_and_end_with_the_same_weights(tmp_path, verifier_path, data_path):
    distributed = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    code = (
        "import sys, torch\n"
        "from speculators.train import run\n"
        "from speculators.train.config import TrainConfig\n"
        "from speculators.train.distributed import ranks_from_environment\n"
        "torch.set_num_threads(1)\n"
        "with ranks_from_environment() as ranks:\n"
        "    trainer = run.build(TrainConfig.resolve(sys.argv[2:]), ranks, lambda event: None).trainer\n"
        "    trainer.run_training()\n"
        "    seen = trainer.train_loader.sampler.rows()\n"
        "    torch.save((seen, trainer.model.state_dict()), f'{sys.argv[1]}/{ranks.rank}')\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path), *flags(verifier_path, data_path, tmp_path / "run")]
    ranks = [subprocess.Popen(argv, env={**distributed, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    (rows0, weights0), (rows1, weights1) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert not {index for row in rows0 for index in row} & {index for row in rows1 for index in row}
    assert all(torch.equal(weights0[name], weights1[name]) for name in weights0)
    saved = load_file(tmp_path / "run" / "1" / "master_weights.fp32")
    assert all(torch.equal(saved[name], weights0[name]) for name in saved)
