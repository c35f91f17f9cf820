"""Reads tensors of Hugging Face checkpoints by name, from a directory or the hub, without building the model."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from speculators.utils.files import read_json_object
from speculators.utils.names import GGUF, gguf_file_of
from speculators.utils.quantized import (
    gguf_keys,
    gguf_shape,
    is_scaled,
    read_gguf,
    read_gguf_rows,
    rescaled,
    scale_key_of,
)
from speculators.utils.util import WRONG_VALUE

logger = logging.getLogger(__name__)

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEADS = ("*_lm_head.safetensors", "*_lm_head.pt")
"""Files of drafters that are published as heads alone."""

# The same weight under the names other families give it.
ALIASES = {
    "embed_tokens.weight": (
        "tok_embeddings.weight",
        "llm.embed.weight",
        "backbone.embeddings.weight",
        "wte.weight",
        "embed_in.weight",
    ),
    "lm_head.weight": ("output.weight", "llm.unembed.weight", "embed_out.weight"),
    "model.norm.weight": (
        "llm.norm.weight",
        "backbone.norm_f.weight",
        "norm.weight",
        "ln_f.weight",
        "final_layer_norm.weight",
        "final_layernorm.weight",
    ),
    "model.norm.bias": ("norm.bias", "ln_f.bias", "final_layer_norm.bias", "final_layernorm.bias"),
}


class Rows(NamedTuple):
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    rows: Tensor


def is_config_only_dir(path: str | os.PathLike) -> bool:
    """Says whether a path is a local directory with a config.json and no weights."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return False
    weights = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
    return not any(entry.name.endswith(weights) for entry in folder.iterdir())


def list_checkpoint_keys(path: str | os.PathLike, **hub_kwargs: Any) -> list[str]:
    """Lists the tensor names of a checkpoint directory or hub id. Raises `FileNotFoundError` when it has no weights."""
    return list(locate_tensors(path, **hub_kwargs))


def load_model_layers(names: Iterable[str], model_path: str | os.PathLike, **hub_kwargs: Any) -> dict[str, Tensor]:
    """Reads the named tensors of a checkpoint, keyed by the requested names.

    A name matches a key exactly, else the end of a key after a "." (the shortest such key wins), else the same way
    under one of its aliases. Logs and leaves out names that match no key. Raises `ValueError` when no name does.
    """
    names = list(names)
    files = locate_tensors(model_path, **hub_kwargs)
    keys = {name: key for name in names if (key := find_key(name, files)) is not None}
    if not keys:
        raise ValueError(f"'{model_path}' has none of the tensors {names}; its keys start like {sorted(files)[:5]}")
    for name in names:
        if name not in keys:
            logger.warning("'%s' has no tensor '%s'", model_path, name)
    scales = {key: scale for key in keys.values() if (scale := scale_key_of(key, files)) is not None}
    found = read_tensors({key: files[key] for key in (*keys.values(), *scales.values())})
    found |= {
        key: rescaled(w, found[scales[key]], w.shape) for key, w in found.items() if key in scales and is_scaled(w)
    }
    return {name: found[key] for name, key in keys.items()}


def load_rows(name: str, model_path: str | os.PathLike, rows: Sequence[int] | None = None, **hub_kwargs: Any) -> Rows:
    """Reads some rows of a checkpoint's matrix without the rest, or a whole vector; `rows=None`: evenly spaced rows.

    The name is found as in `load_model_layers`. Raises `KeyError` when the checkpoint has no such tensor.
    """
    files = locate_tensors(model_path, **hub_kwargs)
    key = find_key(name, files)
    if key is None:
        raise KeyError(f"'{model_path}' has no tensor '{name}' under any name known here")
    if files[key].suffix == GGUF:
        shape = gguf_shape(files[key], key)
        return Rows(shape, read_gguf_rows(files[key], key, _rows_of(shape[0], rows)))
    if files[key].suffix != ".safetensors":
        whole = read_tensors({key: files[key]})[key]
        return Rows(tuple(whole.shape), whole if whole.ndim == 1 else whole[_rows_of(whole.shape[0], rows)])
    with safe_open(files[key], framework="pt") as reader:
        lazy = reader.get_slice(key)
        shape = tuple(lazy.get_shape())
        if len(shape) == 1:
            return Rows(shape, lazy[:])
        wanted = _rows_of(shape[0], rows)
        found = torch.cat([lazy[i : i + 1] for i in wanted])
    scale = scale_key_of(key, files) if is_scaled(found) else None
    if scale is not None:
        found = rescaled(found, read_tensors({scale: files[scale]})[scale], shape, wanted)
    return Rows(shape, found)


