"""Draws faults for drafters that no limit of `diagnose` was set on: docs/diagnose.md's second table.

    python benchmarks/diagnose_drawn.py --seed 1 [--output reports.jsonl]

Trains what it examines: drafters of several algorithms, for the embedded verifier and for one that lacks some of its
layers, on text that the tests of `diagnose` do not use. Which fault a drafter gets, and how far it goes, is drawn by
the seed: a rule that was changed after one seed is judged by another.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from diagnose_real import (
    CONFIG,
    NOTHING,
    WEIGHTS,
    Bench,
    Weights,
    holes,
    inverted,
    nested,
    noisy,
    rounded,
    row_of,
    shuffle_map,
)
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import speculators as sp
from speculators import assets

EMBEDDED = assets.tiny_verifier_path()
SMALL = {"num_prompts": 5, "max_tokens": 24, "num_rows": 6}
OWNERS = (
    "pathlib.Path",
    "argparse.ArgumentParser",
    "queue.Queue",
    "zipfile.ZipFile",
    "ssl.SSLContext",
    "asyncio.Future",
)
METHODS = (
    "open",
    "get",
    "put",
    "items",
    "is_alive",
    "read",
    "reset",
    "update",
    "pop",
    "add_field",
    "load",
    "check_all",
)
NUM_TRAINED, NUM_HELD_OUT, NUM_FEW = 60, 12, 4
TRAINING: dict[str, Any] = {
    "total_seq_len": 384,
    "lr": 3e-3,
    "parity_gate": False,
    "contract_check": False,
    "checkpoint_freq": 100.0,
}


def built_in(beginning: str, split: str = "train") -> list[dict[str, Any]]:
    """Returns the built-in conversations that begin so, with the answers of programmers."""
    rows = [json.loads(line) for line in Path(assets.prompts_path(split)).read_text().splitlines()]
    return [row for row in rows if row["conversations"][0]["content"].startswith(beginning)]


def without_layers(folder: Path, rng: Random, num: int) -> Path:
    """Writes the embedded verifier without some of its inner layers, as another architecture: another model, with
    other text."""
    config = json.loads((EMBEDDED / CONFIG).read_text())
    gone = rng.sample(range(2, config["num_hidden_layers"] - 2), num)
    kept = [i for i in range(config["num_hidden_layers"]) if i not in gone]
    weights = {}
    for name, weight in load_file(EMBEDDED / WEIGHTS).items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) in gone:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        weights[".".join(parts)] = weight
    shutil.copytree(EMBEDDED, folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    changed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    (folder / CONFIG).write_text(json.dumps({**config, **changed, "num_hidden_layers": len(kept)}))
    return folder


@dataclass
class Subject:
    """One drafter with its verifier and text, trained when it is first asked for."""

    folder: Path
    verifier: Path
    algorithm: str
    question: str
    """With {} for a name."""
    seed: int
    settings: dict[str, Any]

    @cached_property
    def loaded(self) -> PreTrainedModel:
        return sp.load_verifier(str(self.verifier), dtype=torch.float32)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        names = [f"{owner}.{method}" for owner in OWNERS for method in METHODS]
        Random(self.seed).shuffle(names)
        return [{"messages": [{"role": "user", "content": self.question.format(name)}]} for name in names]

    @cached_property
    def prompts(self) -> Path:
        path = self.folder / "held-out.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows[-NUM_HELD_OUT:]))
        return path

    @cached_property
    def data(self) -> Path:
        self.folder.mkdir(parents=True)
        answers = self.folder / "answers.jsonl"
        sp.regenerate(self.loaded, self.rows[:-NUM_HELD_OUT], output=answers, max_tokens=48, batch_size=32)
        return self.prepared(answers, "data")

    def prepared(self, rows: Path, name: str, **settings: Any) -> Path:
        return sp.prepare_data(str(self.verifier), rows, output=self.folder / name, num_workers=1, **settings).path

    def train(self, data: Path, name: str, **settings: Any) -> Path:
        given = {**TRAINING, "epochs": 8, "seed": self.seed, **self.settings, **settings}
        output = self.folder / name
        return sp.train_drafter(self.algorithm, verifier=self.loaded, data=data, output=output, **given).checkpoint

    @cached_property
    def healthy(self) -> Path:
        return self.train(self.data, "run")

    def bench(self, work: Path) -> Bench:
        work.mkdir(exist_ok=True)
        given = argparse.Namespace(
            checkpoint=str(self.healthy), verifier=str(self.verifier), data=str(self.data), prompts=str(self.prompts)
        )
        return Bench(given, work, self.loaded)


# -- faults whose size is drawn

Drawn = Callable[[Subject, Bench, Random], dict[str, Any]]


def edited(change: Callable[[dict[str, Any], Random], object]) -> Drawn:
    return lambda subject, bench, rng: {"checkpoint": bench.copy(config=lambda values: change(values, rng))}


def damaged(change: Callable[[Weights, Random], object]) -> Drawn:
    return lambda subject, bench, rng: {"checkpoint": bench.copy(tensors=lambda weights: change(weights, rng))}


def spoiled(change: Callable[[Random], Callable[[torch.Tensor], torch.Tensor]]) -> Drawn:
    return lambda subject, bench, rng: {"verifier": bench.verifier(change(rng)), "checkpoint": bench.copy()}


def masked(change: Callable[[list[int]], list[int]]) -> Drawn:
    return lambda subject, bench, rng: {"data": bench.masks(change)}


LAYERS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")


def layer_ids(values: dict[str, Any]) -> list[int]:
    return next(values[key] for key in LAYERS if key in values)


def move_a_layer(values: dict[str, Any], rng: Random) -> None:
    ids = layer_ids(values)
    ids[rng.randrange(len(ids))] += rng.choice((-1, 1))


def other_layers(values: dict[str, Any], rng: Random) -> None:
    ids = layer_ids(values)
    ids[:] = sorted(rng.sample([i for i in range(max(ids) + 2) if i not in ids[:-1]], len(ids)))


def other_theta(values: dict[str, Any], rng: Random) -> None:
    values["transformer_layer_config"]["rope_parameters"]["rope_theta"] *= 10 ** -rng.uniform(2, 4)


def narrow_window(values: dict[str, Any], rng: Random) -> None:
    layers = values["transformer_layer_config"]["num_hidden_layers"]
    change = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * layers}
    nested(sliding_window=rng.randint(4, 10), **change)(values)


def turn_a_switch(values: dict[str, Any], rng: Random) -> None:
    values["norm_before_residual"] = not values["norm_before_residual"]


def permute_fc(weights: Weights, rng: Random) -> None:
    """The chunks of the layers' states change places."""
    num = weights["fc.weight"].shape[1] // len(weights["fc.weight"])
    order = list(range(num))
    while order == sorted(order):
        rng.shuffle(order)
    for name in ("fc.weight", "input_norm.weight"):
        if name in weights and weights[name].shape[-1] == weights["fc.weight"].shape[1]:
            chunks = weights[name].chunk(num, -1)
            weights[name] = torch.cat([chunks[i] for i in order], -1)


