"""`speculators quickstart`: the whole path on the embedded verifier, as the commands a user would type one by one.

Each step is a command line of this program, shown and then run in this process.
"""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.cli.app import Interrupted, perform
from speculators.cli.shared import Result, out, say, show
from speculators.utils.report import facts_table

NUM_SPECULATIVE_TOKENS = 4
DEMO_PROMPT = "Describe `os.path.join(path, *paths)`."
"""The embedded verifier's answer to it ends; to many others it goes round in circles."""
MARKER = "made-by-quickstart"
UNFINISHED = "unfinished"
"""What the marker says until the last step is done."""
WRITTEN = re.compile(rf"{MARKER}|responses\.[a-z.]+|data|run|report\.json(\.lock)?")
"""Only a directory with the marker, and with nothing but these in it, is ever replaced."""

REGENERATION = ("--limit", "600", "--max-tokens", "128", "--batch-size", "64")
RECIPE = ("--draft-vocab-size", "2048", "--total-seq-len", "512", "--lr", "3e-3", "--epochs", "4")
EVALUATION = ("--limit", "20", "--max-tokens", "128")
"""Sized for about five minutes on two cores. A narrow drafter takes a larger learning rate than the default, and short
packed rows give it more steps for the same tokens."""


def quickstart(
    output: Annotated[Path, typer.Option(help="Where everything is written; replaced when it exists.")] = Path(
        "quickstart-output"
    ),
) -> Result:
    """Regenerate, prepare, train EAGLE-3, generate, evaluate: on a small verifier that comes with the package."""
    if start_output(output):
        say(f"going on with the unfinished quickstart in {output}; delete that directory to begin anew")
    begun_s = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    sentence = ""
    for title, command in steps(output, results):
        record, sentence = run_step(len(results) + 1, title, command, str(output))
        results[command[0]] = record
    (output / MARKER).write_text("")
    checkpoint = results["train"]["checkpoint"]
    from speculators.deploy.check import check_checkpoint  # loads torch: only the verb itself

    serve = check_checkpoint(checkpoint).served_by
    times = ", ".join(f"{verb} {result['time_s']:.0f} s" for verb, result in results.items())
    parity = results["train"]["parity"]
    gate = "passed" if parity is None or parity["passed"] else "FAILED"  # None: a finished run, whose gate had passed
    done = facts_table("Done", {"speculator": checkpoint, "parity gate": gate, "serve it": serve, "time": times})
    record = {
        "verb": "quickstart",
        "checkpoint": checkpoint,
        "serve": serve,
        "time_s": time.perf_counter() - begun_s,
        "step_s": {verb: result["time_s"] for verb, result in results.items()},
        "parity": parity,
        "evaluation": results["evaluate"],
    }
    return Result(record, [done], sentence, ["speculators", "serve", checkpoint])


def steps(output: Path, results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Title and command of each step; a later one may use what an earlier one returned."""
    from speculators import assets

    verifier = str(assets.tiny_verifier_path())
    responses, data, run_dir = output / "responses.jsonl", output / "data", output / "run"
    yield (
        "The verifier answers the training prompts: a drafter learns the text it will see",
        [
            "regenerate-responses",
            "--verifier",
            verifier,
            "--data",
            str(assets.prompts_path("train")),
            "--output",
            str(responses),
            *REGENERATION,
            *(["--resume"] if responses.exists() else []),
        ],
    )
    yield (
        "Tokenise, and mark which tokens the verifier wrote",
        ["prepare-data", "--verifier", verifier, "--data", str(responses), "--output", str(data)],
    )
    yield (
        "Train an EAGLE-3 drafter; the verifier's hidden states are computed as it goes",
        ["train", "--verifier", verifier, "--data", str(data), "--output", str(run_dir), *RECIPE],
    )
    drafter = ["--method", results["train"]["checkpoint"], "--num-speculative-tokens", str(NUM_SPECULATIVE_TOKENS)]
    yield (
        "Decode one prompt with draft-and-verify",
        ["generate", "--verifier", verifier, "--prompt", DEMO_PROMPT, *drafter],
    )
    yield (
        "Compare with plain decoding on held-out prompts",
        [
            "evaluate",
            "--verifier",
            verifier,
            "--data",
            str(assets.prompts_path("heldout")),
            "--method",
            "none",
            *drafter,
            *EVALUATION,
            "--output",
            str(output / "report.json"),
        ],
    )


def start_output(output: Path) -> bool:
    """Makes an empty directory. A finished quickstart's is replaced, an unfinished one's is continued (returns True),
    anyone else's is left alone."""
    if output.exists():
        others = sorted(path.name for path in output.iterdir() if not WRITTEN.fullmatch(path.name))
        if not (output / MARKER).is_file() or others:
            found = f"holds {others[:5]}" if others else "exists"
            raise ValueError(
                f"{output} {found} and is not an earlier quickstart's; name another directory with --output"
            )
        if (output / MARKER).read_text() == UNFINISHED:
            return True
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER).write_text(UNFINISHED)
    return False


# -- a verb made of other verbs: each step is a command line of this program, shown and then run in this process


def run_step(number: int, title: str, command: Sequence[str], kept: str) -> tuple[dict[str, Any], str]:
    """Shows and runs a step. Returns its record, with the seconds it took as `time_s`, and its sentence.

    `kept`: where the work of a stopped run stays, which Ctrl-C says. Errors of the step travel to the caller.
    """
    out().rule(f"[bold]{number} {title}", align="left")
    out().print(f"$ speculators {shlex.join(command)}", style="cyan", markup=False, soft_wrap=True)
    begun_s = time.perf_counter()
    try:
        result = perform(command)
    except (KeyboardInterrupt, Interrupted) as stop:
        raise KeyboardInterrupt(
            f"stopped in step {number}: what was done is kept in {kept}; the same command goes on from there"
        ) from stop
    show(result, is_last=False)
    if isinstance(result.error, KeyboardInterrupt):
        raise KeyboardInterrupt(f"{result.error}, and goes on from step {number}") from result.error
    if result.error is not None:
        raise result.error
    return {**result.record, "time_s": time.perf_counter() - begun_s}, result.sentence
