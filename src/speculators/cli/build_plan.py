"""What `speculators build` decides: which prompts are held out, how the time is spent, which checkpoint and K are best.

Every decision follows from files below the output directory, so that a build that is continued decides the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.cli.build import AUTO
from speculators.data_generation.conversations import UnusableRow
from speculators.data_generation.datasets import load_raw_dataset
from speculators.data_generation.rollout import Rollout, make_rollout
from speculators.train.algorithm import Algorithm
from speculators.train.checkpoint_files import METRICS_FILE
from speculators.train.checkpointer import CURVE_FILE
from speculators.train.config import ConfigError, TrainConfig
from speculators.train.events import DECODED
from speculators.train.keys import RunKeys
from speculators.training_keys import default_of
from speculators.utils.files import atomic_write

ANSWERING, TRAINING, MEASURING = 0.35, 0.45, 0.2
"""Shares of the budget. Text is what a drafter lacks first, so answering gets nearly as much as training."""
MOST_HELD_OUT, SHARE_HELD_OUT, FEWEST_PROMPTS = 50, 0.1, 8
PILOT_ANSWERS, PILOT_STEPS = 32, 3
MOST_EPOCHS = 10
"""Beyond it acceptance on held-out text no longer rises, whatever the training loss says."""
ALONE = 4.0
"""A prompt decoded alone, as a measurement does, is taken to cost so much more than one in the pilot's batch."""
MEASURED_PROMPTS = (5, 40)
SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_budget(text: str) -> float:
    """Returns the seconds of `90s`, `20m`, `1h`, `1h30m`. Raises `ValueError` for other texts, and for no time."""
    if not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
        raise ValueError(f"--budget {text!r} is no time: write 90s, 20m, 1h or 1h30m")
    seconds = sum(float(number) * SECONDS[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))
    if seconds <= 0:
        raise ValueError(f"--budget {text!r} leaves no time: give a minute at least")
    return seconds


