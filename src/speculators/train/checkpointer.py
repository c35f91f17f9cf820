"""Saves the checkpoints of a run and loads the one that a run continues from.

    <save_path>/<epoch>/     config.json model.safetensors        the speculator, bf16: load, serve, publish this
                             training_record.json                 what it was trained with: `speculators check`
                             master_weights.fp32                  the same weights as trained, fp32: only for resuming
                             optimizer_state_dict.pt scheduler_state_dict.pt training_state.json val_metrics.json
                             checksums.json                       of what resuming reads
    <save_path>/epoch<N>_end, epoch<N>_step<K>, checkpoint_best   symlinks to <N>
    <save_path>/interrupted/                                      saved on SIGINT or SIGTERM

A directory appears whole or not at all. Resuming from it is exact: it keeps master weights, optimizer, step and the
random state of every rank. Links and the best checkpoint follow from the directories: `recover` makes them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from speculators.model import SpeculatorModel
from speculators.train.checkpoint_files import (
    CHECKSUMS_FILE,
    UNREADABLE,
    DamagedCheckpointError,
    Position,
    Shares,
    check_bytes,
    damaged,
    first_sentence,
    is_saved_epoch,
    link_name,
    masters,
    mid_epoch_saves,
    read_masters,
    read_position,
    recorded_checksums,
    restore_weights,
    save_speculator,
    write_checksums,
    write_masters,
    write_position,
    write_shards,
)
from speculators.train.distributed import RandomState, RankError, Ranks
from speculators.train.optimizers import Optimizers
from speculators.train.parallel import Alone, Sharded
from speculators.train.records import TrainerConfig
from speculators.train.run_directory import CURVE_FILE, DRY_RUN, INTERRUPTED, RunDirectory
from speculators.utils.files import atomic_directory
from speculators.utils.util import WRONG_VALUE

__all__ = [
    "CURVE_FILE",
    "DRY_RUN",
    "INTERRUPTED",
    "Checkpointer",
    "DamagedCheckpointError",
    "DistributedCheckpointer",
    "Position",
    "is_saved_epoch",
    "mid_epoch_saves",
    "read_position",
    "save_speculator",
]

ALONE = Ranks()
OTHER_RANKS = (
    "ranks: {} -> {}. Weights, optimizer state and the rows of every step are carried over exactly; sums over rows are "
    "taken in another order, and numbers that training draws (anchors, depths) are others"
)


class Checkpointer(RunDirectory):
    """Saves and loads the checkpoints below `save_path`."""

    def __init__(self, save_path: str | Path, *, save_best: bool = False, train_command: str = ""):
        super().__init__(save_path, save_best=save_best)
        self.train_command = train_command

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
        rows_a_step: int | None = None,
    ) -> None:
        """Writes one checkpoint directory below `root`, and the link of one that is named by its epoch.

        `random_states`: of each rank; of this process alone when not given. `num_rows`: the rank's rows in this epoch,
        `rows_a_step` in a step.

        Raises `OSError` when it cannot be written, e.g. because the disk is full.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with atomic_directory(path) as directory:
                parts = self.write_model(directory, model, optimizers)
                write_position(directory, position, val_metrics)
                Shares(random_states or [Ranks().random_state()], num_rows, rows_a_step).save(directory, position)
                if self.train_command:
                    (directory / "train_command.txt").write_text(self.train_command + "\n")
                write_checksums(directory, parts)
        except RankError:
            raise
        # torch and safetensors wrap a full disk in errors of their own
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"checkpoint {path} could not be written ({first_sentence(error)}). Nothing half-written was left "
                "and older checkpoints are intact: free some space, then run the same command to continue"
            ) from error
        if path.name == str(position.epoch):
            self.link(link_name(position), path)

    def write_model(self, directory: Path, model: SpeculatorModel, optimizers: Optimizers) -> dict[str, str]:
        """Returns the checksums of what other ranks wrote there too."""
        save_speculator(model, directory)
        write_masters(directory, model, optimizers)
        return {}

    def help_to_save(self, optimizers: Optimizers) -> None:
        """What other ranks do while the main one saves: nothing, as it has everything."""

    def rows_a_step(self, config: TrainerConfig, num_ranks: int, tell: Callable[[str], None]) -> int:
        """Returns the rows of each rank per step: as configured, or as keep the rows of a step in a run that is
        continued. Raises `ValueError` when this number of ranks cannot share them equally."""
        asked, before = config.gradient_accumulation_steps, self.shares_before()
        if before is None or not config.resume_from_checkpoint or config.allow_changed_settings:
            return asked
        total = before.num_ranks * (before.rows_a_step or asked)
        if total % num_ranks:
            raise ValueError(
                f"{self.root} holds a run with {total} rows per step, which {num_ranks} ranks cannot share equally: "
                f"start a number of ranks that divides {total}, or name another --output; --allow-changed-settings "
                f"continues with {num_ranks * asked} rows per step"
            )
        chosen = total // num_ranks
        if chosen != asked:
            tell(f"a step keeps its {total} rows: {chosen} of each rank, not {asked} (--gradient-accumulation-steps)")
        if before.num_ranks != num_ranks:
            tell(OTHER_RANKS.format(before.num_ranks, num_ranks))
        return chosen

    def continuing(self, path: Path, position: Position) -> str:
        unchecked = "" if (path / CHECKSUMS_FILE).exists() else ", an earlier release's: it has no checksums to compare"
        return f"continuing from {path} at step {position.global_step}{unchecked}"

    def shares_before(self) -> Shares | None:
        """Returns those of the newest checkpoint that says them: damaged ones are told of when they are loaded."""
        for path in self.newest_first():
            with suppress(*UNREADABLE):
                return Shares.load(path)
        return None

    def load(
        self,
        path: Path,
        model: SpeculatorModel,
        optimizers: Optimizers,
        *,
        ranks: Ranks = ALONE,
        num_rows: int | None = None,
    ) -> Position:
        """Restores a run and returns its position, of as many ranks bit for bit. `num_rows`: the rank's rows in the
        checkpoint's epoch. Each rank compares a share of the files with their checksums.

        Raises `DamagedCheckpointError`, and `ValueError` for a checkpoint of another drafter or optimizer, or inside an
        epoch of other rows.
        """
        position = read_position(path)
        try:
            check_bytes(path, sorted(recorded_checksums(path))[ranks.rank :: ranks.world_size])
            weights, state = read_masters(path, model, optimizers)
            before = Shares.load(path)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        position = position_of(ranks.world_size, num_rows, before, position, path)
        restore_weights(model, weights, path)
        try:
            optimizers.load_state_dict(state)
            if ranks.rank < before.num_ranks:
                ranks.set_random_state(before.random_states[ranks.rank])
            else:  # a rank that was not there before
                torch.manual_seed(torch.initial_seed() + position.global_step)
        except WRONG_VALUE as error:
            raise damaged(path, error) from error
        return position


