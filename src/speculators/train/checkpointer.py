"""Saves the checkpoints of a run and loads the one that a run continues from.

    <save_path>/<epoch>/     config.json model.safetensors        the speculator, bf16: load, serve, publish this
                             training_record.json                 what it was trained with: `speculators check`
                             master_weights.fp32                  the same weights as trained, fp32: only for resuming
                             optimizer_state_dict.pt scheduler_state_dict.pt training_state.json val_metrics.json
    <save_path>/epoch<N>_end, epoch<N>_step<K>, checkpoint_best   symlinks to <N>
    <save_path>/interrupted/                                      saved on SIGINT or SIGTERM

A directory appears whole or not at all. Resuming from it is exact: it keeps master weights, optimizer, step and random
state.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators.checkpoint.io import BEST
from speculators.checkpoint.record import write_training_record
from speculators.model import SpeculatorModel
from speculators.train.optimizers import Optimizers
from speculators.utils.files import atomic_directory

STATE_FILE = "training_state.json"
MASTERS_FILE = "master_weights.fp32"
"""A safetensors file by another name: vLLM loads every *.safetensors of the directory it serves."""
OPTIMIZER_FILE = "optimizer_state_dict.pt"
SCHEDULER_FILE = "scheduler_state_dict.pt"
METRICS_FILE = "val_metrics.json"
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Position:
    """How far a run is. `local_step > 0`: the run is inside the epoch, after so many of its rows."""

    epoch: int = 0
    local_step: int = 0
    global_step: int = 0


class Checkpointer:
    """Manages the checkpoints below `save_path`; with `save_best`, a new best one replaces the others."""

    def __init__(self, save_path: str | Path, *, save_best: bool = False, train_command: str = ""):
        self.root = Path(save_path)
        self.save_best = save_best
        self.train_command = train_command

    @property
    def best(self) -> Path:
        """The link to the checkpoint with the lowest validation loss; it may not exist."""
        return self.root / BEST

    def newest(self) -> Path | None:
        """Returns the checkpoint to continue from: the highest epoch, or `interrupted` if that went further."""
        candidates = [path for path in (*self.epochs(), self.root / INTERRUPTED) if (path / STATE_FILE).exists()]
        return max(candidates, key=lambda path: read_position(path).global_step, default=None)

    def epochs(self) -> list[Path]:
        """Lists our own epoch directories; never links, never directories of others."""
        if not self.root.is_dir():
            return []
        ours = [path for path in self.root.iterdir() if path.name.isdigit() and path.is_dir() and not path.is_symlink()]
        return sorted((path for path in ours if (path / STATE_FILE).exists()), key=lambda path: int(path.name))

    def save(
        self,
        path: Path,
        model: SpeculatorModel,
        optimizers: Optimizers,
        position: Position,
        val_metrics: dict[str, float] | None = None,
    ) -> None:
        """Writes one checkpoint directory below `root`, and the link of one that is named by its epoch.

        Raises `OSError` when it cannot be written, e.g. because the disk is full.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with atomic_directory(path) as directory:
                write_checkpoint(Path(directory), model, optimizers, position, val_metrics)
                if self.train_command:
                    (Path(directory) / "train_command.txt").write_text(self.train_command + "\n")
        # torch and safetensors wrap a full disk in errors of their own
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"checkpoint {path} could not be written ({first_sentence(error)}). Nothing half-written was left "
                "and older checkpoints are intact: free some space, then run the same command to continue"
            ) from error
        if path.name == str(position.epoch):
            self.link(f"epoch{path.name}_" + (f"step{position.local_step}" if position.local_step else "end"), path)

    def link(self, name: str, target: Path) -> None:
        """Points a symlink at a checkpoint; removes earlier links to the same epoch."""
        if name.startswith("epoch"):
            for old in self.root.glob(f"epoch{target.name}_*"):
                if old.is_symlink():
                    old.unlink()
        fresh = self.root / f".{name}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target.name)
        os.replace(fresh, self.root / name)

    def best_loss(self) -> float:
        """Returns the validation loss of `checkpoint_best`; infinity when no such checkpoint exists."""
        return self.val_metrics(self.best).get("loss", math.inf)

    def val_metrics(self, path: Path) -> dict[str, float]:
        """Returns the validation metrics saved with a checkpoint; empty when nothing was validated then."""
        file = path / METRICS_FILE
        return json.loads(file.read_text()) if file.exists() else {}

    def refuse_other_runs(self) -> None:
        """Raises `ValueError` if `root` holds an earlier run: a new run must not mix its checkpoints with those."""
        if (newest := self.newest()) is not None:
            raise ValueError(
                f"{self.root} holds a run ({newest.name} at step {read_position(newest).global_step}) and this one "
                "starts anew: name another --save-path, delete that directory, or continue it by leaving "
                "--no-resume-from-checkpoint out"
            )

    def mark_best(self, path: Path) -> None:
        """Points `checkpoint_best` at a checkpoint; with `save_best`, removes the other epochs we wrote."""
        self.link(BEST, path)
        if self.save_best:
            for old in self.epochs():
                if old != path:
                    shutil.rmtree(old)
            for link in self.root.glob("epoch*_*"):
                if link.is_symlink() and not link.exists():
                    link.unlink()

    def load(self, path: Path, model: SpeculatorModel, optimizers: Optimizers) -> Position:
        """Restores a run bit for bit and returns its position.

        Raises `ValueError` for a damaged checkpoint, or one of another drafter or optimizer.
        """
        try:
            weights = load_file(path / MASTERS_FILE)
            state = torch.load(path / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
            random = torch.load(path / SCHEDULER_FILE, weights_only=True, map_location="cpu")
            position = read_position(path)
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, KeyError, EOFError) as error:
            raise ValueError(
                f"checkpoint {path} cannot be read ({first_sentence(error)}): delete that directory to "
                "continue from an older one, or start anew with --no-resume-from-checkpoint"
            ) from error
        restore_weights(model, weights, path)
        optimizers.load_state_dict(state)
        set_random_state(random["random_state"])
        return position


