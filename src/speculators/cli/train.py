"""`speculators train`: the configuration reads its own flags; here are only the progress bar and the summary."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import typer

from speculators.cli.flags import choosing_threads
from speculators.cli.shared import Result, error_of, say
from speculators.train.config import TrainConfig, refuse_missing_paths


def help_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    return TrainConfig.help_parser(argv)


def train(context: typer.Context) -> Result:
    refuse_missing_paths(context.args)
    config = TrainConfig.resolve(context.args)
    say(f"training {config.speculator_type} for {config.verifier.verifier_name_or_path}")

    from speculators.train.logger import TrainingProgress
    from speculators.train.recipe import begun_threads
    from speculators.train.run import train as run_training

    with choosing_threads(begun_threads(config)), TrainingProgress() as progress:
        result = run_training(config, on_event=progress)
    check, parity = result.check, result.parity
    record = {
        "verb": "train",
        "speculator_type": config.speculator_type,
        "checkpoint": str(result.checkpoint),
        "num_steps": result.num_steps,
        "acceptance_length": result.acceptance_length,
        "metrics": result.metrics,
        "check": None if check is None else check.as_dict(),
        "parity": None if parity is None else {"passed": parity.passed, "checks": parity.facts()},
    }
    verifier, checkpoint = config.verifier.verifier_name_or_path, str(result.checkpoint)
    evaluation = ["speculators", "evaluate", "--verifier", verifier, "--method", checkpoint, "--data", "HELD_OUT.jsonl"]
    return Result(record, [result], result.sentence(), evaluation, error_of(result.raise_for_errors))
