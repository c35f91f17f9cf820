"""`speculators train`, whose configuration reads its own flags, and the verbs that end with a trained drafter: `build`,
and `quickstart`, which is `build` with the embedded verifier."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculators import building
from speculators.building import AUTO, DEFAULT_BUDGET, DEFAULT_DRAFT_TOKENS
from speculators.cli.flags import choosing_threads
from speculators.cli.shared import Result, TrustRemoteCode, Verifier, error_of, out, say
from speculators.data_generation.configs import DEFAULT_ANSWER_TOKENS
from speculators.provenance import read_steps
from speculators.train.config import TrainConfig, refuse_missing_paths
from speculators.train.drafters import help_parser_of, resolve_all
from speculators.utils.report import is_first_rank

if TYPE_CHECKING:
    from speculators.building.report import StepBegun, StepEnded
    from speculators.train.events import Note
    from speculators.train.records import TrainResult

QUICKSTART: dict[str, Any] = {
    "budget": "answers=600,epochs=4,prompts=20",
    "num_speculative_tokens": 4,
    "max_tokens": 128,
    "train_flags": "--draft-vocab-size 2048 --total-seq-len 512 --lr 3e-3",
}
"""Less than three minutes of one core, and the same drafter on every machine of a kind, as the clock decides nothing. A
narrow drafter takes a larger learning rate than the default, and short packed rows give it more steps per epoch."""


def help_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    return help_parser_of(argv)


def train(context: typer.Context) -> Result:
    refuse_missing_paths(context.args)
    configs = resolve_all(context.args)
    verifier, names = configs[0].verifier.verifier_name_or_path, [config.speculator_type for config in configs]
    if is_first_rank():
        say(f"{'estimating' if configs[0].estimate else 'training'} {', '.join(names)} for {verifier}")

    from speculators.train.logger import TrainingProgress
    from speculators.train.recipe import begun_threads
    from speculators.train.run import estimate, train_side_by_side

    if configs[0].estimate:
        found = [estimate(config, TrainingProgress()) for config in configs]
        estimates = {"verb": "train", "estimates": [each.as_dict() for each in found]}
        return Result(estimates, found, "; ".join(each.sentence() for each in found))

    with choosing_threads(begun_threads(configs)), TrainingProgress() as progress:
        results = train_side_by_side(configs, listen=progress.of_each(len(configs)))
    records = [record_of(config, result) for config, result in zip(configs, results, strict=True)]
    sentences = [result.sentence() for result in results]
    methods = [word for result in results for word in ("--method", str(result.checkpoint))]
    evaluation = ["speculators", "evaluate", "--verifier", verifier, *methods, "--data", "HELD_OUT.jsonl"]
    errors = [error for result in results if (error := error_of(result.raise_for_errors)) is not None]
    if len(configs) == 1:
        return Result({"verb": "train", **records[0]}, results, sentences[0], evaluation, next(iter(errors), None))
    told = "; ".join(f"{name}: {sentence}" for name, sentence in zip(names, sentences, strict=True))
    record = {"verb": "train", "speculator_type": ",".join(names), "drafters": dict(zip(names, records, strict=True))}
    return Result(record, results, told, evaluation, next(iter(errors), None))


def record_of(config: TrainConfig, result: TrainResult) -> dict[str, Any]:
    check, parity = result.check, result.parity
    return {
        "speculator_type": config.speculator_type,
        "checkpoint": str(result.checkpoint),
        "num_steps": result.num_steps,
        "acceptance_length": result.acceptance_length,
        "metrics": result.metrics,
        "model_tflop_per_s": result.model_tflop_per_s,
        "mfu": result.mfu,
        "check": None if check is None else check.as_dict(),
        "parity": None if parity is None else {"passed": parity.passed, "checks": parity.facts()},
    }


# -- the whole path, step by step


def build(
    verifier: Verifier,
    data: Annotated[str, typer.Option(help="Prompts: file, directory, hf:<id> or preset; chats or columns of text.")],
    output: Annotated[Path, typer.Option(help="Where everything is written.")],
    budget: Annotated[
        str, typer.Option(help="Time to spend in all, about: 20m, 1h30m; or work: answers=600,epochs=4,prompts=20.")
    ] = DEFAULT_BUDGET,
    speculator_type: Annotated[
        str, typer.Option(help="Drafters to train side by side: auto, or names with commas.")
    ] = AUTO,
    num_speculative_tokens: Annotated[
        str, typer.Option("-k", "--num-speculative-tokens", help="Draft tokens per round to try, with commas.")
    ] = ",".join(map(str, DEFAULT_DRAFT_TOKENS)),
    held_out: Annotated[str | None, typer.Option(help="Prompts to measure on. Default: a tenth of --data.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="Column of the prompts. Default: recognised.")] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest answer, in tokens.")] = DEFAULT_ANSWER_TOKENS,
    train_flags: Annotated[str | None, typer.Option(help="Further flags of train: '--lr 3e-3 --num-layers 2'.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Answer prompts with the verifier, train drafters on that, measure and prove them, and say what to serve."""
    return built(
        "build",
        verifier=verifier,
        data=data,
        output=output,
        budget=budget,
        speculator_type=speculator_type,
        num_speculative_tokens=num_speculative_tokens,
        held_out=held_out,
        prompt_field=prompt_field,
        max_tokens=max_tokens,
        train_flags=train_flags or "",
        trust_remote_code=trust_remote_code,
    )


