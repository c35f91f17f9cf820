"""Two ranks compute states and train with a verifier of which each holds a slice.

python split_runs.py FOLDER DATA PORTS    as a rank of torchrun: writes FOLDER/states.json, trains FOLDER/{ddp,fsdp}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from speculators.cli.app import main as command_line
from speculators.data_generation import LocalSource
from speculators.interfaces import CaptureSpec
from speculators.train.by_all_ranks import ByAllRanks
from speculators.train.distributed import Ranks, ranks_from_environment
from speculators.verifier import check_reproduces_logits, load_verifier

ALGORITHM = "eagle3"
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
NUM_LAYERS = 6
NUM_STEPS = 9
"""Not all of the second epoch: a row that not both ranks would get is left out at its end."""
CUT = 3
"""Where the runs of two ranks are stopped and continued, inside the first epoch."""
FLAGS = {
    "num-layers": 1,
    "target-layer-ids": "1 3 5",
    "total-seq-len": 64,
    "epochs": 2,
    "train-data-ratio": 0.9,
    "optimizer": "adamw",
    "scheduler-type": "none",
    "scheduler-warmup-steps": 0,
    "hidden-states-dtype": "float32",
    "hidden-states-memory-gb": 5e-5,  # half of the rows
    "log-freq": 1,
}
CAPTURE = CaptureSpec((0, 2, NUM_LAYERS), last_hidden=True)
ROWS = [[torch.arange(1, 30), torch.arange(3, 9)], [torch.arange(2, 13)]]
"""Documents of each rank."""


def save_verifiers(folder: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "head_dim": 4}
    sizes |= {"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, (config_class, model_class) in FAMILIES.items():
        torch.manual_seed(0)
        model_class(config_class(max_position_embeddings=256, **sizes)).save_pretrained(folder / name)


def states(verifier: Path, ranks: Ranks) -> dict[str, float]:
    """How far this rank's states are from the whole verifier's, on all ranks at most."""
    split = load_verifier(verifier, dtype=torch.float32, tp_size=ranks.world_size)
    whole = load_verifier(verifier, dtype=torch.float32)
    check_reproduces_logits(split)
    rows = ROWS[ranks.rank]
    ours, theirs = ByAllRanks(LocalSource(split, CAPTURE), ranks).read(rows), LocalSource(whole, CAPTURE).read(rows)
    pairs = [
        (own, other)
        for mine, other_row in zip(ours, theirs, strict=True)
        for own, other in ((mine.aux_TD, other_row.aux_TD), (mine.last_hidden_TH, other_row.last_hidden_TH))
    ]
    of_rank = max(float((own - other).abs().max()) for own, other in pairs)
    sliced, full = (model.get_parameter("model.layers.1.mlp.up_proj.weight") for model in (split, whole))
    return {
        "difference": max(ranks.gather_objects(of_rank)),
        "largest": max(float(other.abs().max()) for _, other in pairs),
        "slice": sliced.to_local().numel(),
        "whole": full.numel(),
    }


def flags(verifier: Path, data: Path, output: Path, num_steps: int, *more: str) -> list[str]:
    """The command of a run, of its first steps alone."""
    paths = {"verifier": verifier, "data": data, "output": output, "max-steps": num_steps}
    settings = {**paths, "speculator-type": ALGORITHM, **FLAGS}
    words = [word for key, value in settings.items() for word in (f"--{key}", *str(value).split())]
    return ["train", *words, "--no-parity-gate", "--no-contract-check", *more]


def main(folder: Path, data: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    with ranks_from_environment(60.0) as ranks:
        found = {name: states(folder / name, ranks) for name in FAMILIES}
        if ranks.is_main:
            (folder / "states.json").write_text(json.dumps(found))
    for kind, more in {"ddp": [], "fsdp": ["--fsdp-shard"]}.items():
        for num_steps in (CUT, NUM_STEPS):
            os.environ["MASTER_PORT"] = ports.pop()  # each command is a run of its own
            words = flags(folder / "llama", data, folder / kind, num_steps, "--verifier-tp", *more)
            assert command_line(words) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