def mid_epoch_saves(checkpoint_freq: float, num_steps: int) -> set[int]:
    """Returns the steps inside an epoch after which to save, without its end: freq 0.25 of 8 steps -> {2, 4, 6}."""
    if checkpoint_freq >= 1:
        return set()
    count = round(1 / checkpoint_freq)
    return {num_steps * part // count for part in range(1, count)} - {0, num_steps}


def is_saved_epoch(checkpoint_freq: float, epoch: int) -> bool:
    """Says whether to save at the end of an epoch: after epoch 0, then after every `checkpoint_freq`-th."""
    return epoch % max(1, int(checkpoint_freq)) == 0


def write_checkpoint(
    path: Path, model: SpeculatorModel, optimizers: Optimizers, position: Position, val_metrics: dict[str, float] | None
) -> None:
    save_speculator(model, path)
    save_file({name: tensor.contiguous() for name, tensor in masters(model).items()}, path / MASTERS_FILE)
    torch.save(optimizers.state_dict(), path / OPTIMIZER_FILE)
    torch.save({"step": position.global_step, "random_state": random_state()}, path / SCHEDULER_FILE)
    (path / STATE_FILE).write_text(json.dumps(asdict(position)))
    if val_metrics is not None:
        (path / METRICS_FILE).write_text(json.dumps(val_metrics, indent=1))


def save_speculator(model: SpeculatorModel, path: Path) -> None:
    """Writes the Hugging Face directory, with every float tensor in bf16, and its training record."""
    state = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(path, state_dict=state)
    config = json.loads((path / "config.json").read_text())  # transformers writes the type of the masters there
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2, sort_keys=True) + "\n")
    write_training_record(path, model.contract.training_keys)


def masters(model: SpeculatorModel) -> dict[str, Tensor]:
    """Returns what training changes, in its own precision: trainable parameters and saved buffers."""
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in frozen}


def restore_weights(model: SpeculatorModel, weights: dict[str, Tensor], path: Path) -> None:
    current = masters(model)
    wrong = sorted(
        name
        for name in current.keys() | weights.keys()
        if name not in current or name not in weights or current[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"checkpoint {path} is of another drafter (first difference: {wrong[0]}): use the settings it "
            "was trained with, another --save-path, or --no-resume-from-checkpoint"
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(weights[name])


def read_position(path: Path) -> Position:
    try:
        return Position(**json.loads((path / STATE_FILE).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / STATE_FILE} is damaged ({error}): delete the directory {path}") from error


def first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__


def random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
