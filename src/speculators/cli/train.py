"""`speculators train`: the configuration reads its own flags; here are only the progress bar and the summary."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from speculators.cli.flags import choosing_threads
from speculators.cli.shared import Result, error_of, say
from speculators.train.config import TrainConfig, refuse_missing_paths
from speculators.train.drafters import help_parser_of, resolve_all

if TYPE_CHECKING:
    from speculators.train.records import TrainResult


def help_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    return help_parser_of(argv)


def train(context: typer.Context) -> Result:
    refuse_missing_paths(context.args)
    configs = resolve_all(context.args)
    verifier, names = configs[0].verifier.verifier_name_or_path, [config.speculator_type for config in configs]
    say(f"{'estimating' if configs[0].estimate else 'training'} {', '.join(names)} for {verifier}")

    from speculators.train.logger import TrainingProgress
    from speculators.train.recipe import begun_threads
    from speculators.train.run import estimate, train_side_by_side

    if configs[0].estimate:
        found = [estimate(config, TrainingProgress()) for config in configs]
        estimates = {"verb": "train", "estimates": [each.as_dict() for each in found]}
        return Result(estimates, found, "; ".join(each.sentence() for each in found))

    with choosing_threads(begun_threads(configs)), TrainingProgress() as progress:
        results = train_side_by_side(configs, listen=progress.of if len(configs) > 1 else lambda name: progress)
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
        "check": None if check is None else check.as_dict(),
        "parity": None if parity is None else {"passed": parity.passed, "checks": parity.facts()},
    }