def quickstart(
    output: Annotated[Path, typer.Option(help="Where everything is written; replaced when it exists.")] = Path(
        "quickstart-output"
    ),
) -> Result:
    """Build an EAGLE-3 drafter for a small verifier that comes with the package: answer, train, measure, prove."""
    from speculators import assets

    verifier = str(assets.tiny_verifier_path())
    data, held_out = (str(assets.prompts_path(split)) for split in ("train", "heldout"))
    sources = {"verifier": verifier, "data": data, "held_out": held_out}
    clear_finished(output, sources)
    return built("quickstart", output=output, **sources, **QUICKSTART)


def built(verb: str, *, output: Path, **settings: Any) -> Result:
    """`settings`: what `speculators.build` takes."""
    from speculators.building.run import build

    begun = (begun_build(output) or {"done": {}})["done"].get("num_threads")
    with choosing_threads(begun):
        result = build(output=output, **settings, progress=True, on_event=show_step)
    next_command = result.serve if result.pays else []
    return Result({"verb": verb, **result.to_dict()}, [result], result.sentence(), next_command)


def show_step(event: StepBegun | StepEnded | Note) -> None:
    """Prints a step and its command when it begins, and its tables when it ends."""
    from speculators.building.report import StepBegun, StepEnded

    match event:
        case StepBegun():
            out().rule(f"[bold]{event.number} {event.title}", align="left")
            out().print(f"$ {event.command}", style="cyan", markup=False, soft_wrap=True)
        case StepEnded():
            for report in event.reports:
                out().print(report)
        case _:
            say(event.text)


def clear_finished(output: Path, sources: dict[str, str]) -> None:
    """Deletes what a finished quickstart wrote. Raises `ValueError` where anything else is there."""
    if not output.exists():
        return
    state = begun_build(output) or {"settings": sources, "done": {}}
    ours = {*building.WRITTEN, *state["settings"].get("speculator_type", [])}
    ours |= {path.name for path in output.glob(f"{Path(building.ANSWERS).stem}.*")}
    others = sorted({path.name for path in output.iterdir()} - ours)
    built_from = {name: state["settings"].get(name) for name in sources}
    if others or built_from != sources:
        found = f"holds {others[:5]}" if others else f"is of a build with {built_from}"
        raise ValueError(f"{output} {found} and is not an earlier quickstart's; name another directory with --output")
    if building.END in state["done"]:
        shutil.rmtree(output)


def begun_build(output: Path) -> dict[str, Any] | None:
    """What a build wrote of itself: its settings, and what is done; None where none was begun."""
    file = output / building.STATE
    return read_steps(file, "delete it") if file.is_file() else None
