"""What a build decides: which prompts are held out, how the time is spent, which checkpoint is best.

Every decision follows from files below the output directory, so that a build that is continued decides the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speculators.building import AUTO
from speculators.data_generation.conversations import UnusableRow
from speculators.data_generation.datasets import load_raw_dataset
from speculators.data_generation.rollout import Rollout, make_rollout
from speculators.train.algorithm import Algorithm, names_in
from speculators.train.checkpoint_files import METRICS_FILE
from speculators.train.checkpointer import CURVE_FILE
from speculators.train.config import ConfigError, TrainConfig
from speculators.train.events import DECODED
from speculators.train.keys import RunKeys
from speculators.train.logger import step_of
from speculators.train.records import weakness
from speculators.train.run_directory import RunDirectory
from speculators.train.validation import MAX_TOKENS
from speculators.training_keys import default_of
from speculators.utils.files import atomic_write
from speculators.verifier.config import open_verifier_config, text_config

ANSWERING_SHARE, TRAINING_SHARE, MEASURING_SHARE = 0.35, 0.45, 0.2
"""Shares of the budget. Text is what a drafter lacks first, so answering gets nearly as much as training."""
MOST_HELD_OUT, SHARE_HELD_OUT, FEWEST_PROMPTS = 50, 0.1, 8
PILOT_ANSWERS, PILOT_STEPS = 32, 3
PROMPTS_OF_VALIDATION = 12
"""Decoded after each epoch."""
MOST_EPOCHS = 10
"""Beyond it acceptance on held-out text no longer rises, whatever the training loss says."""
COST_DECODED_ALONE = 4.0
"""A prompt decoded alone, as a measurement does, is taken to need so many times what one in the pilot's batch needs."""
MEASURED_PROMPTS = (5, 40)
LARGE_VOCABULARY = 8192
"""Above it a drafter's own output layer over a quarter of the tokens is worth what it leaves out."""
WORK = ("answers", "epochs", "prompts")
"""What a budget that says the work has numbers of."""
SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}
"""Of the units of a budget that says the time."""


def parse_budget(text: str) -> float:
    """Returns the seconds of `90s`, `20m`, `1h`, `1h30m`. Raises `ValueError` for other texts, and for no time."""
    if not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
        raise ValueError(f"--budget {text!r} is no time: write 90s, 20m, 1h or 1h30m")
    seconds = sum(float(number) * SECONDS[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))
    if seconds <= 0:
        raise ValueError(f"--budget {text!r} leaves no time: give a minute at least")
    return seconds


