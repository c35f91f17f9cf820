"""What a build is told, what it tells while it runs, what it leaves in its directory, and what it ends with: the
measurement, the checkpoint to use, what to serve."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from speculators.building import ROWS, STATE
from speculators.building.plan import draft_vocabulary
from speculators.evaluation.records import MethodRow
from speculators.evaluation.report import EvaluationReport, gain, sameness
from speculators.train.events import Note
from speculators.utils.files import atomic_write
from speculators.utils.report import TableReport, facts_table

SAID_OTHERWISE = {
    "--epochs": "--budget answers=N,epochs=E,prompts=P",
    **{flag: f"build's own {flag}" for flag in ("--verifier", "--data", "--output", "--speculator-type")},
    "--verifier-name-or-path": "build's own --verifier",
    "--data-path": "build's own --data",
    "--save-path": "build's own --output",
    **{flag: f"{flag} to `speculators train`" for flag in ("--estimate", "--dry-run")},
}
"""Flags of `train` that the steps of a build depend on, and how they are said."""


@dataclass(frozen=True)
class Settings:
    """What shapes a build: one directory takes in no second one."""

    verifier: str
    data: str
    budget: str
    speculator_type: list[str]
    num_speculative_tokens: list[int]
    held_out: str | None
    prompt_field: str | None
    max_tokens: int
    trust_remote_code: bool
    train_flags: list[str]

    def __post_init__(self) -> None:
        for flag in flags_in(self.train_flags):
            of_any = "--" + flag.removeprefix("--").split(".")[-1]  # --dflash.epochs is one drafter's --epochs
            if of_any in SAID_OTHERWISE:
                said = SAID_OTHERWISE[of_any]
                raise ValueError(f"train_flags holds {flag}, which a build sets itself: leave it out, and give {said}")

    @property
    def of_verifier(self) -> dict[str, Any]:
        """What every step is told of it."""
        return {"verifier": self.verifier, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class StepBegun:
    number: int
    title: str
    command: str
    """That does it alone."""


@dataclass(frozen=True)
class StepEnded:
    number: int
    reports: Sequence[TableReport]
    time_s: float


Listener = Callable[[StepBegun | StepEnded | Note], None]

FLAGS = {"methods": "method", "num_prompts": "limit"}
"""Settings of functions whose flags have another name."""
HEADINGS = ("method", "K", "acceptance length", "tokens/s", "speedup", "same text")


@dataclass(frozen=True)
class BuildResult(TableReport, os.PathLike[str]):
    """What a build made and measured; a path wherever a checkpoint is asked for."""

    checkpoint: Path
    """Of the drafter that was fastest: the epoch whose drafts were accepted longest."""
    evaluation: EvaluationReport
    """Every method and number of draft tokens beside plain decoding, on held-out prompts."""
    drafters: Mapping[str, Path]
    """Algorithm -> the checkpoint that was chosen of its run."""
    parity: Mapping[str, Any]
    """`passed`, and `checks`: what `verify` said of the checkpoint."""
    report: Path
    """Markdown: the table, every command, the time that each took."""
    page: Path
    """HTML, as `speculators report` writes it."""
    verifier: str
    served_by: str | None
    """The command by which vLLM serves the checkpoint, with the draft tokens that were fastest, or why none does."""
    num_answers: int
    """Conversations that the drafters were trained on."""
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Step -> `command` and `time_s` (seconds), in order."""
    weakness: str = ""
    """What speaks against the checkpoint, by its training; empty where nothing does."""
    budget: str = ""
    """With which the same is done again, whatever the clock says."""

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    @property
    def best(self) -> MethodRow:
        """The fastest method's row."""
        best = self.evaluation.best
        assert best is not None
        return best

    @property
    def method(self) -> str:
        """The fastest method of all that were measured, those without training included."""
        return self.best.method

    @property
    def num_speculative_tokens(self) -> int:
        """Draft tokens per round with which it was fastest."""
        return self.best.num_speculative_tokens

    @property
    def drafter(self) -> MethodRow:
        """The row in which the checkpoint was fastest."""
        return fastest(self.evaluation, [self.checkpoint])

    @property
    def pays(self) -> bool:
        """Whether the fastest method is surely faster than plain decoding."""
        return self.best.speedup.is_above(1) and self.best.is_possible

    @property
    def step_s(self) -> dict[str, float]:
        return {name: step["time_s"] for name, step in self.steps.items()}

    @property
    def serve(self) -> list[str]:
        """The command that serves the fastest method."""
        path = drafting_path(self.best)
        model = [path] if path is not None else [self.verifier, "--method", self.method]
        return ["speculators", "serve", *model, "--num-speculative-tokens", str(self.num_speculative_tokens)]

    def sentence(self) -> str:
        """What is fastest, whether it pays, and what speaks against the drafter where that is not the answer."""
        best, drafter = self.best, self.drafter
        gained = gain(best.speedup, best.acceptance_length)
        told = f"{best.method} with {best.num_speculative_tokens} draft tokens: {gained}, {sameness(best)}"
        if best == drafter and self.pays:
            return f"{told}; {self.weakness}" if self.weakness else told
        of_drafter = f"the drafter {drafter.method}, trained on {self.num_answers:,} conversations"
        of_drafter += "" if best == drafter else f": {gain(drafter.speedup, drafter.acceptance_length)}"
        parts = [of_drafter, self.weakness]
        if self.pays:
            return "; ".join(filter(None, [f"use {told}", *parts]))
        parts.append("more prompts and a longer --budget make a better drafter")
        lead = f"nothing measured is surely faster than plain decoding; the best, {told}"
        return "; ".join(filter(None, [lead, *(parts if best != drafter or self.weakness else parts[-1:])]))

    def tables(self) -> list[Table]:
        gate = "passed" if self.parity["passed"] else "FAILED"
        facts = {"speculator": self.checkpoint, "parity gate": gate, "vLLM": self.served_by or "serves no such drafter"}
        return [
            *self.evaluation.tables(),
            facts_table("Done", {**facts, "report": self.report, "time": f"{sum(self.step_s.values()):.0f} s"}),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "checkpoint": str(self.checkpoint),
            "method": self.method,
            "num_speculative_tokens": self.num_speculative_tokens,
            "pays": self.pays,
            "speedup": asdict(self.best.speedup),
            "weakness": self.weakness,
            "drafters": {name: str(path) for name, path in self.drafters.items()},
            "serve": shlex.join(self.serve),
            "served_by": self.served_by,
            "report": str(self.report),
            "page": str(self.page),
            "time_s": sum(self.step_s.values()),
            "step_s": self.step_s,
            "budget": self.budget,
            "parity": dict(self.parity),
            "evaluation": self.evaluation.to_dict(),
        }

    def save(self) -> None:
        """Writes the Markdown report."""
        sentence = self.sentence()
        lines = [f"# Drafter for {self.verifier}", "", f"{sentence[0].upper()}{sentence[1:]}.", ""]
        lines += [f"| {' | '.join(row)} |" for row in (HEADINGS, ["---"] * len(HEADINGS), *rows_of(self.evaluation))]
        lines += ["", "Speedups and acceptance lengths with their 95 % bootstrap intervals over prompts.", ""]
        lines += ["## The steps, as commands", "", "```", *(step["command"] for step in self.steps.values()), "```", ""]
        lines += [f"`--budget {self.budget}` does the same work again, whatever the clock says.", ""]
        lines += ["## Serve it", "", "```", shlex.join(self.serve), "```", ""]
        with atomic_write(self.report, "w") as file:
            file.write("\n".join(lines))


