"""The directory of a run: which checkpoints it holds, which is the newest and which the best, the links to them.

Links and the best checkpoint follow from the directories: `recover` makes them anew.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from speculators.checkpoint.io import BEST
from speculators.train.checkpoint_files import (
    METRICS_FILE,
    STATE_FILE,
    UNREADABLE,
    DamagedCheckpointError,
    check_bytes,
    damaged,
    link_name,
    read_position,
)
from speculators.utils.files import atomic_write, finish_dead_writes, remove_directory

INTERRUPTED = "interrupted"
DRY_RUN = "dry_run"
CURVE_FILE = "metrics.jsonl"
RUN_FILES = ("run.yaml", "recipe.json", "train_command.txt", "speculators.patch", "finished.json", CURVE_FILE)
FINISHED_FILE = "finished.json"
"""Written when the last steps of a run made no better checkpoint, so that no directory shows that it is over."""
LINK = re.compile(rf"epoch\d+_\w+|{BEST}")


class RunDirectory:
    """Manages the checkpoints below `save_path`; with `save_best`, a new best one replaces the others."""

    def __init__(self, save_path: str | Path, *, save_best: bool = False):
        self.root = Path(save_path)
        self.save_best = save_best

    @property
    def best(self) -> Path:
        """The link to the checkpoint with the lowest validation loss; it may not exist."""
        return self.root / BEST

    def newest(self) -> Path | None:
        """Returns the checkpoint to continue from: the highest epoch, or `interrupted` if that went further."""
        return next(iter(self.newest_first()), None)

    def newest_first(self) -> list[Path]:
        return sorted(self.candidates(), key=progress, reverse=True)

    def candidates(self) -> list[Path]:
        """Lists what a run can continue from."""
        return [path for path in (*self.epochs(), self.root / INTERRUPTED) if (path / STATE_FILE).exists()]

    def epochs(self) -> list[Path]:
        """Lists our own epoch directories; never links, never directories of others."""
        if not self.root.is_dir():
            return []
        ours = [path for path in self.root.iterdir() if path.name.isdigit() and path.is_dir() and not path.is_symlink()]
        return sorted((path for path in ours if (path / STATE_FILE).exists()), key=lambda path: int(path.name))

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
        readable = [path for path in self.epochs() if self.has_readable_metrics(path)]
        losses = {int(path.name): self.val_metrics(path).get("loss", math.inf) for path in readable}
        return {epoch: loss for epoch, loss in losses.items() if math.isfinite(loss)}

    def val_metrics(self, path: Path) -> dict[str, float]:
        """Returns the validation metrics saved with a checkpoint; empty when nothing was validated then.

        Raises `DamagedCheckpointError`.
        """
        if not (path / METRICS_FILE).exists():
            return {}
        try:
            check_bytes(path, [METRICS_FILE])
            return dict(json.loads((path / METRICS_FILE).read_text()))
        except UNREADABLE as error:
            raise damaged(path, error) from error

    def has_readable_metrics(self, path: Path) -> bool:
        """Whether a checkpoint can be compared with others; `recover` tells of one that cannot."""
        try:
            self.val_metrics(path)
        except DamagedCheckpointError:
            return False
        return True

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
                # a later one is of a run without save_best, and may be its newest; one that cannot be read, the best
                if int(old.name) < best and self.has_readable_metrics(old):
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
                self.val_metrics(path)
            except DamagedCheckpointError as error:
                lines.append(f"{error}; it cannot be the best one")
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

    def pass_over(self, path: Path, error: DamagedCheckpointError, tell: Callable[[str], None]) -> None:
        """Sets the newest checkpoint aside, with a line. Raises `error`, which loading it raised, when there is no
        other."""
        if len(self.candidates()) == 1:
            raise error
        aside = self.set_aside(path)
        tell(f"{error}. It is now {aside.name}, and the run continues from the one before")


def progress(path: Path) -> float:
    """Orders checkpoints; one that cannot be read counts as the newest, so that it is not passed over in silence."""
    try:
        return read_position(path).global_step
    except DamagedCheckpointError:
        return math.inf
