"""Saves the checkpoints of a run and loads the one that a run continues from.

    <save_path>/<epoch>/     config.json model.safetensors        the speculator, bf16: load, serve, publish this
                             training_record.json                 what it was trained with: `speculators check`
                             master_weights.fp32                  the same weights as trained, fp32: only for resuming
                             optimizer_state_dict.pt scheduler_state_dict.pt training_state.json val_metrics.json
    <save_path>/epoch<N>_end, epoch<N>_step<K>, checkpoint_best   symlinks to <N>
    <save_path>/interrupted/                                      saved on SIGINT or SIGTERM

A directory appears whole or not at all. Resuming from it is exact: it keeps master weights, optimizer, step and the
random state of every rank. Links and the best checkpoint follow from the directories: `recover` makes them anew.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from speculators.checkpoint.io import BEST
from speculators.model import SpeculatorModel
from speculators.train.checkpoint_files import (
    MASTERS_FILE,
    METRICS_FILE,
    OPTIMIZER_FILE,
    SCHEDULER_FILE,
    STATE_FILE,
    DamagedCheckpointError,
    Position,
    first_sentence,
    read_position,
    restore_weights,
    save_speculator,
    write_checkpoint,
    write_random_states,
)
from speculators.train.distributed import RandomState, Ranks
from speculators.train.optimizers import Optimizers
from speculators.utils.files import atomic_directory, atomic_write, finish_dead_writes, remove_directory
from speculators.utils.util import WRONG_VALUE

__all__ = [
    "INTERRUPTED",
    "Checkpointer",
    "DamagedCheckpointError",
    "Position",
    "is_saved_epoch",
    "mid_epoch_saves",
    "read_position",
    "save_speculator",
]

INTERRUPTED = "interrupted"
DRY_RUN = "dry_run"
CURVE_FILE = "metrics.jsonl"
RUN_FILES = ("run.yaml", "recipe.json", "train_command.txt", "speculators.patch", "finished.json", CURVE_FILE)
FINISHED_FILE = "finished.json"
"""Written when the last steps of a run made no better checkpoint, so that no directory shows that it is over."""
LINK = re.compile(rf"epoch\d+_\w+|{BEST}")
ALONE = Ranks()


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
        return max(self.candidates(), key=progress, default=None)

    def candidates(self) -> list[Path]:
        """Lists what a run can continue from."""
        return [path for path in (*self.epochs(), self.root / INTERRUPTED) if (path / STATE_FILE).exists()]

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
        *,
        random_states: Sequence[RandomState] = (),
        num_rows: int | None = None,
    ) -> None:
        """Writes one checkpoint directory below `root`, and the link of one that is named by its epoch.

        `random_states`: of each rank; of this process alone when not given. `num_rows`: the rank's rows in this epoch.

        Raises `OSError` when it cannot be written, e.g. because the disk is full.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with atomic_directory(path) as directory:
                write_checkpoint(Path(directory), model, optimizers, position, val_metrics)
                write_random_states(Path(directory), position, random_states or [Ranks().random_state()], num_rows)
                if self.train_command:
                    (Path(directory) / "train_command.txt").write_text(self.train_command + "\n")
        # torch and safetensors wrap a full disk in errors of their own
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"checkpoint {path} could not be written ({first_sentence(error)}). Nothing half-written was left "
                "and older checkpoints are intact: free some space, then run the same command to continue"
            ) from error
        if path.name == str(position.epoch):
            self.link(link_name(position), path)

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

    def val_losses(self) -> dict[int, float]:
        """Returns epoch -> validation loss of the epochs on disk that were validated."""
        losses = {int(path.name): self.val_metrics(path).get("loss", math.inf) for path in self.epochs()}
        return {epoch: loss for epoch, loss in losses.items() if math.isfinite(loss)}

    def val_metrics(self, path: Path) -> dict[str, float]:
        """Returns the validation metrics saved with a checkpoint; empty when nothing was validated then."""
        file = path / METRICS_FILE
        return json.loads(file.read_text()) if file.exists() else {}

    def refuse_other_runs(self) -> None:
        """Raises `ValueError` if `root` holds an earlier run: a new run must not mix its checkpoints with those."""
        if (newest := self.newest()) is not None:
            raise ValueError(
                f"{self.root} holds a run ({newest.name} at step {read_position(newest).global_step}) and this one "
                "starts anew: name another --output, delete that directory, or continue it by leaving "
                "--no-resume-from-checkpoint out"
            )

    def mark_best(self) -> None:
        """Points `checkpoint_best` at the lowest validation loss on disk; with `save_best`, removes other epochs."""
        losses = self.val_losses()
        if not losses:
            return
        best = min(losses, key=lambda epoch: (losses[epoch], epoch))
        if not self.best.is_symlink() or os.readlink(self.best) != str(best):
            self.link(BEST, self.root / str(best))
        if self.save_best:
            for old in self.epochs():
                if int(old.name) < best:  # a later one is of a run without save_best, and may be its newest
                    remove_directory(old)
        for link in self.root.glob("epoch*_*"):
            if link.is_symlink() and not link.exists():
                link.unlink()

    def recover(self) -> list[str]:
        """Finishes what a process that died while saving left here; returns a line for each thing done."""
        if not self.root.is_dir():
            return []
        lines = finish_dead_writes(self.root, lambda name: name.isdigit() or name in (INTERRUPTED, DRY_RUN, *RUN_FILES))
        for half_made in self.root.glob(".*.new"):
            if half_made.is_symlink() and LINK.fullmatch(half_made.name[1 : -len(".new")]):
                half_made.unlink()
        for path in self.epochs():
            try:
                name = link_name(read_position(path))
            except DamagedCheckpointError:  # told when it is loaded
                continue
            if not (self.root / name).is_symlink():
                self.link(name, path)
        if self.candidates():
            self.mark_best()
        return lines

    def set_aside(self, path: Path) -> Path:
        """Renames a damaged checkpoint, so that the one before it is the newest."""
        aside = self.root / f"{path.name}.damaged"
        if aside.exists():
            remove_directory(aside)
        os.rename(path, aside)
        for link in self.root.glob(f"epoch{path.name}_*"):
            if link.is_symlink():
                link.unlink()
        return aside

    def finish(self, num_steps: int) -> None:
        """Records that the run is over after `num_steps`."""
        with atomic_write(self.root / FINISHED_FILE) as file:
            file.write(json.dumps({"num_steps": num_steps}))

    def finished_steps(self) -> int | None:
        """Returns the steps of the run that is over, if that was recorded."""
        file = self.root / FINISHED_FILE
        return json.loads(file.read_text())["num_steps"] if file.is_file() else None

    def load(
        self,
        path: Path,
        model: SpeculatorModel,
        optimizers: Optimizers,
        *,
        ranks: Ranks = ALONE,
        num_rows: int | None = None,
        allow_changes: bool = False,
    ) -> Position:
        """Restores a run bit for bit and returns its position. `num_rows`: the rank's rows in the checkpoint's epoch.

        Raises `DamagedCheckpointError`, and `ValueError` for a checkpoint of another drafter or optimizer, of another
        number of ranks (unless `allow_changes`), or inside an epoch of other rows.
        """
        try:
            weights = load_file(path / MASTERS_FILE)
            state = torch.load(path / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
            random = torch.load(path / SCHEDULER_FILE, weights_only=True, map_location="cpu")
            states = list(random.get("random_states") or [random["random_state"]])
            position = read_position(path)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        if len(states) != ranks.world_size and (position.local_step or not allow_changes):
            raise ValueError(
                f"checkpoint {path} is of a run on {len(states)} ranks, this one has {ranks.world_size}: start as many "
                "as before, or name another --output"
            )
        if position.local_step and num_rows is not None and num_rows != random.get("num_rows", num_rows):
            raise ValueError(
                f"checkpoint {path} is inside an epoch, after {position.local_step} of {random['num_rows']} rows, and "
                f"this run packs {num_rows}: use the same data, lengths and seed, or name another --output"
            )
        restore_weights(model, weights, path)
        try:
            optimizers.load_state_dict(state)
            if ranks.rank < len(states):
                ranks.set_random_state(states[ranks.rank])
        except WRONG_VALUE as error:
            raise damaged(path, error) from error
        return position


UNREADABLE = (OSError, SafetensorError, pickle.UnpicklingError, EOFError, *WRONG_VALUE)


def damaged(path: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"checkpoint {path} cannot be read ({first_sentence(error)}): delete that directory to continue from an older "
        "one, or start anew with --no-resume-from-checkpoint"
    )


def mid_epoch_saves(checkpoint_freq: float, num_rows: int, rows_a_step: int = 1) -> set[int]:
    """Returns the rows inside an epoch after which to save, without its end: freq 0.25 of 8 rows -> {2, 4, 6}."""
    if checkpoint_freq >= 1:
        return set()
    count = round(1 / checkpoint_freq)
    wanted = (num_rows * part // count for part in range(1, count))
    return {min(num_rows, -(-row // rows_a_step) * rows_a_step) for row in wanted} - {0, num_rows}


def is_saved_epoch(checkpoint_freq: float, epoch: int) -> bool:
    """Says whether to save at the end of an epoch: after epoch 0, then after every `checkpoint_freq`-th."""
    return epoch % max(1, int(checkpoint_freq)) == 0


def progress(path: Path) -> float:
    """Orders checkpoints; one that cannot be read counts as the newest, so that it is not passed over in silence."""
    try:
        return read_position(path).global_step
    except DamagedCheckpointError:
        return math.inf


def link_name(position: Position) -> str:
    return f"epoch{position.epoch}_" + (f"step{position.local_step}" if position.local_step else "end")