def norms_of(weights: Weights) -> list[str]:
    return sorted(name for name, weight in weights.items() if weight.ndim == 1 and name.endswith("norm.weight"))


def norm_less_one(weights: Weights, rng: Random) -> None:
    weights[rng.choice(norms_of(weights))].sub_(1)


def roll_map(weights: Weights, rng: Random) -> None:
    weights["d2t"] = weights["d2t"].roll(rng.randint(1, 20))


def roll_head(weights: Weights, rng: Random) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(rng.choice((-1, 1)), 0)


def permute_embedding(weights: Weights, rng: Random) -> None:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    order = torch.randperm(len(weights["embed_tokens.weight"]), generator=generator)
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][order]


def redraw_a_matrix(weights: Weights, rng: Random) -> None:
    """One matrix of the drafter is as before training."""
    names = [n for n, w in weights.items() if w.ndim == 2 and not any(part in n for part in ("embed", "head"))]
    name = rng.choice(sorted(names))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    weights[name] = torch.randn(weights[name].shape, generator=generator) * weights[name].float().std()


def not_a_number(weights: Weights, rng: Random) -> None:
    weights[rng.choice(norms_of(weights))][0] = float("nan")


def late(by: int) -> Callable[[list[int]], list[int]]:
    return lambda mask: [0] * by + mask[:-by] if by > 0 else mask[-by:] + [0] * -by