def drafting_path(row: MethodRow) -> str | None:
    """The directory of the drafter that a row measured; None for a method without one."""
    return (row.speculative_config or {}).get("model")


def fastest(report: EvaluationReport, checkpoints: Sequence[Path]) -> MethodRow:
    """The fastest row of these drafters, as `EvaluationReport.best` is of all methods."""
    paths = {str(path) for path in checkpoints}
    rows = [row for row in report.whole_rows if drafting_path(row) in paths]
    return max(rows, key=lambda row: (row.is_possible, row.speedup.value))


def rows_of(report: EvaluationReport) -> list[list[str]]:
    """The measurements as text; plain decoding is the denominator of each."""
    return [
        [
            row.method,
            str(row.num_speculative_tokens),
            "{value:.2f} ({low:.2f} to {high:.2f})".format(**asdict(row.acceptance_length)),
            f"{row.tokens_per_s:.1f}",
            "{value:.2f}x ({low:.2f} to {high:.2f})".format(**asdict(row.speedup)),
            f"{row.num_identical} of {row.num_prompts}",
        ]
        for row in report.whole_rows
        if not row.is_plain
    ]


def command_of(verb: str, settings: Mapping[str, Any], *positional: str) -> str:
    """The command that a function's settings mean: `--limit 4`, `--resume`, `--method a --method b`, `-k 2,4`."""
    words = ["speculators", verb, *positional]
    for key, value in settings.items():
        flag = f"--{FLAGS.get(key, key).replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        elif key == "methods":
            words += [word for method in value for word in (flag, method)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def training_of(settings: Settings, output: Path, folder: str, first: Sequence[str], last: Sequence[str]) -> list[str]:
    """The flags of `train`: the `first`, each unless the user says it otherwise, the user's, and the `last`. One
    drafter's directory is named, several make theirs below the one that is named."""
    names, verifier, trusts = settings.speculator_type, settings.verifier, settings.trust_remote_code
    words = ["--verifier", verifier, *(["--trust-remote-code"] if trusts else []), "--speculator-type", ",".join(names)]
    first = unsaid(first, settings.train_flags)
    words += ["--data", str(output / ROWS), *first, *draft_vocabulary(names, verifier, trusts, settings.train_flags)]
    root = output / folder
    return [*words, *settings.train_flags, "--output", str(root / names[0] if len(names) == 1 else root), *last]


def unsaid(flags: Sequence[str], given: Sequence[str]) -> list[str]:
    """Leaves out those flags, each with its value, that are given."""
    said = flags_in(given)
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in said for word in pair]


def flags_in(words: Sequence[str]) -> list[str]:
    """The names of the flags: "--lr" of `--lr 3e-3` and `--lr=3e-3`."""
    return [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]


def commands_in(done: Mapping[str, Any]) -> dict[str, Any]:
    """The steps that are commands, in order."""
    return {name: step for name, step in done.items() if isinstance(step, dict) and "command" in step}


def refuse_other_files(output: Path) -> None:
    """Raises `ValueError` where something is that is no build."""
    is_used = output.exists() and any(not file.name.startswith(".") for file in output.iterdir())
    if is_used and not (output / STATE).exists():
        raise ValueError(f"{output} holds other files and no {STATE}: name another directory with --output")
