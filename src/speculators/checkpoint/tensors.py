"""Tensors of checkpoints without holding them in memory: `stored_tensors` gives their shapes, types and origins, and
reads the values of each when something computes with them; `write_tensors` writes one after the other; `plan_of` says
what would become of each.

    renamed          the same object under another name
    moved            cast, split, joined: said of the result, done when its values are read
    computed with    equal, any, norms, ...: the values are read, and let go afterwards
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from speculators.utils.loading import SAFETENSORS, find_key, like_stored, locate_tensors, read_scaled, read_tensors
from speculators.utils.quantized import is_scaled, scale_key_of
from speculators.utils.report import TableReport, facts_table, visible

SIZE_BYTES, ALIGNMENT_BYTES = 8, 8
"""A safetensors file: this many bytes say how long the JSON header is, which ends at a multiple; data follow it."""
VALUES_AT_ONCE = 1 << 18
"""Values of a tensor that are converted or written at a time."""
WRITTEN_TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of tensors in the order in which safetensors writes them, the widest first."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from."""

    path: Path
    """The checkpoint's directory; of a hub id, where its file lies."""
    names: tuple[str, ...]
    """In that checkpoint."""
    steps: tuple[str, ...] = ()
    """What was done to it: "cast from float32", "split", "joined"."""


class StoredTensor(Tensor):
    """A tensor of a file. On the meta device, with shape and type, until something computes with its values."""

    origin: Origin
    read: Callable[[], Tensor]

    @classmethod
    def like(cls, meta: Tensor, origin: Origin, read: Callable[[], Tensor]) -> StoredTensor:
        made = meta.as_subclass(cls)
        made.origin, made.read = origin, read
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in FACTS:
            return super().__torch_function__(func, types, args, kwargs)
        if func in MOVES and is_for_the_file(args, kwargs):
            return moved(func, args, kwargs)
        return func(*with_values(args), **{key: with_values(value) for key, value in kwargs.items()})


FACTS = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
    Tensor.__len__,
}
"""What shape and type say."""
MOVES = {
    Tensor.to: "cast",
    Tensor.split: "split",
    Tensor.chunk: "split",
    Tensor.unbind: "split",
    torch.cat: "joined",
    torch.stack: "joined",
    Tensor.contiguous: "",
    Tensor.detach: "",
}
"""What moves values and computes nothing, and what a plan calls it."""


def is_for_the_file(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a move stays one of stored tensors: joined with others, or sent to a device, their values are needed."""
    values = [*args, *kwargs.values()]
    tensors = [t for value in values for t in (value if isinstance(value, list | tuple) else [value])]
    to_device = any(isinstance(value, torch.device | str) for value in values)
    return not to_device and all(type(t) is StoredTensor for t in tensors if isinstance(t, Tensor))


def with_values(value: Any) -> Any:
    """Reads the stored tensors in arguments."""
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, list | tuple):
        return type(value)(with_values(item) for item in value)
    return value


def moved(func: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Moves stored tensors without reading them."""
    sources = [args[0]] if isinstance(args[0], StoredTensor) else list(args[0])
    metas = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in sources]
    result = func(metas[0] if isinstance(args[0], StoredTensor) else metas, *args[1:], **kwargs)
    is_one = isinstance(result, Tensor)
    if is_one and result is metas[0]:
        return args[0]
    step = (MOVES[func],) if MOVES[func] else ()
    if func is Tensor.to:
        step = (f"cast from {str(args[0].dtype).removeprefix('torch.')}",)
    names = tuple(dict.fromkeys(name for source in sources for name in source.origin.names))
    steps = tuple(dict.fromkeys((*(step for source in sources for step in source.origin.steps), *step)))
    origin = Origin(sources[0].origin.path, names, steps)
    if is_one:
        return StoredTensor.like(result, origin, lambda: func(*with_values(args), **kwargs))

    def part_of(meta: Tensor, part: int) -> StoredTensor:
        return StoredTensor.like(meta, origin, lambda: func(*with_values(args), **kwargs)[part])

    return tuple(part_of(meta, part) for part, meta in enumerate(result))


