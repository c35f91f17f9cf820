"""Reads quantised weights from their files, and names how a model is quantised.

Two kinds are read here: GGUF files (llama.cpp's format), and FP8 tensors with their scales (compressed-tensors,
transformers' `fp8`). Whole models of other formats are loaded by transformers.

    GGUF      name of a model: the file, or a directory whose only weights are one such file
    FP8       weight_RC = stored_RC * scale, one scale per tensor, per row [R, 1] or per block [R / b, C / b]

Shapes: R rows, C columns. GGUF names of the weights that a drafter or a fingerprint reads are given under transformers'
names; llama.cpp reorders the rows of q and k, which keep their own names.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speculators.utils.names import gguf_file_of

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

EXTRA = "pip install 'speculators[quantized]'"
PACKAGES = {
    "gguf": ("gguf", "accelerate"),
    "compressed-tensors": ("compressed_tensors", "accelerate"),
    "fp8": ("accelerate",),
    "mxfp8": ("accelerate",),
    "mxfp4": ("accelerate",),
}
"""Quantisation method -> modules without which transformers does not load it."""
OWN_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
}
LAYER_NAMES = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GAIN_STORED = ("gemma", "nemotron", "qwen3next", "qwen35")
"""Architectures (their beginnings) of which llama.cpp stores 1 + w, the gain itself, where transformers stores w."""
SCALES = ("weight_scale", "weight_scale_inv")
"""Of compressed-tensors; of transformers and DeepSeek, which multiply by it too."""
BLOCK = 128
"""Side of the usual block of scales."""


# -- GGUF --------------------------------------------------------------------------------------------------------------


def source(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the arguments by which transformers' `from_pretrained` finds a model of this name."""
    file = gguf_file_of(name)
    if file is None:
        return {"pretrained_model_name_or_path": os.fspath(name)}
    refuse_missing_packages("gguf", os.fspath(name))
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def tokenizer_source(name: str | os.PathLike[str]) -> dict[str, Any]:
    """The same for its tokenizer: the one beside a GGUF file, where there is one, else the file's own."""
    file = gguf_file_of(name)
    if file is not None and (file.parent / "tokenizer.json").is_file():
        return {"pretrained_model_name_or_path": str(file.parent)}
    return source(name)


def gguf_keys(file: Path) -> list[str]:
    return list(tensors_of(file))


