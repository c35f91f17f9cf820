"""The files of one checkpoint directory: what is written, and how it is read back bit for bit."""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from speculators.checkpoint.record import write_training_record
from speculators.model import SpeculatorModel
from speculators.train.distributed import RandomState, Ranks, hearing_others, split_like
from speculators.train.optimizers import Optimizers
from speculators.utils.util import WRONG_VALUE

STATE_FILE = "training_state.json"
MASTERS_FILE = "master_weights.fp32"
"""A safetensors file by another name: vLLM loads every *.safetensors of the directory it serves."""
OPTIMIZER_FILE = "optimizer_state_dict.pt"
SCHEDULER_FILE = "scheduler_state_dict.pt"
METRICS_FILE = "val_metrics.json"
CHECKSUMS_FILE = "checksums.json"
"""{"crc32": {file that resuming reads: its CRC-32}}; written last. Checkpoints of earlier releases have none."""
SHARDS = "sharded_state"
WEIGHTS = "weights"
"""Begins the names of the weights there; those of optimizer state begin with the name of the optimizer."""


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be read; one before it may be."""


@dataclass(frozen=True)
class Position:
    """How far a run is. `local_step > 0`: the run is inside the epoch, after so many of its rows."""

    epoch: int = 0
    local_step: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class Shares:
    """What each rank of a run does."""

    random_states: Sequence[RandomState]
    """Of each rank."""
    num_rows: int | None = None
    """Of each rank in this epoch."""
    rows_a_step: int | None = None
    """Of each rank."""

    @property
    def num_ranks(self) -> int:
        return len(self.random_states)

    def save(self, path: Path, position: Position) -> None:
        values = {"step": position.global_step, "random_states": list(self.random_states)}
        given = {"num_rows": self.num_rows, "rows_a_step": self.rows_a_step}
        torch.save(values | {name: value for name, value in given.items() if value is not None}, path / SCHEDULER_FILE)

    @classmethod
    def load(cls, path: Path) -> Shares:
        check_bytes(path, [SCHEDULER_FILE])
        saved = torch.load(path / SCHEDULER_FILE, weights_only=True, map_location="cpu")
        states = saved.get("random_states") or [saved["random_state"]]
        return cls(list(states), saved.get("num_rows"), saved.get("rows_a_step"))


def write_masters(path: Path, model: SpeculatorModel, optimizers: Optimizers) -> None:
    """Writes what training changes as it is, for resuming."""
    save_file({name: tensor.contiguous() for name, tensor in masters(model).items()}, path / MASTERS_FILE)
    torch.save(optimizers.state_dict(), path / OPTIMIZER_FILE)


def write_position(path: Path, position: Position, val_metrics: dict[str, float] | None) -> None:
    (path / STATE_FILE).write_text(json.dumps(asdict(position)))
    if val_metrics is not None:
        (path / METRICS_FILE).write_text(json.dumps(val_metrics, indent=1))


def read_masters(path: Path, model: SpeculatorModel, optimizers: Optimizers) -> tuple[dict[str, Tensor], Any]:
    """Returns weights and optimizer state of either kind of checkpoint."""
    if (path / SHARDS).is_dir():
        return read_shards(path, masters(model), optimizers)
    return load_file(path / MASTERS_FILE), torch.load(path / OPTIMIZER_FILE, weights_only=True, map_location="cpu")


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


# -- by torch.distributed.checkpoint: any number of ranks reads the parts that it needs, without communication --------


def write_shards(path: Path, weights: dict[str, Tensor], optimizers: Optimizers, ranks: Ranks) -> dict[str, str]:
    """Writes this rank's parts. All ranks call it with the same path, which all of them can write to. Returns the
    checksum of every part: each rank reads its own again.

    Raises `OSError` on every rank when one of them cannot write.
    """
    tensors = {f"{WEIGHTS}/{name}": tensor for name, tensor in weights.items()}
    for kind, saved in optimizers.state_dict().items():
        for index, values in saved["state"].items():
            tensors |= {f"{kind}/{index}/{name}": value for name, value in values.items()}
    try:
        with hearing_others(beside_work=True):
            dcp.save(dict(sorted(tensors.items())), checkpoint_id=path / SHARDS)  # equal state, equal bytes
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {cause}") from error
    parts = (path / SHARDS).glob(f"__{ranks.rank}_*.distcp")
    own = checksums_of(path, [f"{SHARDS}/{part.name}" for part in parts])
    return {name: checksum for of_rank in ranks.gather_objects(own) for name, checksum in of_rank.items()}


def read_shards(path: Path, weights: dict[str, Tensor], optimizers: Optimizers) -> tuple[dict[str, Tensor], Any]:
    """Returns weights and optimizer state, split as `weights` and the parameters of `optimizers` are.

    Raises `CheckpointException` or one of what reading raises when files are damaged.
    """
    check_bytes(path, [f"{SHARDS}/.metadata"])
    reader = FileSystemReader(path / SHARDS)
    metadata = reader.read_metadata()
    check_files(path / SHARDS, metadata.storage_data)
    params = {kind: dict(enumerate(of_kind)) for kind, of_kind in optimizers.params().items()}
    tensors = {}
    for key, saved in metadata.state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        kind, index, *_ = key.split("/")
        own = weights.get(key.removeprefix(f"{WEIGHTS}/")) if kind == WEIGHTS else params.get(kind, {}).get(int(index))
        dtype = saved.properties.dtype
        if isinstance(own, DTensor) and own.shape == saved.size:
            tensors[key] = torch.empty_like(own, dtype=dtype)
        else:
            tensors[key] = torch.empty(saved.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it was asked for
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    groups = {kind: saved["param_groups"] for kind, saved in optimizers.state_dict().items()}
    state: dict[str, Any] = {kind: {"state": {}, "param_groups": of_kind} for kind, of_kind in groups.items()}
    read = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        if kind == WEIGHTS:
            read[name] = tensor
        else:
            index, of_state = name.split("/")
            of_kind = state.setdefault(kind, {"state": {}, "param_groups": []})
            of_kind["state"].setdefault(int(index), {})[of_state] = tensor
    return read, state


def check_files(path: Path, places: dict[Any, Any]) -> None:
    """Raises `OSError` when a file is missing or short: the main rank notices what another one would need."""
    for place in places.values():
        file = path / place.relative_path
        if file.stat().st_size < place.offset + place.length:
            raise OSError(f"{file} is cut off")


# -- checksums: neither safetensors nor torch notices a changed byte of a tensor ---------------------------------------


def crc32_of(file: Path) -> str:
    """For accidents, as disks and transfers make them; it takes a third of the time of SHA-256."""
    crc, buffer = 0, bytearray(1 << 20)
    with file.open("rb", buffering=0) as opened:
        while num_bytes := opened.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:num_bytes], crc)
    return f"{crc:08x}"


def checksums_of(path: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: crc32_of(path / name) for name in names if (path / name).exists()}


def write_checksums(path: Path, parts: Mapping[str, str]) -> None:
    """Completes a checkpoint. `parts`: checksums of what several ranks wrote."""
    names = (MASTERS_FILE, OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE, METRICS_FILE, f"{SHARDS}/.metadata")
    found = {**parts, **checksums_of(path, names)}
    (path / CHECKSUMS_FILE).write_text(json.dumps({"crc32": dict(sorted(found.items()))}, indent=1) + "\n")


def recorded_checksums(path: Path) -> dict[str, str]:
    """Returns those of a checkpoint; none of an earlier release's."""
    file = path / CHECKSUMS_FILE
    return dict(json.loads(file.read_text())["crc32"]) if file.exists() else {}


