"""Runs the commands of the documents on the embedded verifier: `python scripts/run_docs.py [docs/train.md ...]`.

Commands run as they are written, in a directory of their own, except for what STANDS_FOR and SMALLER say: a verifier
that is there, and sizes for a few seconds. What needs a server, the hub or many minutes is listed with its reason.
Ends with exit code 1 if a command failed.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speculators import assets

ROOT = Path(__file__).parents[1]
TINY = str(assets.tiny_verifier_path())
PROGRAM = re.compile(r"(\$ )?((\.venv/bin/)?(speculators|python[0-9.]*|pip|make|torchrun|pytest)( |$)|[A-Z_]+=\S+ )")
"""How the line of a command begins."""
TRAINING_OF_RANKS = ("speculators.train", "scripts/train.py")
FIRST = ("docs/prepare-data.md", "docs/quickstart.md", "docs/train.md")
"""Pages whose commands make what other pages use: answers, rows, a drafter."""

STANDS_FOR = {
    r" \[--[^\]]*\]": "",
    r"(?<!/)\bsrc/speculators/assets\b": str(Path(TINY).parent),
    r"\bORG/MODEL\b|(?<![A-Z_/])(MODEL|VERIFIER)\b": TINY,
    r"\bORG/HEAD\b": "head",
    r"--nproc-per-node 8": "--nproc-per-node 2",
    r"\bscripts/train.py": str(ROOT / "scripts" / "train.py"),
    r"\bCHECKPOINT\b": "run/checkpoint_best",
    r"\bquickstart-output/eagle3\b": "run",
}
SMALLER = {
    "regenerate-responses": ["--limit", "40", "--max-tokens", "32"],
    "train": ["--max-steps", "4", "--total-seq-len", "256", "--epochs", "1"],
    "evaluate": ["--limit", "2", "--max-tokens", "16"],
    "build": ["--budget", "20s", "--max-tokens", "16"],
    "generate": ["--max-tokens", "16"],
}
"""Added to a command; where it says one of these itself, its own word is left out."""
FINDING = ("diagnose",)
"""Their exit code is 1 when something is wrong with the drafter: one of four steps is weak."""
DRY = ("serve", "launch-vllm")
"""Their command is printed, not run."""
SKIPPED = {
    r"https?://": "needs a server",
    r"serve-local|playground": "serves until it is stopped: tests/local_server",
    r"\.gguf\b": "needs a quantised verifier",
    r"\bbroken\b": "shows an error",
    r"^make |benchmarks/|-m pytest|^pytest|quickstart$|architectures.py": "takes minutes: see Makefile and CI",
    r"\bpip\b|-m venv|--install-completion": "installs",
    r"--nnodes": "needs several machines",
    r"\b300\.json": "needs several trainings",
    r"--plugins": "runs in tests/conformance/test_ninth_algorithm.py",
    r"\bSMALL_MODEL\b": "needs a second model",
    r"--verifier smollm2\b": "needs a real model",
}


@dataclass(frozen=True)
class Command:
    """One command of a document, on one line."""

    page: str
    text: str

    @property
    def verb(self) -> str | None:
        """The verb of a `speculators` command; `train` of a run on several ranks."""
        words = self.words
        if words[0] == "torchrun":
            return "train"
        return words[1] if len(words) > 1 and Path(words[0]).name == "speculators" else None

    @property
    def flags(self) -> list[str]:
        """What stands behind the verb."""
        words = self.words
        if words[0] == "torchrun":
            return words[next(i for i, word in enumerate(words) if word in TRAINING_OF_RANKS) + 1 :]
        return words[2:]

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def commands_of(page: Path) -> Iterator[Command]:
    """The commands in a document's blocks: fenced, or indented by four."""
    fenced, lines = False, iter(page.read_text().splitlines())
    for line in lines:
        fenced ^= line.lstrip().startswith("```")
        if not (fenced or line.startswith("    ")) or not PROGRAM.match(line.strip()):
            continue
        text = line.strip().removeprefix("$ ")
        while text.endswith("\\"):
            text = text[:-1] + next(lines).strip()
        yield Command(str(page.relative_to(ROOT)), text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def as_it_runs(command: Command) -> list[str]:
    """The words that are run in its place."""
    text = command.text
    for said, runs in STANDS_FOR.items():
        text = re.sub(said, lambda _, runs=runs: runs, text)  # type: ignore[misc]
    words = shlex.split(text, comments=True)
    if command.verb in SMALLER:
        added = SMALLER[command.verb]
        for flag in added[::2]:
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        words += added
    if command.verb in DRY and "--dry-run" not in words:
        words.insert(words.index("--") if "--" in words else len(words), "--dry-run")
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    return [sys.executable, "-m", "speculators", *words[1:]] if command.verb else [sys.executable, *words[1:]]


def why_skipped(command: Command) -> str | None:
    return next((reason for pattern, reason in SKIPPED.items() if re.search(pattern, command.text)), None)


def is_well(command: Command, done: subprocess.CompletedProcess[str]) -> bool:
    has_result = f'"verb": "{command.verb}"' in done.stdout
    return done.returncode == 0 or (command.verb in FINDING and done.returncode == 1 and has_result)


def prepare(folder: Path) -> None:
    """Writes the files that documents speak of."""
    rows = assets.prompts_path("train").read_text().splitlines()
    for name in ("chats", "prompts", "conversations"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows[:60]) + "\n")
    held_out = assets.prompts_path("heldout").read_text()
    (folder / "heldout.jsonl").write_text(held_out)
    turns = [turn for line in held_out.splitlines() for turn in json.loads(line)["conversations"]]
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    benchmarks = {
        "spec_bench": [{"question_id": i, "category": "qa", "turns": [text]} for i, text in enumerate(asked)],
        "humaneval": [{"task_id": f"HumanEval/{i}", "prompt": text} for i, text in enumerate(asked)],
        "gsm8k": [{"question": text, "answer": "1"} for text in asked],
    }
    for name, questions in benchmarks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def clear_way(folder: Path, words: list[str]) -> None:
    """Removes what an earlier page's command wrote under the same name, unless the command goes on with it."""
    if "--output" not in words or {"--resume", "--dry-run"} & {*words}:
        return
    written = folder / words[words.index("--output") + 1]
    for path in (written, *folder.glob(f"{written.stem}.*json*")):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".jsonl" or path == written:
            path.unlink(missing_ok=True)