def position_of(num_ranks: int, num_rows: int | None, before: Shares, position: Position, path: Path) -> Position:
    """Returns the position in the rows of each of `num_ranks`: ranks take turns on the same rows of an epoch.

    Raises `ValueError` inside an epoch of other rows. `num_rows`: of each rank in it.
    """
    if position.local_step == 0 or num_rows is None or before.num_rows is None:
        return position
    # ranks leave out the rows at the end that not all of them get
    least, most = before.num_rows * before.num_ranks, (before.num_rows + 1) * before.num_ranks - 1
    if most < num_rows * num_ranks or (num_rows + 1) * num_ranks - 1 < least:
        raise ValueError(
            f"checkpoint {path} is inside an epoch, after {position.local_step} of {before.num_rows} rows, and "
            f"this run packs {num_rows}: use the same data, lengths and seed, or name another --output"
        )
    local_step = -(-position.local_step * before.num_ranks // num_ranks)
    return Position(position.epoch, min(local_step, num_rows), position.global_step)


class DistributedCheckpointer(Checkpointer):
    """Of a draft model that is split over the ranks: each writes its part below `sharded_state/`, beside the whole
    speculator. The main rank calls `save` while the others call `help_to_save`."""

    def __init__(
        self, save_path: str | Path, sharded: Sharded, *, save_best: bool = False, train_command: str = ""
    ) -> None:
        super().__init__(save_path, save_best=save_best, train_command=train_command)
        self.sharded = sharded

    def write_model(self, directory: Path, model: SpeculatorModel, optimizers: Optimizers) -> dict[str, str]:
        with self.sharded.whole(torch.device("cpu"), on_main_alone=True) as whole:
            save_speculator(whole, directory)
        return self.help_to_write(directory, optimizers)

    def help_to_save(self, optimizers: Optimizers) -> None:
        with self.sharded.whole(torch.device("cpu"), on_main_alone=True):
            pass
        self.help_to_write(None, optimizers)

    def help_to_write(self, directory: Path | None, optimizers: Optimizers) -> dict[str, str]:
        """`directory`: where the main rank writes, which the others do not know."""
        ranks = self.sharded.ranks
        return write_shards(ranks.told_by_main(directory), masters(self.sharded.model), optimizers, ranks)


def checkpointer_of(parallel: Alone, save_path: str | Path, *, save_best: bool, train_command: str) -> Checkpointer:
    settings: dict[str, Any] = {"save_best": save_best, "train_command": train_command}
    if isinstance(parallel, Sharded):
        return DistributedCheckpointer(save_path, parallel, **settings)
    return Checkpointer(save_path, **settings)