def check_bytes(path: Path, names: Iterable[str]) -> None:
    """Raises `OSError` when a file does not hold the bytes that were written, or one of `UNREADABLE`."""
    recorded = recorded_checksums(path)
    for name in names if recorded else ():
        if recorded[name] != (found := crc32_of(path / name)):
            raise OSError(f"{name} has changed since it was written: CRC-32 {found}, not {recorded[name]}")


# -- -------------------------------------------------------------------------------------------------------------------


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
            tensor.copy_(split_like(tensor, weights[name]))


def read_position(path: Path) -> Position:
    try:
        check_bytes(path, [STATE_FILE])
        position = Position(**json.loads((path / STATE_FILE).read_text()))
        if wrong := [name for name, n in asdict(position).items() if type(n) is not int or n < 0]:
            raise ValueError(f"{wrong} are not counts")
        return position
    except (OSError, ValueError, RecursionError, *WRONG_VALUE) as error:
        raise DamagedCheckpointError(
            f"{path / STATE_FILE} is damaged ({error}): delete the directory {path}"
        ) from error


UNREADABLE = (
    *(OSError, CheckpointException, SafetensorError, pickle.UnpicklingError, EOFError),
    *(ValueError, ImportError),  # of pickles whose names are damaged
    *WRONG_VALUE,
)


def damaged(path: Path, error: BaseException) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"checkpoint {path} cannot be read ({first_sentence(error)}): delete that directory to continue from an older "
        "one, or start anew with --no-resume-from-checkpoint"
    )


def first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__


def mid_epoch_saves(checkpoint_freq: float, num_rows: int, rows_a_step: int = 1) -> set[int]:
    """Returns the rows inside an epoch after which to save, without its end: freq 0.25 of 8 rows -> {2, 4, 6}."""
    if checkpoint_freq >= 1:
        return set()
    count = round(1 / checkpoint_freq)
    wanted = (num_rows * part // count for part in range(1, count))
    return {min(num_rows, -(-row // rows_a_step) * rows_a_step) for row in wanted} - {0, num_rows}


def is_saved_epoch(checkpoint_freq: float, epoch: int) -> bool:
    """Says whether to save at the end of an epoch: after epoch 0, then after every `checkpoint_freq`-th."""
    return epoch % max(1, int(checkpoint_freq)) == 0


def link_name(position: Position) -> str:
    return f"epoch{position.epoch}_" + (f"step{position.local_step}" if position.local_step else "end")