def other_prompts(subject: Subject, bench: Bench, rng: Random) -> dict[str, Any]:
    path = bench.work / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in built_in("Explain the", "heldout")))
    return {"prompts": path}


def behind_the_rows(subject: Subject, bench: Bench, rng: Random) -> dict[str, Any]:
    """Each prompt stands behind earlier turns, longer together than any training row."""
    texts = [json.loads(line)["text"] for line in (subject.folder / "answers.jsonl").read_text().splitlines()]
    asked = [row["messages"] for row in subject.rows[:NUM_TRAINED]]
    told = [[*turns, {"role": "assistant", "content": text}] for turns, text in zip(asked, texts, strict=True)]
    path = bench.work / "long.jsonl"
    with path.open("w") as file:
        for row in subject.rows[-NUM_HELD_OUT:]:
            earlier = [turn for turns in rng.sample(told, 6) for turn in turns]
            file.write(json.dumps({"messages": [*earlier, *row["messages"]]}) + "\n")
    return {"prompts": path}


def few_rows(subject: Subject, bench: Bench, rng: Random) -> dict[str, Any]:
    data = subject.prepared(subject.folder / "answers.jsonl", "few", max_samples=NUM_FEW)
    return {"checkpoint": subject.train(data, "few-run", epochs=24), "data": data}


def too_long(subject: Subject, bench: Bench, rng: Random) -> dict[str, Any]:
    """Some rows, many epochs, a large rate; the last checkpoint is examined."""
    data = subject.prepared(subject.folder / "answers.jsonl", "some", max_samples=24)
    return {"checkpoint": subject.train(data, "long-run", epochs=24, lr=1e-2, scheduler_type="none"), "data": data}


def too_short(subject: Subject, bench: Bench, rng: Random) -> dict[str, Any]:
    return {"checkpoint": subject.train(subject.data, "short-run", epochs=1, lr=2e-4)}


def given_answers(subject: Subject, bench: Bench, rng: Random) -> dict[str, Any]:
    """The answers that the built-in conversations came with, written by programmers."""
    chosen = built_in("What is")
    rng.shuffle(chosen)
    file = subject.folder / "given.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen[:NUM_TRAINED]))
    data = subject.prepared(file, "given")
    return {"checkpoint": subject.train(data, "given-run", epochs=4), "data": data}