@dataclass(frozen=True)
class Budget:
    """The time to spend, about; or the work itself, whatever time it takes: then nothing depends on the clock."""

    time_s: float | None = None
    num_answers: int | None = None
    """Conversations that the verifier answers."""
    num_epochs: int | None = None
    num_prompts: int | None = None
    """Held-out prompts that every method decodes."""

    @property
    def seconds(self) -> float:
        assert self.time_s is not None
        return self.time_s

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads a time, or `answers=600,epochs=4,prompts=20`. Raises `ValueError` for anything else."""
        if "=" not in text:
            return cls(time_s=parse_budget(text))
        parts = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
        numbers = [int(parts[name]) for name in WORK if parts.get(name, "").isdecimal()]
        if (
            parts.keys() != set(WORK)
            or text.count(",") != len(WORK) - 1
            or len(numbers) != len(WORK)
            or not all(numbers)
        ):
            raise ValueError(f"--budget {text!r} is no work: write answers=600,epochs=4,prompts=20, each 1 or more")
        return cls(None, *numbers)


def parse_algorithms(given: str | Sequence[str]) -> list[str]:
    """`eagle3,dflash`; `auto`: the default of `train`. Raises `ValueError` for a name that no algorithm has."""
    default = default_of(RunKeys, "speculator_type")
    words = given.split(",") if isinstance(given, str) else list(given)
    names = names_in({"speculator_type": [default if word.strip() == AUTO else word for word in words]})
    for name in names:
        Algorithm.find({"speculator_type": name})
    return names


def parse_draft_tokens(given: str | int | Sequence[int]) -> list[int]:
    """Returns the numbers of `2,4`, ascending. Raises `ValueError` for anything else, and below 1."""
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        numbers = sorted({int(part) for part in parts})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise ValueError(f"--num-speculative-tokens {given}: numbers from 1 with commas, such as 2,4")
    return numbers


@dataclass(frozen=True)
class Prompts:
    """The two files of prompts, and what became of the rows."""

    train: Path
    held_out: Path
    num_train: int
    num_held_out: int
    num_repeated: int
    """Rows that ask what another row asks, or a held-out prompt, which none is trained on."""
    unusable: Mapping[str, int]
    """Reason -> rows."""
    shape: str

    def sentence(self) -> str:
        told = f"prompts are in {self.shape}: {self.num_train:,} to train on, {self.num_held_out:,} held out"
        if self.num_repeated:
            told += f", {self.num_repeated:,} repeated"
        if self.unusable:
            told += f", {sum(self.unusable.values()):,} unusable ({'; '.join(list(self.unusable)[:3])})"
        return told


def split_prompts(data: str, folder: Path, prompt_field: str | None, held_out: str | None = None) -> Prompts:
    """Writes `train.jsonl` and `held-out.jsonl`. Which row goes where depends on its content alone.

    `held_out`: the source of the held-out prompts; None: a tenth of `data` (4 to 50). Raises `ValueError` for a source
    that cannot be read or has fewer than eight different prompts (one, of those held out).
    """
    read = read_prompts(data, prompt_field, FEWEST_PROMPTS)
    rows, unusable, num_read = read.rows, read.unusable, read.num_read
    if held_out is None:
        num_held_out = min(MOST_HELD_OUT, max(FEWEST_PROMPTS // 2, int(len(rows) * SHARE_HELD_OUT)))
        chosen = set(sorted(rows, key=lambda sha: hashlib.sha256(sha.encode()).digest())[:num_held_out])
        measured = {sha: rollout for sha, rollout in rows.items() if sha in chosen}
    else:
        measured = read_prompts(held_out, prompt_field, 1).rows
    trained = {sha: rollout for sha, rollout in rows.items() if sha not in measured}
    if not trained:
        raise ValueError(f"every prompt of {data!r} is held out too ({held_out!r}): give others to train on")
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": trained, "held-out": measured}
    for name, prompts in files.items():
        with atomic_write(folder / f"{name}.jsonl", "w") as file:
            file.writelines(prompt_line(sha, rollout) for sha, rollout in prompts.items())
    return Prompts(
        train=folder / "train.jsonl",
        held_out=folder / "held-out.jsonl",
        num_train=len(trained),
        num_held_out=len(measured),
        num_repeated=num_read - unusable.total() - len(trained) - (len(measured) if held_out is None else 0),
        unusable=dict(unusable.most_common()),
        shape=next(iter(rows.values())).shape,
    )


@dataclass(frozen=True)
class ReadPrompts:
    rows: dict[str, Rollout]
    """Hash of what is asked -> the first row that asks it."""
    unusable: Counter[str]
    num_read: int


def read_prompts(source: str, prompt_field: str | None, fewest: int) -> ReadPrompts:
    """Reads the prompts of a source, each once. Raises `ValueError` when there are fewer than `fewest`."""
    read = ReadPrompts({}, Counter(), 0)
    num_read = 0
    for index, row in enumerate(load_raw_dataset(source)):
        num_read += 1
        try:
            rollout = make_rollout(index, row, "", prompt_field)
        except UnusableRow as reason:
            read.unusable[str(reason)] += 1
            continue
        read.rows.setdefault(rollout.content_sha256, rollout)
    if len(read.rows) < fewest:
        reasons = "; ".join(f"{reason} ({number} rows)" for reason, number in read.unusable.most_common(3))
        raise ValueError(
            f"data {source!r}: {len(read.rows)} different prompts in {num_read} rows, at least {fewest} are needed; "
            + (f"left out: {reasons}" if reasons else "give more of them")
        )
    return replace(read, num_read=num_read)


def prompt_line(sha256: str, rollout: Rollout) -> str:
    """Returns the row of a prompt, without any answer. One given as token ids has a supervised placeholder (token 0)
    in place of the answer, by which the end of the prompt is known."""
    if rollout.prompt_ids is not None:
        row: dict[str, Any] = {"input_ids": [*rollout.prompt_ids, 0], "loss_mask": [0] * len(rollout.prompt_ids) + [1]}
    else:
        row = {"messages": rollout.turns} | ({"tools": rollout.tools} if rollout.tools else {})
    return json.dumps({"id": sha256[:16], **row}, ensure_ascii=False) + "\n"


def num_answers(pilot: Mapping[str, Any], budget_s: float, num_prompts: int) -> int:
    """Conversations to answer, from how long the pilot took."""
    per_conversation_s = pilot["time_s"] / max(pilot["num_conversations"], 1)
    return max(min(num_prompts, int(budget_s * ANSWERING_SHARE / per_conversation_s)), min(PILOT_ANSWERS, num_prompts))


def num_measured(pilot: Mapping[str, Any], budget_s: float, num_prompts: int, num_decodings: int) -> int:
    """Held-out prompts that every method decodes. `num_decodings`: methods times numbers of draft tokens."""
    per_prompt_s = COST_DECODED_ALONE * pilot["time_s"] / max(pilot["num_conversations"], 1)
    fewest, most = MEASURED_PROMPTS
    return min(num_prompts, max(fewest, min(most, int(budget_s * MEASURING_SHARE / (per_prompt_s * num_decodings)))))


def num_epochs(runs: Sequence[Path], num_tokens: int, budget_s: float, pilot: Mapping[str, Any]) -> int:
    """Epochs that fit the time, by the speed of the last steps of short `runs`, and by what the `pilot` of the answers
    says of decoding prompts after each. Drafters that are trained side by side take turns: the speed of each is that
    of all together."""
    per_prompt_s = COST_DECODED_ALONE * pilot["time_s"] / max(pilot["num_conversations"], 1)
    share = min(1.0, MAX_TOKENS * pilot["num_conversations"] / max(pilot["num_tokens"], 1))
    decoding_s = len(runs) * PROMPTS_OF_VALIDATION * share * per_prompt_s
    epoch_s = num_tokens / min(map(speed_of, runs)) + decoding_s
    return max(1, min(MOST_EPOCHS, int(budget_s * TRAINING_SHARE / epoch_s)))


def speed_of(run: Path) -> float:
    """Tokens per second."""
    lines = [json.loads(line) for line in (run / CURVE_FILE).read_text().splitlines()]
    speeds = [line["tokens_per_s"] for line in lines if line["split"] == "train"]
    return statistics.median(speeds[1:] or speeds)


def row_length(num_tokens: int, longest: int) -> int:
    """Tokens of a packed row: short rows make more steps of few data, and a step's memory grows with it."""
    wanted = 1024 if num_tokens < 300_000 else 2048 if num_tokens < 3_000_000 else 4096
    return max(wanted, longest)


