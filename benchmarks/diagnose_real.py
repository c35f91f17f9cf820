"""Seeds faults in copies of a trained EAGLE-3 drafter and asks `diagnose` about each: docs/diagnose.md's table.

    python benchmarks/diagnose_real.py --verifier MODEL --checkpoint run/3 --data data --prompts held-out.jsonl
        [--few few-run/3 --few-data few-data] [--other other.jsonl]
        [--given-run given-run/2 --given-data given-data] [--only 'a 200th of rope theta;K is 0'] [--work DIR]

The copies lack the record of training, which would say what was changed. Verifiers are spoiled in copies too. Nothing
is written beside what is given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import speculators as sp
from speculators.checkpoint.record import RECORD_FILE
from speculators.data_generation.prepared import PreparedData
from speculators.evaluation.diagnosis import Diagnosis

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LAYERS = "eagle_aux_hidden_state_layer_ids"
SMALL = {"num_prompts": 8, "max_tokens": 48, "num_rows": 10}
Weights = dict[str, torch.Tensor]


@dataclass
class Bench:
    """What is given, and where copies are made."""

    given: argparse.Namespace
    work: Path
    loaded: PreTrainedModel

    def copy(
        self,
        config: Callable[[dict[str, Any]], object] | None = None,
        tensors: Callable[[Weights], object] | None = None,
        keeps_record: bool = False,
    ) -> Path:
        """Returns a copy of the checkpoint with other settings or weights."""
        path = self.work / "copy"
        shutil.rmtree(path, ignore_errors=True)
        left_out = ["*.pt", "*.fp32", *([] if keeps_record else [RECORD_FILE])]
        shutil.copytree(self.given.checkpoint, path, ignore=shutil.ignore_patterns(*left_out))
        if config is not None:
            values = json.loads((path / CONFIG).read_text())
            config(values)
            (path / CONFIG).write_text(json.dumps(values))
        if tensors is not None:
            weights = load_file(path / WEIGHTS)
            tensors(weights)
            save_file({name: weight.contiguous() for name, weight in weights.items()}, path / WEIGHTS)
        return path

    def verifier(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
        """Returns a copy of the verifier whose matrices were changed."""
        path = self.work / "verifier"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.given.verifier, path)
        for file in path.glob("*.safetensors"):
            weights = load_file(file)
            changed = {n: change(w.float()).to(w.dtype) if w.ndim == 2 else w for n, w in weights.items()}
            save_file(changed, file, metadata={"format": "pt"})
        return path

    def masks(self, change: Callable[[list[int]], list[int]]) -> Path:
        """Returns the training rows with other loss masks."""
        path = self.work / "masks"
        shutil.rmtree(path, ignore_errors=True)
        rows = datasets.Dataset.load_from_disk(str(self.given.data)).with_format(None)
        rows.map(lambda row: {"loss_mask": change(row["loss_mask"])}).save_to_disk(str(path))
        for file in Path(self.given.data).glob("*"):
            if not (path / file.name).exists():
                shutil.copy(file, path / file.name)
        return path

    def long_prompts(self) -> Path:
        """Returns the prompts, each behind six others and the verifier's answers to them."""
        rows = [json.loads(line) for line in Path(self.given.prompts).read_text().splitlines()]
        file = self.work / "answers.jsonl"
        file.unlink(missing_ok=True)
        earlier = [{"messages": [{"role": "user", "content": row["question"]}]} for row in rows[-6:]]
        sp.regenerate(self.loaded, earlier, output=file, max_tokens=256, batch_size=6)
        texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        turns = [
            turn
            for row, text in zip(earlier, texts, strict=True)
            for turn in (*row["messages"], {"role": "assistant", "content": text})
        ]
        path = self.work / "long.jsonl"
        with path.open("w") as file:
            for row in rows[: self.given.num_prompts]:
                asked = {"role": "user", "content": row["question"]}
                file.write(json.dumps({"messages": [*turns, asked]}) + "\n")
        return path


# -- the faults


