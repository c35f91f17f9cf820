"""Two ranks, or one, train all drafters one after the other on rows that a test made.

python ranked_runs.py FOLDER    as a rank of torchrun: writes FOLDER/ranks.json and checkpoints
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from device_toys import DRAFTERS, make_drafter, row_of
from drafter_toys import randomise
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from speculators.model import SpeculatorModel
from speculators.train.distributed import Ranks, ranks_from_environment
from speculators.train.events import Event, StepDone, ignore
from speculators.train.records import TrainerConfig
from speculators.train.trainer import Trainer

ALL = (*DRAFTERS, "medusa", "mlp")
NUM_ROWS = 6


def make(algorithm: str, verifier: Path) -> SpeculatorModel:
    if algorithm in DRAFTERS:
        return make_drafter(algorithm, verifier)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(verifier)
    name = str(verifier)
    model = SpeculatorModel.get_class(algorithm).from_training_args(config, verifier_name_or_path=name)
    randomise(model)
    return model


class Rows:
    """The share of one rank; what a row draws depends on the row alone."""

    num_repeated = 0

    def __init__(self, algorithm: str, ranks: Ranks):
        kind = algorithm if algorithm in DRAFTERS else "eagle"
        rows = [row_of(kind, [9, 1, 14 + i], seed=i, padding=3, supervised=0.3 + 0.1 * i) for i in range(NUM_ROWS)]
        self.rows = list(enumerate(rows))[ranks.rank :: ranks.world_size]

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        pass

    def batches(self, first: int = 0):
        for seed, row in self.rows[first:]:
            torch.manual_seed(seed)
            yield dict(row)


def trainer_of(algorithm: str, verifier: Path, save_path: Path, ranks: Ranks, losses: list[float], **changes: Any):
    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.metrics["loss"])

    model = make(algorithm, verifier)
    keywords, _ = type(model).get_trainer_kwargs(**DRAFTERS.get(algorithm, {}))
    settings: dict[str, Any] = {
        "lr": 1e-2,
        "num_epochs": 1,
        "scheduler_type": "none",
        "hidden_states_dtype": torch.float32,
        "gradient_accumulation_steps": 2 // ranks.world_size,
        "train_call_kwargs": keywords,
        **changes,
    }
    config = TrainerConfig(save_path=save_path, **settings)
    return Trainer(model, config, Rows(algorithm, ranks), ranks=ranks, on_event=listen if ranks.is_main else ignore)


def curves(folder: Path, kind: str, ranks: Ranks) -> dict[str, list[float]]:
    """Losses of each step by algorithm; leaves FOLDER/KIND/ALGORITHM."""
    found: dict[str, list[float]] = {}
    for algorithm in ALL:
        trainer = trainer_of(
            algorithm,
            folder / "verifier",
            folder / kind / algorithm,
            ranks,
            found.setdefault(algorithm, []),
            fsdp_shard=kind == "fsdp",
        )
        trainer.run_training()
    return found


def collectives(folder: Path, kind: str, ranks: Ranks) -> list[list[str]]:
    """What begins during each of two rows of one step, in order: collectives, and `gradient` where one is complete.

    Two steps before it are not looked at: DistributedDataParallel forms its buckets in the order that it sees in the
    first, and agrees on them at the begin of the second.
    """
    settings: dict[str, Any] = {"fsdp_shard": kind == "fsdp", "optimizer": "muon"}
    trainer = trainer_of("medusa", folder / "wide", folder / f"profiled_{kind}", ranks, [], **settings)
    first, *both = trainer.train_loader.batches()
    for _ in range(2):
        trainer.backward(first, is_last=True)
        trainer.step()
    rows = []
    for batch, is_last in zip(both, (False, True), strict=True):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            trainer.backward(batch, is_last)
        events = sorted(profiled.events(), key=lambda event: event.time_range.start)
        names = [event.name.replace("torch::autograd::AccumulateGrad", "gradient") for event in events]
        rows.append([name for name in names if name.startswith(("c10d::", "gradient"))])
    return rows


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks_from_environment(60.0) as ranks:
        found: dict[str, Any] = {kind: curves(folder, kind, ranks) for kind in ("ddp", "fsdp")}
        found["collectives"] = {kind: collectives(folder, kind, ranks) for kind in ("ddp", "fsdp")}
        if ranks.is_main:
            (folder / "ranks.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