ANY: dict[str, tuple[tuple[str, ...], Drawn]] = {
    "healthy, no record": ((NOTHING,), lambda subject, bench, rng: {"checkpoint": bench.copy()}),
    "one layer beside": (("aux-layers",), edited(move_a_layer)),
    "other layers": (("aux-layers", "changed-since-training"), edited(other_layers)),
    "rope theta": (("rope",), edited(other_theta)),
    "a narrow window": (("context",), edited(narrow_window)),
    "a norm less one": (("norms",), damaged(norm_less_one)),
    "a matrix redrawn": (("changed-since-training",), damaged(redraw_a_matrix)),
    "a norm is not a number": (("inactive",), damaged(not_a_number)),
    "verifier with noise": (("verifier",), spoiled(lambda rng: noisy(rng.uniform(0.15, 0.35)))),
    "verifier rounded to 4 bits": (("quantised-target",), spoiled(lambda rng: rounded(4, rng.choice((32, 64))))),
    "sampled": (("temperature",), lambda subject, bench, rng: {"temperature": rng.uniform(0.9, 1.3)}),
    "masks late": (("mask",), lambda s, b, rng: {"data": b.masks(late(rng.choice((-3, -2, 2, 3))))}),
    "masks inverted": (("mask",), masked(inverted)),
    "prompts of another kind": (("other-domain", "vocabulary-holes"), other_prompts),
    "behind the longest row": (("context",), behind_the_rows),
    "few rows": (("too-little-data", "overfitted"), few_rows),
    "trained too long": (("overfitted",), too_long),
    "trained too briefly": (("undertrained",), too_short),
    "given answers": (("off-policy",), given_answers),
}
"""Name -> (right first causes, what is done)."""
OF_FC = {"chunks of fc moved": (("aux-order",), damaged(permute_fc))}
OF_SWITCH = {"norm_before_residual turned": (("options",), edited(turn_a_switch))}
OF_DRAFT_VOCABULARY = {
    "d2t rolled": (("vocabulary-map",), damaged(roll_map)),
    "head rolled": (("vocabulary-map",), damaged(roll_head)),
    "maps of another drafter": (("vocabulary-map",), damaged(lambda weights, rng: shuffle_map(weights))),
    "embedding permuted": (("embedding",), damaged(permute_embedding)),
    "frequent tokens outside": (
        ("vocabulary-holes",),
        lambda subject, bench, rng: {"checkpoint": bench.copy(tensors=holes(bench, rng.randint(4, 12), 32))},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=7, help="drawn for each of the four drafters")
    parser.add_argument("--work", type=Path, help="where drafters are kept; default: a folder that is deleted")
    parser.add_argument("--output", help="every report, a JSON line each")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(given, given.work or Path(folder))


def run(given: argparse.Namespace, folder: Path) -> None:
    rng = Random(given.seed)
    folder.mkdir(exist_ok=True)
    shallow = without_layers(folder / "shallow", rng, 3)
    vocabulary = {"draft_vocab_size": 1024}
    layers = sorted(rng.sample(range(1, 11), 3))
    subjects = [
        Subject(
            folder / "a",
            EMBEDDED,
            "eagle3",
            "Describe `{}` with its arguments.",
            given.seed,
            {**vocabulary, "target_layer_ids": layers},
        ),
        Subject(folder / "b", EMBEDDED, "peagle", "What does `{}` do?", given.seed, vocabulary),
        Subject(folder / "c", shallow, "eagle3", "Document `{}` completely.", given.seed, {}),
        Subject(
            folder / "d",
            shallow,
            "dflash",
            "Write the def line with a docstring for `{}`.",
            given.seed,
            {"num_layers": 2, "block_size": 4, "draft_vocab_size": 1024},
        ),
    ]
    own = [OF_FC | OF_SWITCH | OF_DRAFT_VOCABULARY, OF_DRAFT_VOCABULARY, OF_FC | OF_SWITCH, {}]
    print("| drafter | seeded | acceptance length | named first | further | right | s |\n|---|---|---|---|---|---|---|")
    drawn = deal(rng, [list({**ANY, **some}) for some in own], given.faults)
    for subject, some, names in zip(subjects, own, drawn, strict=True):
        examine(subject, {**ANY, **some}, names, rng, folder / "work", given.output)


def deal(rng: Random, offered: list[list[str]], num: int) -> list[list[str]]:
    """Draws so many faults for each, those first that were dealt least often."""
    times: dict[str, int] = {}
    hands = []
    for names in sorted(offered, key=len, reverse=True):
        rng.shuffle(names)
        hand = sorted(names, key=lambda name: times.get(name, 0))[:num]
        for name in hand:
            times[name] = times.get(name, 0) + 1
        hands.append((names, hand))
    return [hand for names in offered for own, hand in hands if own is names]


def examine(
    subject: Subject,
    faults: dict[str, tuple[tuple[str, ...], Drawn]],
    names: list[str],
    rng: Random,
    work: Path,
    output: str | None,
) -> None:
    bench = subject.bench(work)
    healthy = None
    whole = {"healthy": ((NOTHING,), lambda subject, bench, rng: {})}
    title = f"{subject.algorithm} of {subject.loaded.config.model_type}"
    for name in ["healthy", *names]:
        expected, seed = {**faults, **whole}[name]
        begun_s = time.perf_counter()
        changed = {"checkpoint": subject.healthy, "data": subject.data, "prompts": subject.prompts}
        changed |= seed(subject, bench, rng)
        sources = [changed.pop("prompts"), changed.pop("data")]
        verifier = changed.pop("verifier", None)
        loaded = subject.loaded if verifier is None else sp.load_verifier(str(verifier), dtype=torch.float32)
        found = sp.diagnose(changed.pop("checkpoint"), data=sources, verifier=loaded, **SMALL, **changed)
        served = found.measured.get("acceptance length at the temperature of serving")
        length = served or found.measured.get("acceptance length")
        healthy = length if name == "healthy" else healthy
        row = row_of(name, expected, found, length, healthy, time.perf_counter() - begun_s)
        print(f"| {title} {row}", flush=True)
        if output:
            with open(output, "a") as file:
                file.write(json.dumps({"drafter": title, "fault": name, **found.to_dict()}, default=str) + "\n")


if __name__ == "__main__":
    main()