def draft_vocabulary(names: Sequence[str], verifier: str, trust_remote_code: bool, flags: Sequence[str]) -> list[str]:
    """The flags of a draft vocabulary of a quarter of a large one, for the algorithms that have one. `flags`: given
    ones, which may say it already."""
    vocab_size = text_config(open_verifier_config(verifier, trust_remote_code)).vocab_size
    size = vocab_size // 4 // 64 * 64
    if vocab_size <= LARGE_VOCABULARY or any("draft-vocab-size" in word for word in flags):
        return []
    is_read = any(has_draft_vocabulary(name, verifier, size) for name in names)
    return ["--draft-vocab-size", str(size)] if is_read else []


def has_draft_vocabulary(algorithm: str, verifier: str, size: int) -> bool:
    given = {"speculator_type": algorithm, "verifier_name_or_path": verifier, "draft_vocab_size": size}
    try:
        TrainConfig.from_sources(cli=given)
    except ConfigError:
        return False
    return True


def best_checkpoint(run: Path) -> tuple[Path, float]:
    """The checkpoint whose drafts were accepted longest when prompts were decoded, and that length.

    The validation loss falls on after acceptance has had its peak: it is not asked.
    """
    measured = {}
    for checkpoint in RunDirectory(run).epochs():
        file = checkpoint / METRICS_FILE
        length = json.loads(file.read_text()).get(DECODED) if file.is_file() else None
        if length is not None:
            measured[checkpoint] = float(length)
    if not measured:
        raise ValueError(f"no checkpoint in {run} has a decoded acceptance length: answers were too short to measure")
    best = max(measured, key=lambda path: measured[path])
    return best, measured[best]


def weakness_of(checkpoint: Path) -> str:
    """What speaks against a checkpoint of a run, by the curve beside it; empty where nothing does."""
    metrics = json.loads((checkpoint / METRICS_FILE).read_text())
    lines = [json.loads(line) for line in (checkpoint.parent / CURVE_FILE).read_text().splitlines() if step_of(line)]
    of_epoch = [line for line in lines if line["split"] == "train" and line["epoch"] <= int(checkpoint.name)]
    return weakness(of_epoch[-1] if of_epoch else {}, metrics, metrics.get(DECODED))
