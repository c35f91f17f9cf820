"""Two ranks compute states and train with a verifier of which each holds a slice.

python split_runs.py FOLDER DATA    as a rank of torchrun: writes FOLDER/found.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from speculators.data_generation import LocalSource
from speculators.interfaces import CaptureSpec
from speculators.train import run
from speculators.train.by_all_ranks import ByAllRanks
from speculators.train.config import TrainConfig
from speculators.train.distributed import Ranks, ranks_from_environment
from speculators.train.events import Event, StepDone, Validated
from speculators.verifier import check_reproduces_logits, load_verifier

ALGORITHM = "eagle3"
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
NUM_LAYERS = 6
NUM_STEPS = 9
"""Not all of the second epoch: a row that not both ranks would get is left out at its end."""
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


def losses(verifier: Path, data: Path, output: Path, ranks: Ranks, **changes: Any) -> list[tuple[str, float]]:
    """Of every training step and validation, in order."""
    found: list[tuple[str, float]] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone | Validated):
            found.append((type(event).__name__, event.metrics["loss"]))

    settings: dict[str, Any] = {
        "speculator_type": ALGORITHM,
        "verifier_name_or_path": str(verifier),
        "data_path": str(data),
        "save_path": str(output),
        "num_layers": 1,
        "target_layer_ids": [1, 3, 5],
        "total_seq_len": 64,
        "epochs": 2,
        "max_steps": NUM_STEPS,
        "train_data_ratio": 0.9,
        "optimizer": "adamw",
        "scheduler_type": "none",
        "hidden_states_dtype": "float32",
        "hidden_states_memory_gb": 5e-5,  # half of the rows
        "gradient_accumulation_steps": 2 // ranks.world_size,
        **changes,
    }
    run.build(TrainConfig.from_flat(settings), ranks, listen).trainer.run_training()
    return found


def main(folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    with ranks_from_environment(60.0) as ranks:
        found: dict[str, Any] = {"states": {name: states(folder / name, ranks) for name in FAMILIES}}
        for kind in ("ddp", "fsdp"):
            changes = {"verifier_tp": True, "fsdp_shard": kind == "fsdp"}
            found[kind] = losses(folder / "llama", data, folder / kind, ranks, **changes)
        if ranks.is_main:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