def _rows_of(count: int, rows: Sequence[int] | None) -> list[int]:
    return list(rows) if rows is not None else spaced(count)


def spaced(count: int, wanted: int = 64) -> list[int]:
    """Returns evenly spaced indices below `count`, including the first and the last."""
    if count <= wanted:
        return list(range(count))
    return [i * (count - 1) // (wanted - 1) for i in range(wanted)]


def find_key(name: str, keys: Iterable[str]) -> str | None:
    """Finds the checkpoint key that holds the weight `name`; None when no key does."""
    keys = list(keys)
    for wanted in (name, *ALIASES.get(name, ())):
        if wanted in keys:
            return wanted
        # at a "." boundary only: "norm.weight" must not find "input_layernorm.weight"
        matches = [key for key in keys if key.endswith(f".{wanted}") and not _is_inside_a_layer(key, wanted)]
        if matches:
            return min(matches, key=lambda key: (key.startswith("mtp."), len(key)))
    return None


def _is_inside_a_layer(key: str, wanted: str) -> bool:
    """Says whether a key is inside a numbered layer that `wanted` does not name: "norm.weight" means the final norm."""
    return any(part.isdigit() for part in key.split(".")) and not any(part.isdigit() for part in wanted.split("."))


def load_checkpoint(path: str | os.PathLike, **hub_kwargs: Any) -> dict[str, Tensor]:
    """Reads every tensor of a checkpoint directory or hub id. Raises `FileNotFoundError` when it has no weights."""
    return read_tensors(locate_tensors(path, **hub_kwargs))


def read_tensors(files: dict[str, Path]) -> dict[str, Tensor]:
    """Reads tensors, given the file of each key. Raises `ValueError` or `OSError` for a damaged file."""
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        keys = [key for key, where in files.items() if where == file]
        if file.suffix == GGUF:
            tensors |= read_gguf(file, keys)
            continue
        if file.suffix != ".safetensors":
            content = _read_pickle(file, "cpu")
            tensors.update({key: content[key] for key in keys if key in content})
            continue
        try:
            with safe_open(file, framework="pt") as reader:
                tensors.update({key: reader.get_tensor(key) for key in keys})
        except (SafetensorError, *WRONG_VALUE) as error:
            raise _damaged(file, error) from error
    return tensors


def read_scaled(key: str, scale_key: str, files: dict[str, Path]) -> Tensor:
    """Reads an FP8 weight and its scale, and returns the values that they stand for, in float32."""
    found = read_tensors({name: files[name] for name in (key, scale_key)})
    return rescaled(found[key], found[scale_key], found[key].shape)


def like_stored(files: dict[str, Path]) -> dict[str, Tensor]:
    """Returns tensors of the same shapes and types on the meta device, given the file of each key: no values are read.
    Raises as `read_tensors` does."""
    metas: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        keys = [key for key, where in files.items() if where == file]
        if file.suffix == GGUF:
            metas |= {key: torch.empty(gguf_shape(file, key), dtype=torch.float32, device="meta") for key in keys}
            continue
        found = _read_pickle(file, "meta") if file.suffix != ".safetensors" else read_tensors(dict.fromkeys(keys, file))
        metas.update({key: torch.empty_like(found[key], device="meta") for key in keys if key in found})
    return metas


def locate_tensors(path: str | os.PathLike, **hub_kwargs: Any) -> dict[str, Path]:
    """Returns tensor name -> its file, for the first kind of weights that the checkpoint has."""
    if os.path.isfile(path) and (gguf := gguf_file_of(path)) is not None:
        return dict.fromkeys(gguf_keys(gguf), gguf)
    for index_name, single_name in ((SAFETENSORS_INDEX, SAFETENSORS), (BIN_INDEX, BIN)):
        index = _fetch(path, index_name, **hub_kwargs)
        if index is not None:
            weight_map = read_index(index)
            shards = {shard: _fetch(path, shard, **hub_kwargs) for shard in set(weight_map.values())}
            missing = sorted(shard for shard, file in shards.items() if file is None)
            if missing:
                raise FileNotFoundError(f"'{path}' lists the files {missing} in {index_name} and does not have them")
            return {key: file for key, shard in weight_map.items() if (file := shards[shard]) is not None}
        single = _fetch(path, single_name, **hub_kwargs)
        if single is not None:
            return dict.fromkeys(_keys_of(single), single)
    for pattern in HEADS if os.path.isdir(path) else ():
        for single in sorted(Path(path).glob(pattern)):
            return dict.fromkeys(_keys_of(single), single)
    if (gguf := gguf_file_of(path)) is not None:
        return dict.fromkeys(gguf_keys(gguf), gguf)
    raise FileNotFoundError(
        f"'{path}' has no weights: neither {SAFETENSORS}, {BIN}, an index of them, a GGUF file nor one of {HEADS} "
        "is a file of it"
    )


def read_index(file: Path) -> dict[str, str]:
    """Reads tensor name -> shard's file name of an index. Raises `ValueError` for a damaged one, and for shards outside
    the checkpoint: an index that others wrote must not choose which other files are read."""
    weight_map = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{file} has no weight_map of tensor names to file names: fetch it again")
    suffixes = (".safetensors",) if file.name == SAFETENSORS_INDEX else (".bin", ".pt", ".pth")
    for shard in weight_map.values():
        parts = PurePosixPath(shard).parts
        if shard.startswith("/") or ".." in parts or "\\" in shard or "\0" in shard or ":" in shard:
            raise ValueError(f"{file} names the file {shard!r}, which is outside the checkpoint: it is not read")
        if not shard.endswith(suffixes):
            raise ValueError(f"{file} names the file {shard!r}; its shards end in {' or '.join(suffixes)}")
    return weight_map


def _fetch(path: str | os.PathLike, name: str, **hub_kwargs: Any) -> Path | None:
    if os.path.isdir(path):
        folder = Path(path) / hub_kwargs.get("subfolder", "")
        return folder / name if (folder / name).is_file() else None
    found = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return Path(found) if found else None


def _keys_of(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(_read_pickle(file, "meta"))
    try:
        with safe_open(file, framework="pt") as reader:
            return list(reader.keys())
    except (SafetensorError, *WRONG_VALUE) as error:
        raise _damaged(file, error) from error


def _read_pickle(file: Path, device: str) -> dict[str, Tensor]:
    """Reads the tensors of a pickle. Raises `ValueError` for one that holds anything else: unpickling would run it."""
    try:
        is_mappable = zipfile.is_zipfile(file)  # the format of torch 1.6 and later
        content = torch.load(file, map_location=device, weights_only=True, mmap=is_mappable)
    except (pickle.UnpicklingError, EOFError, *WRONG_VALUE, ValueError) as error:
        raise ValueError(
            f"'{file}' is damaged, or a pickle of more than tensors, which is not read because it can run any code: "
            "convert it to safetensors where you trust it, or fetch the checkpoint in that format"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"'{file}' holds more than tensors by name: convert it to safetensors where you trust it")
    return content


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"'{file}' cannot be read ({error}); it is incomplete or damaged, fetch it again")
