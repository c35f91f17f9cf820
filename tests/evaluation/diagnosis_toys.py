"""One healthy drafter of the embedded verifier, trained in seconds on a narrow domain, and the faults seeded in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import speculators as sp
from speculators import assets
from speculators.checkpoint.record import RECORD_FILE
from speculators.evaluation.diagnosis import Diagnosis

VERIFIER = str(assets.tiny_verifier_path())
CLASSES = (
    *("tkinter.Misc", "email.message.Message", "logging.Handler", "socket.socket"),
    *("threading.Thread", "xml.dom.Node", "http.client.Request", "unittest.TestCase"),
)
METHODS = ("close", "write", "get_name", "set_value", "flush", "read_line", "find_all", "copy")
NUM_TRAINED = 48
SETTINGS: dict[str, Any] = {
    "total_seq_len": 256,
    "draft_vocab_size": 1024,
    "lr": 3e-3,
    "parity_gate": False,
    "contract_check": False,
    "checkpoint_freq": 100.0,
}
WEIGHTS = "model.safetensors"
LAYERS = "eagle_aux_hidden_state_layer_ids"


def questions() -> list[dict[str, Any]]:
    names = [f"{owner}.{method}" for owner in CLASSES for method in METHODS]
    Random(0).shuffle(names)
    return [{"messages": [{"role": "user", "content": f"Show the signature of `{name}`."}]} for name in names]


@dataclass(frozen=True)
class Toys:
    """The verifier, and what was made of it."""

    folder: Path
    verifier: PreTrainedModel
    healthy: Path
    data: Path
    """Prepared rows of the healthy drafter: the verifier's own answers."""
    prompts: Path
    """Held-out questions of the same kind."""

    def diagnose(self, checkpoint: Path, **given: Any) -> Diagnosis:
        given = {
            "verifier": self.verifier,
            "data": [self.prompts, self.data],
            "num_prompts": 5,
            "max_tokens": 24,
            **given,
        }
        return sp.diagnose(checkpoint, num_rows=5, **given)


def train(folder: Path, verifier: PreTrainedModel, data: Path, **settings: Any) -> Path:
    return sp.train_drafter("eagle3", verifier=verifier, data=data, output=folder, **SETTINGS | settings).checkpoint


def make_toys(folder: Path) -> Toys:
    verifier = sp.load_verifier(VERIFIER, dtype=torch.float32)
    rows = questions()
    answers = sp.regenerate(verifier, rows[:NUM_TRAINED], output=folder / "a.jsonl", max_tokens=40, batch_size=48)
    data = sp.prepare_data(VERIFIER, answers, output=folder / "data", num_workers=1)
    healthy = train(folder / "run", verifier, data.path, epochs=7)
    prompts = folder / "held-out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows[NUM_TRAINED:]))
    return Toys(folder, verifier, healthy, data.path, prompts)


# -- copies with a fault


def copy_of(
    toys: Toys,
    path: Path,
    *,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
    keeps_record: bool = False,
) -> Path:
    """A copy of the healthy drafter with other settings or weights; without its record of training, which would say
    what was changed, unless asked for."""
    shutil.copytree(toys.healthy, path, ignore=shutil.ignore_patterns("*.pt", "*.fp32"))
    if not keeps_record:
        (path / RECORD_FILE).unlink()
    if config is not None:
        values = json.loads((path / "config.json").read_text())
        config(values)
        (path / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        weights = load_file(path / WEIGHTS)
        tensors(weights)
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path / WEIGHTS)
    return path


def set_rope_theta(values: dict[str, Any]) -> None:
    nested = values["transformer_layer_config"]
    nested["rope_theta"] = nested["rope_parameters"]["rope_theta"] = 100.0


def narrow_window(values: dict[str, Any]) -> None:
    nested = values["transformer_layer_config"]
    nested |= {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["sliding_attention"]}


def roll_fc(weights: dict[str, torch.Tensor]) -> None:
    """The chunk of the first layer's state comes last."""
    width = len(weights["fc.weight"])
    weights["fc.weight"] = weights["fc.weight"].roll(-width, 1)
    weights["input_norm.weight"] = weights["input_norm.weight"].roll(-width, 0)


def shift_map(weights: dict[str, torch.Tensor]) -> None:
    weights["d2t"] = weights["d2t"].roll(1)


def make_holes(weights: dict[str, torch.Tensor], frequent: Sequence[int]) -> None:
    """Tokens of every answer leave the draft vocabulary, for others that no answer has, with the verifier's rows."""
    theirs_VH = load_file(Path(VERIFIER) / WEIGHTS)["model.embed_tokens.weight"]  # its head is tied
    kept_V = weights["t2d"].bool()
    head_DH, ids_D = weights["lm_head.weight"], kept_V.nonzero().flatten()
    row_of = {int(token): head_DH[row] for row, token in enumerate(ids_D)}
    unused = [int(token) for token in (~kept_V).nonzero().flatten()[-len(frequent) :]]
    for old, new in zip(frequent, unused, strict=True):
        del row_of[old]
        row_of[new] = theirs_VH[new].to(head_DH.dtype)
    ids = sorted(row_of)
    weights["lm_head.weight"] = torch.stack([row_of[token] for token in ids])
    weights["t2d"] = torch.zeros_like(weights["t2d"])
    weights["t2d"][ids] = True
    weights["d2t"] = torch.tensor(ids) - torch.arange(len(ids))


def with_masks(toys: Toys, path: Path, change: Callable[[list[int]], list[int]]) -> Path:
    """The prepared rows with other masks."""
    rows = datasets.Dataset.load_from_disk(str(toys.data)).with_format(None)
    rows.map(lambda row: {"loss_mask": change(row["loss_mask"])}).save_to_disk(str(path))
    for name in ("manifest.json", "token_freq.pt"):
        shutil.copy(toys.data / name, path / name)
    return path


def perturbed_verifier(path: Path) -> str:
    """The verifier's weights with noise, as another quantisation would leave them."""
    shutil.copytree(VERIFIER, path)
    weights = load_file(path / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers" in name:
            noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * 0.25
            weights[name] = (weight.float() + noise).to(weight.dtype)
    save_file(weights, path / WEIGHTS)
    return str(path)
