"""Every drafter on the embedded verifier: the same prompts, the same answers to learn from, one table.

    python benchmarks/results.py --output results-output [--document docs/results.md]

    1 answers      the verifier answers the training prompts, once for all        regenerate-responses
    2 data         tokenised rows with loss masks                                 prepare-data
    3 trained/NAME every drafter of this library, one after the other             train
    4 report.json  held-out prompts decoded with all of them, interleaved         evaluate

Every step is a verb of `speculators`, shown as it is run. A step that was finished with the same command on the same
inputs is kept; one that was interrupted goes on where it stopped. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results_table import Trained, machine_line, results_table, write_between_markers

from speculators import SpeculatorModel, evaluate, evaluation
from speculators.assets import prompts_path, tiny_verifier_path
from speculators.cli.app import Interrupted, quieten_libraries
from speculators.cli.app import run as run_verb
from speculators.decoding.method import PLAIN
from speculators.train.config import TrainConfig
from speculators.utils.files import atomic_write

STAMP = "made-by.json"
VERIFIER = str(tiny_verifier_path())

RECIPE = ("--total-seq-len", "512", "--lr", "3e-3", "--checkpoint-freq", "1000")
"""What all drafters share beside the data and the number of epochs. They are narrow, which suits a larger learning rate
than the default; short packed rows give more steps for the same tokens. Saved at the end only."""

HALF_VOCABULARY = ("--draft-vocab-size", "2048")
OWN: dict[str, tuple[str, ...]] = {
    "eagle3": HALF_VOCABULARY,
    "peagle": (*HALF_VOCABULARY, "--num-depths", "4"),
    "dflash": (*HALF_VOCABULARY, "--num-layers", "2", "--block-size", "5", "--max-anchors", "256"),
    "dspark": (*HALF_VOCABULARY, "--num-layers", "2", "--block-size", "4", "--max-anchors", "256"),
}
"""Where a drafter's defaults, made for verifiers of billions of parameters, do not suit one of 12 narrow layers: blocks
of 4 drafts (scoring 16 takes far longer than scoring 5 here) and 2 layers. A drafter that is not named is trained with
its defaults."""

UNTRAINED = ("ngram", "suffix", '{"method": "early_exit", "early_exit_layer": 3, "num_speculative_tokens": 3}')


@dataclass(frozen=True)
class Step:
    """A verb whose product is kept. `inputs` is what the product depends on beside the command."""

    verb: str
    arguments: tuple[str, ...]
    directory: Path
    inputs: str = ""

    @property
    def command(self) -> tuple[str, ...]:
        return (self.verb, *self.arguments)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join([*self.command, self.inputs]).encode()).hexdigest()

    def run(self, resume: Sequence[str] = ()) -> dict[str, Any]:
        """What the verb returned, now or when it was run. `resume`: flags that make the verb go on where it stopped."""
        stamp_path = self.directory / STAMP
        stamp = json.loads(stamp_path.read_text()) if stamp_path.is_file() else None
        if stamp is not None and stamp["fingerprint"] != self.fingerprint:
            print(f"{self.directory}: was made otherwise, is made again", file=sys.stderr)
            stamp = None
        if stamp is not None and stamp["result"] is not None:
            print(f"{self.directory}: kept", file=sys.stderr)
            return stamp
        if stamp is None:
            self.start_over()
        num_starts = 1 if stamp is None else stamp["num_starts"] + 1
        stamp = {
            "command": shlex.join(self.command),
            "fingerprint": self.fingerprint,
            "num_starts": num_starts,
            "time_s": None,
            "result": None,
        }
        write_json(stamp_path, stamp)
        print(f"$ speculators {shlex.join(self.command)}", file=sys.stderr)
        begun_s = time.perf_counter()
        result = run_verb([*self.command, *(resume if num_starts > 1 else ())])
        stamp |= {"time_s": time.perf_counter() - begun_s, "result": result}
        write_json(stamp_path, stamp)
        return stamp

    def start_over(self) -> None:
        """An empty directory. One that holds no stamp is not ours to empty."""
        if self.directory.exists() and any(self.directory.iterdir()):
            if not (self.directory / STAMP).is_file():
                raise ValueError(f"{self.directory} exists and was not made by this script; choose another --output")
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)


def make_data(output: Path, num_responses: int) -> Step:
    """The prepared rows; `inputs` of what is trained on them."""
    answers = output / "answers" / "answers.jsonl"
    ask = Step(
        "regenerate-responses",
        (
            "--verifier",
            VERIFIER,
            "--data",
            str(prompts_path("train")),
            "--output",
            str(answers),
            "--limit",
            str(num_responses),
            "--max-tokens",
            "128",
            "--batch-size",
            "64",
        ),
        answers.parent,
        inputs=digest(Path(VERIFIER) / "model.safetensors"),
    )
    ask.run(resume=["--resume"])
    prepare = Step(
        "prepare-data",
        ("--verifier", VERIFIER, "--data", str(answers), "--output", str(output / "data" / "rows")),
        output / "data",
        inputs=digest(answers),
    )
    prepare.run(resume=["--overwrite"])
    return prepare


def train(name: str, output: Path, data: Step, epochs: int) -> Trained:
    arguments = (
        "--speculator-type",
        name,
        "--verifier",
        VERIFIER,
        "--data",
        str(output / "data" / "rows"),
        "--output",
        str(output / "trained" / name / "run"),
        "--epochs",
        str(epochs),
        *RECIPE,
        *OWN.get(name, ()),
    )
    resolved = TrainConfig.resolve(arguments).dump_yaml()  # a default that changed makes it another run
    step = Step("train", arguments, output / "trained" / name, inputs=data.fingerprint + resolved)
    stamp = step.run()
    return Trained(
        checkpoint=stamp["result"]["checkpoint"],
        num_parameters=num_parameters(stamp["result"]["checkpoint"]),
        time_s=stamp["time_s"],
        is_resumed=stamp["num_starts"] > 1,
        own_flags=shlex.join(OWN.get(name, ())),
    )


def num_parameters(checkpoint: str) -> int:
    """Trained ones: copies of the verifier's embedding, norm and head are the verifier's."""
    model = SpeculatorModel.from_pretrained(checkpoint)
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def train_all(names: Sequence[str], output: Path, data: Step, epochs: int) -> tuple[dict[str, Trained], dict[str, str]]:
    """(name -> trained, name -> why not). One drafter that fails does not cost the others their figures."""
    trained: dict[str, Trained] = {}
    failed: dict[str, str] = {}
    for number, name in enumerate(names, start=1):
        print(f"\n== {number}/{len(names)} {name}", file=sys.stderr)
        try:
            trained[name] = train(name, output, data, epochs)
        except Interrupted as stop:
            raise SystemExit(str(stop) or "interrupted: the same command goes on from here") from stop
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name} could not be trained: {failed[name]}", file=sys.stderr)
    return trained, failed


def measure(trained: dict[str, Trained], options: argparse.Namespace) -> evaluation.EvaluationReport:
    methods = [PLAIN, *UNTRAINED, *(drafter.checkpoint for drafter in trained.values())]

    def show(what: str, done: int, total: int | None) -> None:
        print(f"\rdecoding {len(methods)} methods: {done}/{total} prompts", end="", file=sys.stderr)

    report = evaluate(
        VERIFIER,
        prompts_path("heldout"),
        methods=methods,
        num_prompts=options.num_prompts,
        max_tokens=options.max_tokens,
        num_repeats=options.num_repeats,
        progress=show,
    )
    print(file=sys.stderr)
    return report


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, document: Any) -> None:
    with atomic_write(path) as file:
        json.dump(document, file, indent=2, default=str)
        file.write("\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results-output"), help="where everything is kept")
    parser.add_argument("--document", type=Path, help="Markdown file whose table is replaced, e.g. docs/results.md")
    parser.add_argument("--drafters", help="names with commas; default: every drafter of this library")
    parser.add_argument("--num-responses", type=int, default=3000, help="answers to learn from")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--num-prompts", type=int, default=50, help="held-out prompts to decode")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--num-repeats", type=int, default=2, help="timings of each prompt, of which the fastest counts"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the measurement; one suits narrow models")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    quieten_libraries()
    options.output.mkdir(parents=True, exist_ok=True)
    names = options.drafters.split(",") if options.drafters else SpeculatorModel.available_names()
    begun_s = time.perf_counter()
    data = make_data(options.output.resolve(), options.num_responses)
    trained, failed = train_all(names, options.output.resolve(), data, options.epochs)
    torch.set_num_threads(options.threads)
    report = measure(trained, options)
    table = results_table(report, trained)
    print(table)
    print(machine_line(report))
    document = {
        "benchmark": "results",
        "failed": failed,
        "time_s": time.perf_counter() - begun_s,
        "trained": {name: vars(drafter) for name, drafter in trained.items()},
        **report.to_dict(),
    }
    write_json(options.output / "report.json", document)
    if options.document is not None and not failed:
        write_between_markers(options.document, f"{table}\n\n{machine_line(report)}")
    print(json.dumps(document, default=str))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
