"""`sp.build`: answers prompts with a verifier, trains drafters on that, measures and proves them, says what to serve.

    prompts -> split -> answers -> rows -> drafters, side by side -> the best checkpoints, by decoding
    -> measured beside plain decoding -> proven -> report

Each step is a command of the `speculators` program, run in this process as that command runs it. What is done is
written to `build.json`: the same call, after whatever ended it, goes on with the step that was not finished.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from speculators import api, building
from speculators.building import AUTO, DEFAULT_BUDGET, DEFAULT_DRAFT_TOKENS, plan, report
from speculators.building.report import BuildResult, Listener, Settings, StepBegun, StepEnded, command_of, training_of
from speculators.data_generation.configs import DEFAULT_ANSWER_TOKENS
from speculators.data_generation.prepare import prepare_data
from speculators.decoding.method import PLAIN
from speculators.deploy.check import check_checkpoint
from speculators.evaluation.page import write_page
from speculators.evaluation.report import load_result
from speculators.provenance import DoneSteps, output_lock
from speculators.train.drafters import resolve_all
from speculators.train.events import Note, ignore
from speculators.train.logger import TrainingProgress
from speculators.train.run import train_side_by_side
from speculators.utils.files import remove_directory
from speculators.utils.progress import no_progress_bars
from speculators.utils.report import TableReport

UNTRAINED = ("ngram", "suffix")
TIMING = ("--no-parity-gate", "--no-contract-check", "--log-freq", "1", "--hidden-states-memory-gb", "0")
"""Flags of a pilot: without a cache that would compute the states of many rows ahead, a step takes what it takes."""
PILOTING = "The verifier answers a few prompts: how long does it take?"
ANSWERING = "The verifier answers: a drafter learns the text that it will see"

Done = tuple[Sequence[TableReport], dict[str, Any]]
"""What a step reports, and what later steps need of it."""


@no_progress_bars()
def build(
    verifier: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    budget: str = DEFAULT_BUDGET,
    speculator_type: str | Sequence[str] = AUTO,
    num_speculative_tokens: str | int | Sequence[int] = DEFAULT_DRAFT_TOKENS,
    held_out: str | os.PathLike[str] | None = None,
    prompt_field: str | None = None,
    max_tokens: int = DEFAULT_ANSWER_TOKENS,
    train_flags: str | Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: bool = False,
    on_event: Listener = lambda event: None,
) -> BuildResult:
    """Makes a drafter for a verifier from prompts: answers them, trains, measures and proves, and says what to serve.

    `verifier`: hub id or directory. `data`: prompts, as a file, directory, `hf:<id>` or preset; `prompt_field`: their
    column, if it is not known. `output`: directory of everything; a build that ended early is continued there.
    `budget`: the time to spend, about ("20m", "1h30m"), or the work, which is the same on any machine
    ("answers=600,epochs=4,prompts=20"). `speculator_type`: algorithms, trained on one pass over the verifier; "auto":
    the default of `train`. `num_speculative_tokens`: draft tokens per round to measure. `held_out`: prompts to measure
    on; None: a tenth of `data`. `max_tokens`: longest answer. `train_flags`: further flags of `speculators train`.
    `on_event` is called with every step that begins or ends, and with notes. The result is a path of the checkpoint.
    Raises `ValueError` for a verifier or data that cannot be read, for too few prompts, and for an `output` of other
    settings or with other files; the errors of a step.
    """
    settings = Settings(
        verifier=os.fspath(verifier),
        data=os.fspath(data),
        budget=budget,
        speculator_type=plan.parse_algorithms(speculator_type),
        num_speculative_tokens=plan.parse_draft_tokens(num_speculative_tokens),
        held_out=None if held_out is None else os.fspath(held_out),
        prompt_field=prompt_field,
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
        train_flags=shlex.split(train_flags) if isinstance(train_flags, str) else list(train_flags),
    )
    path, work = Path(output), plan.Budget.parse(budget)
    report.refuse_other_files(path)
    with output_lock(path / building.LOCK, f"the build in {path}", lambda text: on_event(Note(text))):
        steps = DoneSteps(path / building.STATE, asdict(settings), "name another --output, or delete that one")
        if steps.done:
            on_event(Note(f"going on with the build in {path}: {len(steps.done)} steps are done"))
        return Build(path, settings, work, steps, progress, on_event).to_the_end()


@dataclass
class Build:
    """One build, step by step."""

    output: Path
    settings: Settings
    budget: plan.Budget
    steps: DoneSteps
    progress: bool
    tell: Listener
    number: int = 0
    """Of the last step."""

    def to_the_end(self) -> BuildResult:
        resolve_all(training_of(self.settings, self.output, building.PILOT, [], []))  # refuses flags before any work
        prompts = self.steps.once("split", self.split)
        self.steps.once("num_threads", torch.get_num_threads)
        limit = self.answer(prompts)
        rows = self.prepare()
        epochs = self.train(rows)
        chosen = {name: plan.best_checkpoint(self.output / name)[0] for name in self.settings.speculator_type}
        num_prompts = self.evaluate(prompts, [PLAIN, *UNTRAINED, *map(str, chosen.values())])
        evaluation = load_result(self.output / building.RESULT)
        checkpoint = Path(str(report.drafting_path(drafter := report.fastest(evaluation, list(chosen.values())))))
        check, parity = self.check(checkpoint, drafter.num_speculative_tokens), self.verify(checkpoint)
        result = BuildResult(
            checkpoint=checkpoint,
            evaluation=evaluation,
            drafters=chosen,
            parity={name: parity[name] for name in ("passed", "checks")},
            report=self.output / building.REPORT,
            page=self.output / building.PAGE,
            verifier=self.settings.verifier,
            served_by=check["served_by"],
            num_answers=limit,
            steps=report.commands_in(self.steps.done),
            weakness=plan.weakness_of(checkpoint),
            budget=f"answers={limit},epochs={epochs},prompts={num_prompts}",
        )
        result.save()
        write_page([evaluation], result.page)
        self.steps.once(building.END, lambda: True)
        return result

    def step(self, name: str, title: str, command: str, act: Callable[[], Done]) -> Any:
        """Does a step unless it is done; returns its record."""
        self.number += 1
        ended: list[StepEnded] = []

        def run() -> dict[str, Any]:
            self.tell(StepBegun(self.number, title, command))
            began_s = time.perf_counter()
            try:
                reports, record = act()
            except KeyboardInterrupt as stop:
                kept = f"what was done is kept in {self.output}; the same command goes on from there"
                raise KeyboardInterrupt(f"stopped in step {self.number}: {kept}") from stop
            ended.append(StepEnded(self.number, reports, time.perf_counter() - began_s))
            return {**record, "time_s": ended[0].time_s, "command": command}

        record = self.steps.once(name, run)
        for event in ended:
            self.tell(event)
        return record

    def split(self) -> dict[str, Any]:
        given, folder = self.settings, self.output / building.PROMPTS
        prompts = plan.split_prompts(given.data, folder, given.prompt_field, given.held_out)
        self.tell(Note(prompts.sentence()))
        return asdict(prompts)

    # -- the verifier's answers

    def answer(self, prompts: Mapping[str, Any]) -> int:
        """Answers as many prompts as fit the time, and returns their number."""
        limit, num_prompts = self.budget.num_answers, prompts["num_train"]
        if limit is None:
            pilot = self.answers("pilot", PILOTING, prompts["train"], min(plan.PILOT_ANSWERS, num_prompts))
            limit = self.steps.once("num_answers", lambda: plan.num_answers(pilot, self.budget.seconds, num_prompts))
        limit = min(limit, num_prompts)
        self.answers("answers", ANSWERING, prompts["train"], limit)
        return limit

    def answers(self, name: str, title: str, data: str, limit: int) -> Any:
        goes_on = name != "pilot"  # which is timed from its beginning
        settings: dict[str, Any] = {
            **self.settings.of_verifier,
            "data": str(data),
            "output": str(self.output / building.ANSWERS),
            "max_tokens": self.settings.max_tokens,
            "batch_size": plan.PILOT_ANSWERS,
            "limit": limit,
            "resume": goes_on,
        }

        def act() -> Done:
            if not goes_on:
                for file in self.output.glob(f"{Path(building.ANSWERS).stem}.*"):
                    file.unlink()
            answered = api.regenerate(**settings, progress=self.progress)
            answered.raise_for_errors()
            num_conversations = answered.num_conversations + answered.num_already_done
            return [answered], {"num_conversations": num_conversations, "num_tokens": answered.num_tokens}

        return self.step(name, title, command_of("regenerate-responses", settings), act)

    def prepare(self) -> Any:
        answers, output = str(self.output / building.ANSWERS), str(self.output / building.ROWS)
        name, trusts = self.settings.verifier, self.settings.trust_remote_code

        def act() -> Done:
            rows = prepare_data(name, answers, output=output, trust_remote_code=trusts, progress=self.progress)
            assert rows.manifest is not None
            return [rows], {name: getattr(rows.manifest, name) for name in ("num_rows", "num_tokens", "longest_row")}

        command = command_of("prepare-data", {**self.settings.of_verifier, "data": answers, "output": output})
        title = "Tokenise, and mark which tokens the verifier wrote"
        return self.step("rows", title, command, act)

    # -- the drafters

    def train(self, rows: Mapping[str, Any]) -> int:
        """Trains all drafters on one pass over the verifier, and returns the epochs that fit the time."""
        names, epochs = self.settings.speculator_type, self.budget.num_epochs
        length = ["--total-seq-len", str(plan.row_length(rows["num_tokens"], rows["longest_row"]))]
        if epochs is None:
            title = f"Train {', '.join(names)} for {plan.PILOT_STEPS} steps: how long does a step take?"
            few = ["--max-steps", str(plan.PILOT_STEPS), *TIMING]
            self.trained("training-pilot", title, training_of(self.settings, self.output, building.PILOT, length, few))
            pilots = [self.output / building.PILOT / name for name in names]
            asked = (pilots, rows["num_tokens"], self.budget.seconds, self.steps.done["pilot"])
            epochs = self.steps.once("num_epochs", lambda: plan.num_epochs(*asked))
        title = f"Train {', '.join(names)} for {epochs} epochs; held-out rows are decoded after each"
        first, last = [*length, "--eval-prompts", str(plan.PROMPTS_OF_VALIDATION)], ["--epochs", str(epochs)]
        self.trained("training", title, training_of(self.settings, self.output, "", first, last))
        return epochs

    def trained(self, name: str, title: str, words: list[str]) -> Any:
        def act() -> Done:
            if name != "training" and (self.output / building.PILOT).exists():  # it is timed from its beginning
                remove_directory(self.output / building.PILOT)
            configs = resolve_all(words)
            with TrainingProgress() if self.progress else nullcontext() as bar:
                listen = (lambda name: ignore) if bar is None else bar.of_each(len(configs))
                results = train_side_by_side(configs, listen=listen)
            for result in results:
                result.raise_for_errors()
            return results, {"checkpoints": [str(result.checkpoint) for result in results]}

        return self.step(name, title, shlex.join(["speculators", "train", *words]), act)

    # -- measured and proven

    def evaluate(self, prompts: Mapping[str, Any], methods: list[str]) -> int:
        """Measures every method on as many held-out prompts as fit the time, and returns their number."""
        numbers, num_prompts = self.settings.num_speculative_tokens, self.budget.num_prompts
        if num_prompts is None:
            asked = (
                self.steps.done["pilot"],
                self.budget.seconds,
                prompts["num_held_out"],
                len(methods) * len(numbers),
            )
            num_prompts = self.steps.once("num_measured", lambda: plan.num_measured(*asked))
        settings: dict[str, Any] = {
            **self.settings.of_verifier,
            "data": str(prompts["held_out"]),
            "methods": methods,
            "num_speculative_tokens": numbers,
            "num_prompts": num_prompts,
            "max_tokens": self.settings.max_tokens,
            "output": str(self.output / building.RESULT),
        }

        def act() -> Done:
            measured = api.evaluate(**settings, progress=self.progress)
            return [measured], {}

        title = "Measure every method beside plain decoding, on held-out prompts"
        self.step("evaluation", title, command_of("evaluate", settings), act)
        return num_prompts

    def check(self, checkpoint: Path, num_k: int) -> Any:
        def act() -> Done:
            found = check_checkpoint(checkpoint, verifier=self.settings.verifier).told(num_speculative_tokens=num_k)
            found.raise_for_errors()
            return [found], {"served_by": found.served_by}

        command = command_of("check", {"verifier": self.settings.verifier}, str(checkpoint))
        return self.step("check", "Is the directory what vLLM will serve?", command, act)

    def verify(self, checkpoint: Path) -> Any:
        def act() -> Done:
            found = api.verify(checkpoint, **self.settings.of_verifier, vllm=True, progress=self.progress)
            found.raise_for_errors()
            return [found], {"passed": found.passed, "checks": found.facts()}

        title = "Do training, the engine and the verifier agree on every draft?"
        return self.step("verify", title, command_of("verify", self.settings.of_verifier, str(checkpoint)), act)
