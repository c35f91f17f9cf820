"""Builds the embedded verifier: `corpus`, `tokenizer`, `train`, `export`, `report`, or `all` of them in this order.

The first three steps work in a folder of their own and can be repeated alone; `export` writes the package data,
`report` measures what stands there and rewrites its card.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).parent))
from tiny_verifier import corpus, report, tokenizer, train
from tiny_verifier.stdlib import python_version

ASSETS = Path(__file__).parent.parent / "src" / "speculators" / "assets"
MAX_WEIGHT_BYTES = 16_000_000
"""The model travels with the package; beyond this it would outweigh everything else in it."""
STEPS = ("corpus", "tokenizer", "train", "export", "report")
SHAPE = train.ModelShape()
console = Console()


def make_corpus(work: Path) -> None:
    counts = corpus.build(work, corpus.CorpusConfig())
    write_json(work / "corpus.json", {"python_version": python_version(), **counts})
    console.print(counts)


def make_tokenizer(work: Path) -> None:
    documents = corpus.read_lines(work / "train.jsonl")
    made = tokenizer.train_tokenizer(tokenizer.tokenizer_texts(documents), SHAPE.vocab_size, SHAPE.max_positions)
    made.save_pretrained(work / "tokenizer")
    console.print(f"tokenizer: {len(made)} tokens")


def train_model(work: Path, config: train.TrainConfig) -> None:
    words = tokenizer.load(Path(config.init) if config.init else work / "tokenizer")
    documents = corpus.read_lines(work / "train.jsonl")
    train_NT = train.pack(words, documents, config.row_length)
    prompts = tokenizer.first_prompts(words, documents)
    heldout_NT = train.pack(words, corpus.read_lines(work / "heldout.jsonl"), config.row_length)
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training")

        def show(step: int, num_steps: int, line: str) -> None:
            progress.update(task, completed=step, total=num_steps, description=line)
            if step % 20 == 0 or line.startswith("held-out"):
                progress.console.print(f"{step}/{num_steps}  {line}", highlight=False)

        made, figures = train.train(
            train_NT, heldout_NT, prompts, words, SHAPE, config, show, checkpoint=work / "checkpoint"
        )
    target = work / "model"
    made.to(torch.bfloat16).save_pretrained(target)
    words.save_pretrained(target)
    phase = {
        "command": shlex.join(["python", *sys.argv]),
        "config": asdict(config),
        "corpus": read_json(work / "corpus.json"),
        "corpus_tokens": int((train_NT != words.pad_token_id).sum()),
        "hardware": hardware(config),
        **figures,
    }
    before = read_json(Path(config.init) / "build.json")["phases"] if config.init else []
    write_json(target / "build.json", {"shape": asdict(SHAPE), "phases": [*before, phase]})
    console.print(figures)


def hardware(config: train.TrainConfig) -> str:
    if train.pick_device(config.device) == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU core(s), {platform.machine()}"


def export(work: Path) -> None:
    weights = work / "model" / "model.safetensors"
    if weights.stat().st_size > MAX_WEIGHT_BYTES:
        raise ValueError(f"{weights} has {weights.stat().st_size} bytes; package data allows {MAX_WEIGHT_BYTES}")
    for source, target in ((work / "model", ASSETS / "tiny_verifier"), (work / "prompts", ASSETS / "prompts")):
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.iterdir()):
            shutil.copyfile(path, target / path.name)
    console.print(f"exported to {ASSETS}")


def write_report(config: report.ReportConfig) -> None:
    folder = ASSETS / "tiny_verifier"
    result = report.measure(folder, ASSETS / "prompts", config)
    report.write_card(folder, result, read_json(folder / "build.json"))
    console.print(report.greedy_table(result["greedy"]), highlight=False)
    print(json.dumps({key: result[key] for key in ("loss", "greedy")}))


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--work", type=Path, default=Path(".build/tiny_verifier"), help="folder of intermediate files")
    group = parser.add_argument_group("training")
    for field in fields(train.TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            group.add_argument(flag, action="store_true")
        else:
            group.add_argument(flag, type=type(field.default), default=field.default, help=f"default {field.default}")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    config = train.TrainConfig(**{field.name: getattr(options, field.name) for field in fields(train.TrainConfig)})
    run = {
        "corpus": lambda: make_corpus(options.work),
        "tokenizer": lambda: make_tokenizer(options.work),
        "train": lambda: train_model(options.work, config),
        "export": lambda: export(options.work),
        "report": lambda: write_report(report.ReportConfig()),
    }
    for step in STEPS if options.step == "all" else (options.step,):
        run[step]()


if __name__ == "__main__":
    main()