def names_of(text: str) -> list[str]:
    """`eagle3,dflash`; `auto`: the default of `train`. Raises `ValueError` for a name that no algorithm has."""
    default = default_of(RunKeys, "speculator_type")
    names = [default if name.strip() == AUTO else name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        Algorithm.find({"speculator_type": name})
    return list(dict.fromkeys(names)) or [default]


def parse_numbers(text: str) -> list[int]:
    """Returns the numbers of `2,4`, ascending. Raises `ValueError` for anything else, and below 1."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise ValueError(f"--num-speculative-tokens {text}: numbers from 1 with commas, such as 2,4")
    return numbers


@dataclass(frozen=True)
class Prompts:
    """The two files of prompts, and what became of the rows."""

    train: Path
    held_out: Path
    num_train: int
    num_held_out: int
    num_repeated: int
    """Rows that ask what another row asks: a held-out prompt is trained on by none."""
    unusable: Mapping[str, int]
    """Reason -> rows."""
    shape: str

    def sentence(self) -> str:
        told = f"prompts are in {self.shape}: {self.num_train} to train on, {self.num_held_out} held out"
        if self.num_repeated:
            told += f", {self.num_repeated} repeated"
        if self.unusable:
            told += f", {sum(self.unusable.values())} unusable ({'; '.join(list(self.unusable)[:3])})"
        return told


def split_prompts(data: str, folder: Path, prompt_field: str | None) -> Prompts:
    """Writes `train.jsonl` and `held-out.jsonl`. Which row goes where depends on its content alone.

    Raises `ValueError` for a source that cannot be read or has fewer than eight different prompts.
    """
    rows: dict[str, Rollout] = {}
    unusable: Counter[str] = Counter()
    num_read = 0
    for index, row in enumerate(load_raw_dataset(data)):
        num_read += 1
        try:
            rollout = make_rollout(index, row, "", prompt_field)
        except UnusableRow as reason:
            unusable[str(reason)] += 1
            continue
        rows.setdefault(rollout.content_sha256, rollout)
    if len(rows) < FEWEST_PROMPTS:
        reasons = "; ".join(f"{reason} ({number} rows)" for reason, number in unusable.most_common(3))
        raise ValueError(
            f"data {data!r}: {len(rows)} different prompts in {num_read} rows, at least {FEWEST_PROMPTS} are needed; "
            + (f"left out: {reasons}" if reasons else "give more of them")
        )
    num_held_out = min(MOST_HELD_OUT, max(FEWEST_PROMPTS // 2, int(len(rows) * SHARE_HELD_OUT)))
    held_out = set(sorted(rows, key=lambda sha: hashlib.sha256(sha.encode()).digest())[:num_held_out])
    folder.mkdir(parents=True, exist_ok=True)
    files = {True: folder / "held-out.jsonl", False: folder / "train.jsonl"}
    for is_held_out, path in files.items():
        with atomic_write(path, "w") as file:
            file.writelines(as_line(sha, rollout) for sha, rollout in rows.items() if (sha in held_out) == is_held_out)
    return Prompts(
        train=files[False],
        held_out=files[True],
        num_train=len(rows) - num_held_out,
        num_held_out=num_held_out,
        num_repeated=num_read - len(rows) - unusable.total(),
        unusable=dict(unusable.most_common()),
        shape=next(iter(rows.values())).shape,
    )


def as_line(sha256: str, rollout: Rollout) -> str:
    if rollout.prompt_ids is not None:
        row: dict[str, Any] = {"input_ids": [*rollout.prompt_ids, 0], "loss_mask": [0] * len(rollout.prompt_ids) + [1]}
    else:
        row = {"messages": rollout.turns} | ({"tools": rollout.tools} if rollout.tools else {})
    return json.dumps({"id": sha256[:16], **row}, ensure_ascii=False) + "\n"


def num_answers(pilot: Mapping[str, Any], budget_s: float, num_prompts: int) -> int:
    """Conversations to answer, from how long the pilot took."""
    per_conversation_s = pilot["time_s"] / max(pilot["num_conversations"], 1)
    return max(min(num_prompts, int(budget_s * ANSWERING / per_conversation_s)), min(PILOT_ANSWERS, num_prompts))


def num_measured(pilot: Mapping[str, Any], budget_s: float, num_prompts: int, num_decodings: int) -> int:
    """Held-out prompts that every method decodes. `num_decodings`: methods times numbers of draft tokens."""
    per_prompt_s = ALONE * pilot["time_s"] / max(pilot["num_conversations"], 1)
    fewest, most = MEASURED_PROMPTS
    return min(num_prompts, max(fewest, min(most, int(budget_s * MEASURING / (per_prompt_s * num_decodings)))))


def num_epochs(pilot_run: Path, num_tokens: int, budget_s: float, num_drafters: int) -> int:
    """Epochs that fit the time of one drafter, by the speed of the pilot's last steps."""
    lines = [json.loads(line) for line in (pilot_run / CURVE_FILE).read_text().splitlines()]
    speeds = [line["tokens_per_s"] for line in lines if line["split"] == "train"]
    epoch_s = num_tokens / statistics.median(speeds[1:] or speeds)
    return max(1, min(MOST_EPOCHS, int(budget_s * TRAINING / num_drafters / epoch_s)))


def row_length(num_tokens: int, longest: int) -> int:
    """Tokens of a packed row: short rows make more steps of few data, and a step's memory grows with it."""
    wanted = 1024 if num_tokens < 300_000 else 2048 if num_tokens < 3_000_000 else 4096
    return max(wanted, longest)


def draft_vocabulary(algorithm: str, verifier: str, vocab_size: int) -> list[str]:
    """The flags of a draft vocabulary of a quarter of the verifier's, for algorithms that have one."""
    size = vocab_size // 4 // 64 * 64
    given = {"speculator_type": algorithm, "verifier_name_or_path": verifier, "draft_vocab_size": size}
    try:
        TrainConfig.from_sources(cli=given)
    except ConfigError:
        return []
    return ["--draft-vocab-size", str(size)] if vocab_size > 8192 else []


def best_checkpoint(run: Path) -> tuple[Path, float]:
    """The checkpoint whose drafts were accepted longest when prompts were decoded, and that length.

    The validation loss falls on after acceptance has had its peak: it is not asked.
    """
    measured = {}
    for file in sorted(run.glob(f"[0-9]*/{METRICS_FILE}"), key=lambda file: int(file.parent.name)):
        length = json.loads(file.read_text()).get(DECODED)
        if length is not None:
            measured[file.parent] = float(length)
    if not measured:
        raise ValueError(f"no checkpoint in {run} has a decoded acceptance length: answers were too short to measure")
    best = max(measured, key=lambda path: measured[path])
    return best, measured[best]


@dataclass(frozen=True)
class Choice:
    """The fastest method of all measurements."""

    method: str
    num_speculative_tokens: int
    row: Mapping[str, Any]

    @property
    def pays(self) -> bool:
        return bool(self.row["speedup"]["low"] > 1)


def choose(evaluations: Mapping[int, Mapping[str, Any]], methods: Sequence[str] | None = None) -> Choice:
    """The drafting method with the largest measured speedup. `methods`: only among these."""
    rows = [
        Choice(row["method"], number, row)
        for number, report in evaluations.items()
        for row in report["rows"]
        if row["method"] != "none" and (methods is None or row["method"] in methods)
    ]
    return max(rows, key=lambda choice: choice.row["speedup"]["value"])