def read_gguf(file: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Reads tensors in float32."""
    return {key: read_gguf_rows(file, key, None) for key in keys}


def gguf_shape(file: Path, key: str) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensors_of(file)[key].shape))


def read_gguf_rows(file: Path, key: str, rows: Sequence[int] | None) -> Tensor:
    """Reads some rows of a matrix (None: all), or a whole vector, in float32."""
    from gguf import dequantize

    stored, shape = tensors_of(file)[key], gguf_shape(file, key)
    is_part = rows is not None and len(shape) > 1
    data = stored.data[list(rows)] if is_part and rows is not None else stored.data
    weight = torch.from_numpy(dequantize(data, stored.tensor_type).copy()).float()
    weight = weight.reshape(-1 if is_part else shape[0], *shape[1:])
    is_gain = key.endswith("norm.weight") and architecture_of(file).startswith(GAIN_STORED)
    return weight - 1 if is_gain else weight


def tensors_of(file: Path) -> dict[str, ReaderTensor]:
    return {transformers_name(tensor.name): tensor for tensor in reader_of(file).tensors}


def transformers_name(key: str) -> str:
    parts = key.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return OWN_NAMES.get(key, key)


def architecture_of(file: Path) -> str:
    field = reader_of(file).fields.get("general.architecture")
    return "" if field is None else str(field.contents())


def gguf_type(file: Path) -> str:
    """Names the type that holds most bytes of the matrices, such as Q4_K."""
    num_bytes: Counter[str] = Counter()
    for tensor in reader_of(file).tensors:
        if len(tensor.shape) > 1:
            num_bytes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return num_bytes.most_common(1)[0][0] if num_bytes else "F32"


def reader_of(file: Path) -> GGUFReader:
    """Opens a file. Raises `ValueError` for one that is damaged, or one part of several."""
    refuse_missing_packages("gguf", str(file))
    state = file.stat()
    reader = opened(str(file), state.st_mtime_ns, state.st_size)
    split = reader.fields.get("split.count")
    if split is not None and int(split.contents()) > 1:
        raise ValueError(
            f"{file} is one of {int(split.contents())} parts of a model; merge them first: llama-gguf-split --merge"
        )
    return reader


@lru_cache(maxsize=2)  # two seconds for a vocabulary of 50,000
def opened(file: str, modified_ns: int, num_bytes: int) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{file} cannot be read as GGUF ({error}); it is incomplete or damaged, fetch it again"
        ) from error


# -- FP8 ---------------------------------------------------------------------------------------------------------------


def is_scaled(weight: Tensor) -> bool:
    """Whether these are values that mean nothing without their scale."""
    return weight.is_floating_point() and weight.dtype.itemsize == 1


def scale_key_of(key: str, keys: Iterable[str]) -> str | None:
    """Names the scale of a weight; None when it has none."""
    stem = key.removesuffix("weight")
    return next((stem + name for name in SCALES if stem + name in keys), None)


def rescaled(stored_RC: Tensor, scale: Tensor, shape: Sequence[int], rows: Sequence[int] | None = None) -> Tensor:
    """Returns the weights that FP8 values stand for, in float32.

    `shape`: of the whole tensor; `rows`: which of its rows `stored_RC` holds (None: all)."""
    scale = scale.float()
    if scale.numel() > 1:
        scale = scale[:, None] if scale.ndim == 1 else scale
        index_R = torch.arange(shape[0]) if rows is None else torch.tensor(list(rows))
        index_C = torch.arange(shape[1])
        row_block, column_block = (block_side(shape[axis], scale.shape[axis]) for axis in (0, 1))
        scale = scale[index_R // row_block][:, index_C // column_block]
    return stored_RC.float() * (scale if scale.numel() > 1 else scale.reshape(()))


def block_side(size: int, num_blocks: int) -> int:
    usual = -(-size // BLOCK) == num_blocks
    return BLOCK if usual else -(-size // num_blocks)


# -- weights that were rounded and stored as plain floating point -----------------------------------------------------

NEIGHBOURS, MOST_DISTINCT, ROWS_READ = 16, 12.0, 64
"""Of 16 neighbours in a row, about 9 values differ on a grid of 4 bits, 15 to 16 on one of 8 bits and in bfloat16."""


def is_on_grid(weight: Tensor) -> bool:
    """Whether the values of a matrix were rounded to 4 bits or fewer, in groups of neighbours in a row: so many of them
    are equal then. Groups of columns in another order (GPTQ's `desc_act`) are not seen, and vectors are not rounded."""
    if weight.dim() < 2:
        return False
    rows_RC = weight.detach().flatten(0, -2)[:ROWS_READ].float()
    groups = rows_RC[:, : rows_RC.shape[1] // NEIGHBOURS * NEIGHBOURS].reshape(-1, NEIGHBOURS).sort(-1).values
    num_distinct = 1 + (groups.diff(dim=-1) != 0).sum(-1).float()
    return bool(len(groups)) and 1 < float(num_distinct.mean()) < MOST_DISTINCT


# -- how a model is quantised ------------------------------------------------------------------------------------------


def quantization_of(name: str, config: Any) -> str | None:
    """Names how the weights of a model are stored, such as "gguf Q4_K" or "compressed-tensors float8 weights"; None for
    plain floating point. `config`: the model's, of any part of it."""
    file = gguf_file_of(name)
    if file is not None:
        return None if (kind := gguf_type(file)) in ("F32", "F16", "BF16") else f"gguf {kind}"
    settings = settings_of(config)
    if not settings:
        return None
    method = method_of(settings)
    kinds = sorted({described(group) for group in groups_of(settings)} - {""})
    bits = settings.get("bits") or settings.get("num_bits")
    return " ".join([method, *([f"{bits} bits"] if bits and not kinds else []), *kinds])


def settings_of(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None)
    if found is not None and not isinstance(found, Mapping):
        found = found.to_dict()
    return dict(found or {})


def method_of(settings: Mapping[str, Any]) -> str:
    return str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))


def groups_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def described(group: Mapping[str, Any]) -> str:
    """Describes a group of compressed-tensors' scheme: "float8 weights", "int4 weights, int8 activations"."""
    parts = [(group.get("weights"), "weights"), (group.get("input_activations"), "activations")]
    known = [(values, what) for values, what in parts if isinstance(values, Mapping)]
    return ", ".join(f"{values.get('type')}{values.get('num_bits')} {what}" for values, what in known)


def refuse_missing_packages(method: str, name: str) -> None:
    """Raises `ValueError` when packages are missing without which a model of that method is not loaded."""
    missing = [module for module in PACKAGES.get(method, ()) if find_spec(module) is None]
    if missing:
        packages = " and ".join(module.replace("_", "-") for module in missing)
        raise ValueError(f"{name!r} is quantised ({method}), and reading it needs {packages}: {EXTRA}")