def nested(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["transformer_layer_config"].update(values)


def theta_by(factor: float) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        rope = config["transformer_layer_config"]["rope_parameters"]
        rope["rope_theta"] *= factor

    return change


def layers(change: Callable[[list[int]], list[int]]) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({LAYERS: change(config[LAYERS])})


def turn_residual(config: dict[str, Any]) -> None:
    config["norm_before_residual"] = not config["norm_before_residual"]


def far_away(ids: list[int]) -> list[int]:
    """Others between the first and the last."""
    low, *_, high = ids
    return [low + (high - low) * share // 24 for share in (2, 8, 17)]


def reset_norms(weights: Weights) -> None:
    for name, weight in weights.items():
        if weight.ndim == 1 and "norm" in name:
            weight.fill_(1)


def roll_fc(weights: Weights) -> None:
    """The chunk of the first layer's state comes last."""
    weights["fc.weight"] = weights["fc.weight"].roll(-len(weights["fc.weight"]), 1)
    weights["input_norm.weight"] = weights["input_norm.weight"].roll(-len(weights["fc.weight"]), 0)


def absolute_map(weights: Weights) -> None:
    """Token ids where offsets belong."""
    weights["d2t"] += torch.arange(len(weights["d2t"]))


def shift_head(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0)


def shuffle_map(weights: Weights) -> None:
    """Both maps of another drafter, consistent with each other, without this one's head."""
    kept_V = weights["t2d"].bool()
    ids = torch.randperm(len(kept_V), generator=torch.Generator().manual_seed(0))[: int(kept_V.sum())].sort().values
    weights["t2d"] = torch.zeros_like(weights["t2d"])
    weights["t2d"][ids] = True
    weights["d2t"] = ids - torch.arange(len(ids))


def holes(bench: Bench, first: int = 20, num: int = 100) -> Callable[[Weights], None]:
    """Frequent tokens leave the draft vocabulary for tokens that no answer has, with the verifier's rows."""
    counts = PreparedData.open(bench.given.data).token_freq()
    frequent = sorted(counts, key=lambda token: -counts[token])[first : first + num]
    [theirs] = [
        w for f in Path(bench.given.verifier).glob("*.safetensors") for n, w in load_file(f).items() if "embed" in n
    ]

    def change(weights: Weights) -> None:
        kept_V = weights["t2d"].bool()
        row_of = dict(zip(kept_V.nonzero().flatten().tolist(), weights["lm_head.weight"], strict=True))
        unused = (~kept_V).nonzero().flatten()[-len(frequent) :].tolist()
        for old, new in zip(frequent, unused, strict=True):
            row_of.pop(old)
            row_of[new] = theirs[new].to(kept_V.device)
        ids = sorted(row_of)
        weights["lm_head.weight"] = torch.stack([row_of[token].to(weights["fc.weight"].dtype) for token in ids])
        weights["t2d"] = torch.zeros_like(weights["t2d"])
        weights["t2d"][ids] = True
        weights["d2t"] = torch.tensor(ids) - torch.arange(len(ids))

    return change


def rounded(bits: int, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Symmetric round-to-nearest in groups of a row, as weight-only quantisation leaves them."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.reshape(-1, group)
        scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-9) / (2 ** (bits - 1) - 1)
        return ((grouped / scale).round() * scale).reshape(weight.shape)

    return change


def noisy(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda weight: weight + torch.randn(weight.shape, generator=generator) * weight.std() * share


def one_late(mask: list[int]) -> list[int]:
    return [0, *mask[:-1]]


def everything(mask: list[int]) -> list[int]:
    return [1] * len(mask)


def inverted(mask: list[int]) -> list[int]:
    return [1 - m for m in mask]


Seed = Callable[[Bench], Mapping[str, Any]]


def files(**changes: Any) -> Seed:
    return lambda bench: {"checkpoint": bench.copy(**changes)}


NOTHING, HARMLESS = "nothing", 0.95
"""A fault that leaves this share of the acceptance length is no cause of a low one."""
FAULTS: dict[str, tuple[tuple[str, ...], Seed]] = {
    "healthy": ((NOTHING,), lambda bench: {}),
    "healthy, without its record": ((NOTHING,), files()),
    "layers counted from 1": (("aux-layers",), files(config=layers(lambda ids: [i + 1 for i in ids]))),
    "layers counted from the states behind": (("aux-layers",), files(config=layers(lambda ids: [i - 1 for i in ids]))),
    "last layer one too far": (("aux-layers",), files(config=layers(lambda ids: [*ids[:-1], ids[-1] + 1]))),
    "layers far away": (("aux-layers",), files(config=layers(far_away))),
    "chunks of fc permuted": (("aux-order",), files(tensors=roll_fc)),
    "a tenth of rope theta": (("rope",), files(config=theta_by(1 / 10))),
    "a 200th of rope theta": (("rope",), files(config=theta_by(1 / 200))),
    "all norms are 1": (("norms",), files(tensors=reset_norms)),
    "last norm stored as w - 1": (("norms",), files(tensors=lambda w: w["norm.weight"].sub_(1))),
    "norm_before_residual turned": (("options",), files(config=turn_residual)),
    "d2t rolled by one": (("vocabulary-map",), files(tensors=lambda w: w.update(d2t=w["d2t"].roll(1)))),
    "d2t holds token ids": (("vocabulary-map",), files(tensors=absolute_map)),
    "head rows of the tokens beside": (("vocabulary-map",), files(tensors=shift_head)),
    "maps of another drafter": (("vocabulary-map",), files(tensors=shuffle_map)),
    "frequent tokens outside": (("vocabulary-holes",), lambda bench: {"checkpoint": bench.copy(tensors=holes(bench))}),
    "embedding of another model": (
        ("embedding",),
        files(tensors=lambda w: w.update({"embed_tokens.weight": w["embed_tokens.weight"].flip(0)})),
    ),
    "damaged layer": (
        ("changed-since-training",),
        files(tensors=lambda w: w["layers.0.mlp.down_proj.weight"].copy_(w["layers.0.mlp.down_proj.weight"].flip(0))),
    ),
    "weights are not numbers": (("inactive",), files(tensors=lambda w: w["fc.weight"].fill_(float("nan")))),
    "window of 8": (
        ("context",),
        files(config=nested(sliding_window=8, use_sliding_window=True, layer_types=["sliding_attention"])),
    ),
    "verifier rounded to 8 bit": (("verifier",), lambda b: {"verifier": b.verifier(rounded(8, 64))}),
    "verifier rounded to 4 bit": (("quantised-target",), lambda b: {"verifier": b.verifier(rounded(4, 64))}),
    "verifier rounded to 4 bit, no record": (
        ("quantised-target",),
        lambda b: {"verifier": b.verifier(rounded(4, 64)), "checkpoint": b.copy()},
    ),
    "another revision (noise of 20 %)": (
        ("verifier",),
        lambda b: {"verifier": b.verifier(noisy(0.2)), "checkpoint": b.copy(keeps_record=True)},
    ),
    "another revision, no record": (
        ("verifier",),
        lambda b: {"verifier": b.verifier(noisy(0.2)), "checkpoint": b.copy()},
    ),
    "served at temperature 1": (("temperature",), lambda bench: {"temperature": 1.0}),
    "K is 0": (("inactive",), lambda bench: {"num_speculative_tokens": 0}),
    "engine told ngram": (
        ("inactive",),
        lambda bench: {"engine_config": {"method": "ngram", "num_speculative_tokens": 4}},
    ),
    "masks one late": (("mask",), lambda b: {"data": b.masks(one_late)}),
    "masks of everything": (("mask",), lambda b: {"data": b.masks(everything)}),
    "masks inverted": (("mask",), lambda b: {"data": b.masks(inverted)}),
    "behind the longest training row": (("context",), lambda b: {"prompts": b.long_prompts()}),
    "prompts of another domain": (("other-domain", "vocabulary-holes"), lambda b: {"prompts": b.given.other}),
    "few conversations": (
        ("too-little-data", "overfitted"),
        lambda b: {"checkpoint": b.given.few, "data": b.given.few_data},
    ),
    "somebody else's answers": (
        ("off-policy",),
        lambda b: {"checkpoint": b.given.given_run, "data": b.given.given_data},
    ),
}
NEEDS = {"few conversations": "few", "somebody else's answers": "given_run", "prompts of another domain": "other"}


def main() -> None:
    given = arguments()
    verifier = sp.load_verifier(given.verifier, dtype=torch.float32)
    wanted = given.only.split(";") if given.only else list(FAULTS)
    print("| seeded | acceptance length | named first | further | right | s |\n|---|---|---|---|---|---|")
    healthy = given.healthy
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        bench = Bench(given, Path(folder), verifier)
        for name in wanted:
            expected, seed = FAULTS[name]
            if name in NEEDS and getattr(given, NEEDS[name]) is None:
                continue
            changed = {"checkpoint": given.checkpoint, "data": given.data, "prompts": given.prompts, **seed(bench)}
            sources = [changed.pop("prompts"), changed.pop("data")]
            begun_s = time.perf_counter()
            changed["verifier"] = (
                sp.load_verifier(changed["verifier"], dtype=torch.float32) if "verifier" in changed else verifier
            )
            size = {name: getattr(given, name) for name in SMALL}
            found = sp.diagnose(changed.pop("checkpoint"), data=sources, **size, **changed)
            served = found.measured.get("acceptance length at the temperature of serving")
            length = served or found.measured.get("acceptance length")
            healthy = length if name == "healthy" else healthy
            print(row_of(name, expected, found, length, healthy, time.perf_counter() - begun_s), flush=True)
            if given.output:
                with open(given.output, "a") as file:
                    file.write(json.dumps({"fault": name, **found.to_dict()}) + "\n")


def row_of(
    name: str, expected: tuple[str, ...], found: Diagnosis, length: float | None, healthy: float | None, time_s: float
) -> str:
    first = found.first or NOTHING
    others = ", ".join(cause.name for cause in found.causes[1:]) or "-"
    is_harmless = first == NOTHING and None not in (length, healthy) and length >= HARMLESS * healthy
    is_right = "yes" if first in expected else "harmless" if is_harmless else "**no**"
    accepted = "-" if length is None else f"{length:.2f}"
    return f"| {name} | {accepted} | {first} | {others} | {is_right} | {time_s:.0f} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="directory of prepare-data that it was trained on")
    parser.add_argument("--prompts", required=True, help="held-out prompts of the same kind")
    for name, number in SMALL.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=number)
    parser.add_argument("--healthy", type=float, help="acceptance length of the healthy drafter, where --only skips it")
    parser.add_argument("--few", help="a drafter of few conversations")
    parser.add_argument("--few-data")
    parser.add_argument("--given-run", help="a drafter of answers that the verifier did not write")
    parser.add_argument("--given-data")
    parser.add_argument("--other", help="prompts of another kind")
    parser.add_argument("--work", default=None)
    parser.add_argument("--only", help="names of faults, with ; between them")
    parser.add_argument("--output", help="every report, a JSON line each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