def values_of(tensor: Tensor) -> Tensor:
    """Reads a stored tensor; any other is returned as it is."""
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def stored_tensors(path: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory or hub id as it is, or the named ones as `load_model_layers` finds and
    reads them: FP8 values times their scale, in float32. A name that is not there is left out, as is a scale beside its
    weight. Raises `FileNotFoundError` without weights, `ValueError` for damaged ones; so does reading them later."""
    files = locate_tensors(path)
    keys = {name: name for name in files}
    if names is not None:
        keys = {name: key for name in names if (key := find_key(name, files)) is not None}
    metas = like_stored({key: files[key] for key in keys.values()})
    scales = {} if names is None else {key: scale_key_of(key, files) for key, t in metas.items() if is_scaled(t)}

    def stored(key: str) -> Tensor:
        scale, origin = scales.get(key), Origin(Path(path), (key,))
        if scale is None:
            return StoredTensor.like(metas[key], origin, lambda: read_tensors({key: files[key]})[key])
        return StoredTensor.like(metas[key].float(), origin, lambda: read_scaled(key, scale, files))

    return {name: stored(key) for name, key in keys.items() if key in metas and key not in scales.values()}


# -- writing -----------------------------------------------------------------------------------------------------------


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the safetensors file of a directory as `safetensors.torch.save_file` does, to the byte, and holds one
    tensor at a time. Raises `ValueError` as `refuse_nameless_types` does."""
    refuse_nameless_types(tensors)
    names = sorted(tensors, key=lambda name: (list(WRITTEN_TYPES).index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        begin, end = end, end + tensors[name].numel() * dtype.itemsize
        header[name] = {"dtype": WRITTEN_TYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    with (directory / SAFETENSORS).open("wb") as file:
        file.write(len(text).to_bytes(SIZE_BYTES, "little") + text)
        for name in names:
            for block in bytes_of(tensors[name]):
                file.write(block)


def refuse_nameless_types(tensors: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` for a type that a safetensors file has no name for."""
    unknown = sorted(name for name, tensor in tensors.items() if tensor.dtype not in WRITTEN_TYPES)
    if unknown:
        raise ValueError(f"{unknown[0]} is {tensors[unknown[0]].dtype}, for which a safetensors file has no name")


def bytes_of(tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[memoryview]:
    """The values of a tensor as they stand in a file, in blocks; converted to `dtype` where that is given."""
    flat = values_of(tensor).detach().cpu().reshape(-1)
    for block in flat.split(VALUES_AT_ONCE) if flat.numel() else ():
        yield block.to(dtype or block.dtype).contiguous().view(torch.uint8).numpy().data


# -- what would be written ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedTensor:
    source: tuple[str, ...]
    """Its names in the source; several for one that is joined from them, none for one that the source lacks."""
    written: str | None
    """Its name in the result; None: it is left out."""
    shape: tuple[int, ...]
    dtype: str
    how: str
    """What is done to it, or why it is left out."""

    @classmethod
    def of(cls, name: str, tensor: Tensor, source: Path) -> PlannedTensor:
        facts = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if not isinstance(tensor, StoredTensor):
            return cls((), name, *facts, "zeros, which the source leaves out" if not tensor.any() else "computed")
        origin = tensor.origin
        moves = [*(() if origin.names == (name,) else ("renamed",)), *origin.steps]
        if origin.path != source:
            return cls((), name, *facts, f"copied from the verifier's {origin.names[0]}")
        return cls(origin.names, name, *facts, ", ".join(moves) or "copied")


@dataclass(frozen=True)
class CheckpointPlan(TableReport):
    """What a conversion or an export would write; nothing was written."""

    path: Path
    """The source."""
    speculators_model_type: str
    source_format: str
    format: str
    """That would be written."""
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**json.loads(json.dumps(asdict(self), default=str)), "dry_run": True}

    def tables(self) -> list[Table]:
        table = Table(title="tensors", title_justify="left")
        for column in ("from", "to", "shape", "dtype", "how"):
            table.add_column(column, overflow="fold")
        for planned in self.tensors:
            words = (", ".join(planned.source), planned.written or "-", str(list(planned.shape)), planned.dtype)
            table.add_row(*(escape(visible(word)) for word in (*words, planned.how)))
        facts = {"source": self.path, "from format": self.source_format, "to format": self.format}
        facts |= {"speculator": self.speculators_model_type}
        return [table, facts_table("planned", facts | ({"note": "\n".join(self.notes)} if self.notes else {}))]

    def sentence(self) -> str:
        num = sum(tensor.written is not None for tensor in self.tensors)
        return f"{num} tensors would be written, {len(self.tensors) - num} left out; nothing was written"


def plan_of(
    written: Mapping[str, Tensor], source: Mapping[str, Tensor], path: Path, left_out: Mapping[Tensor, str]
) -> tuple[PlannedTensor, ...]:
    """Says what becomes of each tensor; `left_out` gives the reasons that are known. Raises `ValueError` for a tensor
    that cannot be written."""
    refuse_nameless_types(written)
    planned = [PlannedTensor.of(name, tensor, path) for name, tensor in sorted(written.items())]
    used = {name for entry in planned for name in entry.source}
    reasons = {name: why for t, why in left_out.items() if isinstance(t, StoredTensor) for name in t.origin.names}
    for name in sorted(source.keys() - used):
        entry = PlannedTensor.of(name, source[name], path)
        why = reasons.get(name, "its values are elsewhere: the verifier's own, tied weights or an identity map")
        planned.append(replace(entry, written=None, how=f"left out: {why}"))
    return tuple(planned)
