"""The files of one checkpoint directory: what is written, and how it is read back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from speculators.checkpoint.record import write_training_record
from speculators.model import SpeculatorModel
from speculators.train.distributed import RandomState
from speculators.train.optimizers import Optimizers

STATE_FILE = "training_state.json"
MASTERS_FILE = "master_weights.fp32"
"""A safetensors file by another name: vLLM loads every *.safetensors of the directory it serves."""
OPTIMIZER_FILE = "optimizer_state_dict.pt"
SCHEDULER_FILE = "scheduler_state_dict.pt"
METRICS_FILE = "val_metrics.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be read; one before it may be."""


@dataclass(frozen=True)
class Position:
    """How far a run is. `local_step > 0`: the run is inside the epoch, after so many of its rows."""

    epoch: int = 0
    local_step: int = 0
    global_step: int = 0


def write_checkpoint(
    path: Path, model: SpeculatorModel, optimizers: Optimizers, position: Position, val_metrics: dict[str, float] | None
) -> None:
    save_speculator(model, path)
    save_file({name: tensor.contiguous() for name, tensor in masters(model).items()}, path / MASTERS_FILE)
    torch.save(optimizers.state_dict(), path / OPTIMIZER_FILE)
    (path / STATE_FILE).write_text(json.dumps(asdict(position)))
    if val_metrics is not None:
        (path / METRICS_FILE).write_text(json.dumps(val_metrics, indent=1))


def write_random_states(path: Path, position: Position, states: Sequence[RandomState], num_rows: int | None) -> None:
    values = {"step": position.global_step, "random_states": list(states)}
    torch.save(values if num_rows is None else {**values, "num_rows": num_rows}, path / SCHEDULER_FILE)


def save_speculator(model: SpeculatorModel, path: Path) -> None:
    """Writes the Hugging Face directory, with every float tensor in bf16, and its training record."""
    state = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(path, state_dict=state)
    config = json.loads((path / "config.json").read_text())  # transformers writes the type of the masters there
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2, sort_keys=True) + "\n")
    write_training_record(path, model.contract.training_keys)


def masters(model: SpeculatorModel) -> dict[str, Tensor]:
    """Returns what training changes, in its own precision: trainable parameters and saved buffers."""
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in frozen}


def restore_weights(model: SpeculatorModel, weights: dict[str, Tensor], path: Path) -> None:
    current = masters(model)
    wrong = sorted(
        name
        for name in current.keys() | weights.keys()
        if name not in current or name not in weights or current[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"checkpoint {path} is of another drafter (first difference: {wrong[0]}): use the settings it "
            "was trained with, another --output, or --no-resume-from-checkpoint"
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(weights[name])


def read_position(path: Path) -> Position:
    try:
        position = Position(**json.loads((path / STATE_FILE).read_text()))
        if wrong := [name for name, n in asdict(position).items() if type(n) is not int or n < 0]:
            raise ValueError(f"{wrong} are not counts")
        return position
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{path / STATE_FILE} is damaged ({error}): delete the directory {path}"
        ) from error


def first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