def supply(folder: Path) -> None:
    """Makes what documents take as given, of what their commands made: a head of another project, two results."""
    if (folder / "run").exists() and not (folder / "head").exists():
        export = [sys.executable, "-m", "speculators", "export", "run/checkpoint_best", "--engine", "eagle3"]
        subprocess.run([*export, "--output", "head"], cwd=folder, capture_output=True, check=True)
    if (folder / "result.json").exists():
        for name in ("before", "after"):
            shutil.copy(folder / "result.json", folder / f"{name}.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", help="documents; default: README.md and docs/*.md")
    chosen = [(ROOT / page).resolve() for page in parser.parse_args().pages]
    failed = ran = 0
    skipped: dict[str, int] = {}
    order = sorted(pages(), key=lambda page: (str(page.relative_to(ROOT)) not in FIRST, page))
    first = [page for page in order if str(page.relative_to(ROOT)) in FIRST]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for page in [*first, *(page for page in order if page not in first)]:
            if chosen and page not in chosen and page not in first:
                continue
            for command in commands_of(page):
                if (reason := why_skipped(command)) is not None:
                    skipped[reason] = skipped.get(reason, 0) + 1
                    continue
                words = as_it_runs(command)
                clear_way(folder, words)
                begun_s = time.perf_counter()
                done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
                ran += 1
                well = is_well(command, done)
                failed += not well
                verdict = "ok    " if well else "FAILED"
                print(f"{verdict} {time.perf_counter() - begun_s:5.1f} s  {command.page}: {command.text}", flush=True)
                if not well:
                    print(f"       {shlex.join(words)}\n{done.stderr[-800:]}", flush=True)
                supply(folder)
    print(f"{ran} commands run, {failed} failed; skipped: {', '.join(f'{n} ({why})' for why, n in skipped.items())}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
