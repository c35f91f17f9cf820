"""What a run needs, said before it: memory of each rank, time, disk, tokens; and what acceptance such data gave."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from rich.table import Table

from speculators.train.checkpoint_files import is_saved_epoch
from speculators.train.flops import TERA
from speculators.train.memory import MemoryEstimate, Probe, at_length
from speculators.train.optimizers import num_steps_of
from speculators.train.parallel import Sharded
from speculators.train.side_by_side import Drafter
from speculators.utils.report import TableReport, facts_table, human_bytes

NEAR = 4.0
"""Records of up to so many times more or fewer trained tokens are near."""


@dataclass(frozen=True)
class RunEstimate(TableReport):
    """What a run needs. Times and bytes of each rank."""

    speculator_type: str
    device: str
    num_ranks: int
    is_sharded: bool
    """--fsdp-shard: each rank has its part of what is trained."""
    memory: MemoryEstimate
    probes: tuple[Probe, ...]
    tokens_per_epoch: int
    supervised_per_epoch: int
    num_epochs: int
    num_steps: int
    step_s: float
    step_flop: float | None
    """Model FLOPs of each rank (`nn.flops`); None where the algorithm counts none."""
    peak_flop_per_s: float | None
    """Of a rank's card, where it is known."""
    num_checkpoints: int
    stored_states_bytes: int
    """0: states are computed and forgotten."""
    records: tuple[dict[str, Any], ...]

    @property
    def num_trained_tokens(self) -> int:
        """Supervised tokens, counted each time they are trained on."""
        return self.supervised_per_epoch * self.num_epochs

    @property
    def floor_s(self) -> float | None:
        """Seconds of a step at the card's peak."""
        return self.step_flop / self.peak_flop_per_s if self.step_flop and self.peak_flop_per_s else None

    @property
    def disk_bytes(self) -> int:
        return self.num_checkpoints * self.memory.checkpoint_bytes + self.stored_states_bytes

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["memory"] |= {"total_bytes": self.memory.total_bytes}
        made = {"time_s": self.step_s * self.num_steps, "disk_bytes": self.disk_bytes, "floor_s": self.floor_s}
        return values | made

    def tables(self) -> list[Table]:
        measured = " and ".join(f"{probe.num_tokens:,}" for probe in self.probes)
        memory = {use: human_bytes(num_bytes) for use, num_bytes in self.memory.uses().items()}
        states = f", stored states {human_bytes(self.stored_states_bytes)}" if self.stored_states_bytes else ""
        checkpoints = f"{self.num_checkpoints} checkpoints of {human_bytes(self.memory.checkpoint_bytes)}"
        facts: dict[str, object] = {
            "ranks": f"{self.num_ranks}, what is trained {'split over them' if self.is_sharded else 'whole on each'}",
            "memory of each rank": human_bytes(self.memory.total_bytes),
            **{f"  {use}": shown for use, shown in memory.items()},
            "time": f"{self.step_s * self.num_steps / 3600:.2f} h: {self.num_steps:,} steps of {self.step_s:.3g} s",
            "  measured": f"a step of the drafter alone on {self.device}, on rows of {measured} tokens; computing or "
            "waiting for verifier states, validations and checkpoints come on top",
            **self.arithmetic(),
            "disk": f"{human_bytes(self.disk_bytes)}: {checkpoints}{states}",
            "tokens": f"{self.tokens_per_epoch:,} per epoch, {self.supervised_per_epoch:,} of them supervised; "
            f"{self.num_epochs} epochs",
        }
        return [facts_table(f"Estimate: {self.speculator_type}", facts), self.records_table()]

    def arithmetic(self) -> dict[str, object]:
        if self.step_flop is None:
            return {}
        floor = "" if self.floor_s is None else f", {self.floor_s:.3g} s at the card's peak"
        return {"  arithmetic": f"{self.step_flop / TERA:.3g} TFLOP per step{floor}"}

    def records_table(self) -> Table:
        table = Table(title="Acceptance on record", title_justify="left")
        for name in ("verifier", "data", "tokens per round", "command"):
            table.add_column(name, overflow="fold")
        for record in self.records:
            length = f"{record['acceptance_length']:.2f} at K = {record['num_drafts']}"
            table.add_row(record["verifier"], record["data"], length, record["command"])
        return table

    def sentence(self) -> str:
        near = "" if self.records else f"; no record of {self.speculator_type} near {self.num_trained_tokens:,} tokens"
        return f"about {human_bytes(self.memory.total_bytes)} of memory for each rank{near}"


def estimate_run(drafter: Drafter) -> RunEstimate:
    """Estimates without training and without the verifier's weights; of those the drafter reads its own copies."""
    trainer, config, train_set = drafter.trainer, drafter.config, drafter.datasets[0]
    supervised, num_tokens = int(train_set.trained_per_row(train_set.max_len).sum()), sum(train_set.lengths)
    probes, memory = drafter.fitted or drafter.measure()
    kept = config.data.cache_hidden_states * num_tokens * memory.states_bytes // config.data.total_seq_len
    keys, times = config.trainer, [(probe.num_tokens, probe.time_s) for probe in probes]
    flops = [(probe.num_tokens, probe.model_flop) for probe in probes if probe.model_flop is not None]
    num_epochs = math.ceil(
        keys.epochs * trainer.num_steps / num_steps_of(trainer.train_loader, keys.epochs, trainer.rows_a_step)
    )
    saved = [n for n in range(num_epochs) if is_saved_epoch(keys.checkpoint_freq, n) or n == num_epochs - 1]
    return RunEstimate(
        speculator_type=config.speculator_type,
        device=str(trainer.ranks.device),
        num_ranks=trainer.ranks.world_size,
        is_sharded=isinstance(trainer.parallel, Sharded),
        memory=memory,
        probes=tuple(probes),
        tokens_per_epoch=num_tokens,
        supervised_per_epoch=supervised,
        num_epochs=num_epochs,
        num_steps=trainer.num_steps,
        step_s=trainer.rows_a_step * max(at_length(times, config.data.total_seq_len), 0.0),
        step_flop=trainer.rows_a_step * at_length(flops, config.data.total_seq_len) if flops else None,
        peak_flop_per_s=trainer.recent.peak,
        num_checkpoints=1 if keys.save_best else len(saved),  # a later one of an epoch replaces the one before
        stored_states_bytes=kept,
        records=tuple(records_near(config.speculator_type, supervised * num_epochs)),
    )


def records_near(speculator_type: str, num_trained_tokens: int) -> list[dict[str, Any]]:
    """Measured trainings of this algorithm on about as many trained tokens, nearest first."""
    records = json.loads(files("speculators.assets").joinpath("acceptance.json").read_text())
    near = [
        (distance, record)
        for record in records
        if record["speculator_type"] == speculator_type
        and (distance := abs(math.log(record["num_trained_tokens"] / max(num_trained_tokens, 1)))) <= math.log(NEAR)
    ]
    return [record for _, record in sorted(near, key=lambda pair: pair[0])]
