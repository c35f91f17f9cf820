"""`speculators build`: a drafter for one's own model from its prompts, as the commands a user would type one by one.

    prompts -> split -> answers -> rows -> drafters -> the best checkpoint by decoding -> measured -> proven -> report

Steps that are done are written to `build.json`: the same command, after whatever ended it, goes on with the next one.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from speculators.cli.quickstart import run_step
from speculators.cli.shared import Result, TrustRemoteCode, Verifier, out, say
from speculators.data_generation.configs import DEFAULT_ANSWER_TOKENS
from speculators.utils.files import atomic_write
from speculators.utils.report import facts_table

DEFAULT_BUDGET = "1h"
AUTO = "auto"
"""The drafter that `train` has by default."""
DRAFT_TOKENS = (2, 4)
UNTRAINED = ("ngram", "suffix")
PROMPTS_OF_VALIDATION = 12
STATE, REPORT, PAGE = "build.json", "report.md", "report.html"
RESULT = "evaluation-k{}.json"


class Build:
    """The steps of one build and what they returned. Raises `ValueError` where `output` is of another one."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output, self.settings = output, dict(settings)
        self.done: dict[str, Any] = {}
        self.number = 0
        if (output / STATE).exists():
            state = json.loads((output / STATE).read_text())
            changed = [
                f"{key}: {state['settings'].get(key)!r} -> {value!r}"
                for key, value in self.settings.items()
                if state["settings"].get(key) != value
            ]
            if changed:
                raise ValueError(
                    f"{output} is of a build with other settings ({'; '.join(changed)}): give another --output, or "
                    "delete it"
                )
            self.done = state["done"]
            say(f"going on with the build in {output}: {len(self.done)} steps are done")
        elif output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} holds other files and no {STATE}: name another directory with --output")
        self.save()

    def save(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.output / STATE, "w") as file:
            json.dump({"settings": self.settings, "done": self.done}, file, indent=1, default=str)

    def command(self, key: str, title: str, command: Sequence[str]) -> dict[str, Any]:
        """Runs a step that is a command, unless it is done; returns its record."""
        self.number += 1
        if key not in self.done:
            record, _ = run_step(self.number, title, command, str(self.output))
            self.done[key] = {**record, "command": f"speculators {shlex.join(command)}"}
            self.save()
        return dict(self.done[key])

    def decide(self, key: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Makes a decision once, so that a build which is continued keeps it."""
        if key not in self.done:
            self.done[key] = decide()
            self.save()
        return dict(self.done[key])


@dataclass(frozen=True)
class VerifierFlags:
    """The verifier, as every step is told."""

    name: str
    trust_remote_code: bool

    @property
    def flags(self) -> list[str]:
        return ["--verifier", self.name, *(["--trust-remote-code"] if self.trust_remote_code else [])]


def build(
    verifier: Verifier,
    data: Annotated[str, typer.Option(help="Prompts: file, directory, hf:<id> or preset; chats or columns of text.")],
    output: Annotated[Path, typer.Option(help="Where everything is written.")],
    budget: Annotated[str, typer.Option(help="Time to spend in all, about: 20m, 1h, 1h30m.")] = DEFAULT_BUDGET,
    speculator_type: Annotated[str, typer.Option(help="Drafters to train: auto, or names with commas.")] = AUTO,
    num_speculative_tokens: Annotated[
        str, typer.Option("-k", "--num-speculative-tokens", help="Draft tokens per round to try, with commas.")
    ] = ",".join(map(str, DRAFT_TOKENS)),
    prompt_field: Annotated[str | None, typer.Option(help="Column of the prompts. Default: recognised.")] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest answer, in tokens.")] = DEFAULT_ANSWER_TOKENS,
    train_flags: Annotated[str | None, typer.Option(help="Further flags of train: '--lr 3e-3 --num-layers 2'.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Answer prompts with the verifier, train drafters on that, measure and prove them, and say what to serve."""
    from speculators.cli import build_plan as plan

    budget_s, algorithms, numbers = (
        plan.parse_budget(budget),
        plan.names_of(speculator_type),
        plan.parse_numbers(num_speculative_tokens),
    )
    shaping: dict[str, Any] = {"verifier": verifier, "data": data, "budget": budget, "speculator_type": algorithms}
    shaping |= {"num_speculative_tokens": numbers, "prompt_field": prompt_field, "max_tokens": max_tokens}
    run = Build(output, {**shaping, "train_flags": train_flags})
    named = VerifierFlags(verifier, trust_remote_code)
    of_verifier = named.flags

    def split() -> dict[str, Any]:
        prompts = plan.split_prompts(data, output / "prompts", prompt_field)
        say(prompts.sentence())
        return asdict(prompts)

    prompts = run.decide("split", split)
    answers, rows = output / "responses.jsonl", output / "data"

    def answering(limit: int) -> list[str]:
        going_on = ["--resume"] if answers.exists() else []
        sampled = ["--max-tokens", str(max_tokens), "--batch-size", str(plan.PILOT_ANSWERS), "--limit", str(limit)]
        source = ["--data", str(prompts["train"]), "--output", str(answers)]
        return ["regenerate-responses", *of_verifier, *source, *sampled, *going_on]

    pilot = run.command(
        "pilot",
        "The verifier answers a few prompts: how long does it take?",
        answering(min(plan.PILOT_ANSWERS, prompts["num_train"])),
    )
    limit = run.decide("num_answers", lambda: {"value": plan.num_answers(pilot, budget_s, prompts["num_train"])})[
        "value"
    ]
    run.command("answers", "The verifier answers: a drafter learns the text that it will see", answering(limit))
    prepared = run.command(
        "rows",
        "Tokenise, and mark which tokens the verifier wrote",
        ["prepare-data", *of_verifier, "--data", str(answers), "--output", str(rows)],
    )
    chosen = {name: trained(run, name, algorithms, prepared, named, train_flags, budget_s) for name in algorithms}
    methods = ["none", *UNTRAINED, *(str(path) for path in chosen.values())]
    num_prompts = run.decide(
        "num_measured",
        lambda: {"value": plan.num_measured(pilot, budget_s, prompts["num_held_out"], len(methods) * len(numbers))},
    )["value"]
    evaluations = {
        number: run.command(
            f"evaluation-k{number}",
            f"Measure every method with {number} draft tokens against plain decoding, on held-out prompts",
            [
                *("evaluate", *of_verifier, "--data", str(prompts["held_out"])),
                *(word for method in methods for word in ("--method", method)),
                *("--num-speculative-tokens", str(number), "--limit", str(num_prompts)),
                *("--max-tokens", str(max_tokens), "--output", str(output / RESULT.format(number))),
            ],
        )
        for number in numbers
    }
    best = plan.choose(evaluations)
    drafter = plan.choose(evaluations, [method_name(evaluations, path) for path in chosen.values()])
    checkpoint = next(path for path in chosen.values() if method_name(evaluations, path) == drafter.method)
    run.command("check", "Is the directory what vLLM will serve?", ["check", str(checkpoint), *of_verifier])
    run.command(
        "verify",
        "Do training, the engine and the verifier agree on every draft?",
        ["verify", str(checkpoint), *of_verifier],
    )
    return concluded(run, best, checkpoint, evaluations)


def trained(
    run: Build,
    name: str,
    algorithms: Sequence[str],
    prepared: Mapping[str, Any],
    verifier: VerifierFlags,
    train_flags: str | None,
    budget_s: float,
) -> Path:
    """Trains one drafter within its time, and returns the checkpoint whose drafts were accepted longest."""
    from speculators.cli import build_plan as plan
    from speculators.verifier.config import open_verifier_config, text_config

    vocab_size = text_config(open_verifier_config(verifier.name, verifier.trust_remote_code)).vocab_size
    length = plan.row_length(prepared["num_tokens"], prepared["longest_row"])
    common = ["train", *verifier.flags, "--speculator-type", name, "--data", str(prepared["path"])]
    common += ["--total-seq-len", str(length), *plan.draft_vocabulary(name, verifier.name, vocab_size)]
    common += shlex.split(train_flags or "")
    pilot, folder = run.output / f"{name}-pilot", run.output / name
    unproven = ["--no-parity-gate", "--no-contract-check", "--log-freq", "1"]
    unproven += ["--hidden-states-memory-gb", "0"]  # else the first steps compute the states of many rows ahead
    run.command(
        f"{name}-pilot",
        f"Train {name} for {plan.PILOT_STEPS} steps: how long does a step take?",
        [*common, "--output", str(pilot), "--max-steps", str(plan.PILOT_STEPS), *unproven],
    )
    epochs = run.decide(
        f"{name}-epochs", lambda: {"value": plan.num_epochs(pilot, prepared["num_tokens"], budget_s, len(algorithms))}
    )["value"]
    run.command(
        name,
        f"Train {name} for {epochs} epochs; held-out rows are decoded after each",
        [*common, "--output", str(folder), "--epochs", str(epochs), "--eval-prompts", str(PROMPTS_OF_VALIDATION)],
    )
    checkpoint, length_decoded = plan.best_checkpoint(folder)
    say(f"{checkpoint}: the longest decoded acceptance length of the run, {length_decoded:.2f}")
    return checkpoint


def concluded(run: Build, best: Any, checkpoint: Path, evaluations: Mapping[int, Mapping[str, Any]]) -> Result:
    """Writes the report and says what to serve."""
    from speculators.evaluation.page import write_page  # loads torch: only the verb itself
    from speculators.evaluation.report import load_result

    verifier = run.settings["verifier"]
    estimate = best.row["speedup"]
    interval = f"{estimate['value']:.2f}x ({estimate['low']:.2f} to {estimate['high']:.2f})"
    same = f"same text, {best.row['num_identical']} of {best.row['num_prompts']}"
    named = f"{best.method} with {best.num_speculative_tokens} draft tokens"
    if best.pays:
        sentence = f"{named}: {interval} plain decoding's speed, {same}"
    else:
        sentence = f"nothing measured is surely faster than plain decoding; the best, {named}: {interval}, {same}"
        sentence += "; more prompts and a longer --budget make a better drafter"
    model = [str(checkpoint)] if best.method not in UNTRAINED else [verifier, "--method", best.method]
    serve = ["speculators", "serve", *model, "--num-speculative-tokens", str(best.num_speculative_tokens)]
    times = {key: record["time_s"] for key, record in run.done.items() if "time_s" in record}
    lines = [f"# Drafter for {verifier}", "", f"{sentence[0].upper()}{sentence[1:]}.", "", *results(evaluations), ""]
    lines += ["Speedups and acceptance lengths with their 95 % bootstrap intervals over prompts.", ""]
    lines += ["## The steps, as commands", "", "```", *(run.done[key]["command"] for key in times), "```", ""]
    lines += ["## Serve it", "", "```", shlex.join(serve), "```", ""]
    with atomic_write(run.output / REPORT, "w") as file:
        file.write("\n".join(lines))
    write_page([load_result(run.output / RESULT.format(number)) for number in evaluations], run.output / PAGE)
    out().print(comparison(evaluations))
    facts = {"checkpoint": checkpoint, "report": run.output / REPORT, "time": f"{sum(times.values()):.0f} s"}
    record = {
        "verb": "build",
        "checkpoint": str(checkpoint),
        "method": best.method,
        "num_speculative_tokens": best.num_speculative_tokens,
        "pays": best.pays,
        "speedup": dict(estimate),
        "serve": shlex.join(serve),
        "report": str(run.output / REPORT),
        "page": str(run.output / PAGE),
        "step_s": times,
        "evaluations": {str(number): dict(report) for number, report in evaluations.items()},
    }
    return Result(record, [facts_table("Done", facts)], sentence, serve if best.pays else [])


HEADINGS = ("method", "K", "acceptance length", "tokens/s", "speedup", "same text")


def rows_of(evaluations: Mapping[int, Mapping[str, Any]]) -> list[list[str]]:
    """The measurements as text; plain decoding is the denominator of each."""
    return [
        [
            row["method"],
            str(number),
            "{value:.2f} ({low:.2f} to {high:.2f})".format(**row["acceptance_length"]),
            f"{row['tokens_per_s']:.1f}",
            "{value:.2f}x ({low:.2f} to {high:.2f})".format(**row["speedup"]),
            f"{row['num_identical']} of {row['num_prompts']}",
        ]
        for number, report in evaluations.items()
        for row in report["rows"]
        if row["method"] != "none"
    ]


def results(evaluations: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows_of(evaluations))]


def comparison(evaluations: Mapping[int, Mapping[str, Any]]) -> Table:
    table = Table(*HEADINGS, title="Against plain decoding", title_justify="left", box=None, padding=(0, 1))
    for cells in rows_of(evaluations):
        table.add_row(*cells)
    return table


def method_name(evaluations: Mapping[int, Mapping[str, Any]], checkpoint: Path) -> str:
    """The name of a checkpoint's row in the reports."""
    report = next(iter(evaluations.values()))
    configs = report["settings"]["speculative_configs"]
    return next(name for name, config in configs.items() if (config or {}).get("model") == str(checkpoint))
