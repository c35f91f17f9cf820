"""Writes and reads `training_record.json`, by which later edits of a checkpoint are detected.

    config      every value of config.json that affects the computation, flat: "transformer_layer_config.head_dim"
    rope        the factor on cos and sin, and the frequencies, by transformers' reading of that config
    tensors     a fingerprint of each tensor on disk
    num_speculative_tokens      draft tokens per round
    verifier    sizes, tokenizer, quantisation and some rows of embedding, head and layers of the one it learned from

A fingerprint has hashes, of the tensor and of what rounding to each other type makes of it (exact), its norm |W|, and a
sketch, which says how far two tensors are apart when neither hash fits: for fixed random signs s and t,

    sketch = s' W t / |W|          about N(0, 1) for unrelated weights; rounding to bf16 moves it by some 0.002

Matrices whose columns read several states of the verifier side by side also have a sketch for each of these chunks.
Records of earlier releases have neither `rope` nor norms, hashes of rounded tensors or the quantisation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from speculators.checkpoint.formats import dtype_name
from speculators.checkpoint.tensors import VALUES_AT_ONCE, bytes_of, stored_tensors, values_of
from speculators.config import SpeculatorModelConfig, installed_version
from speculators.nn.rope import rope_numbers
from speculators.utils.files import atomic_write, read_json_object
from speculators.verifier.config import open_config, precision_of, text_config
from speculators.verifier.loading import layer_matrices, tokenizer_facts, verifier_rows

RECORD_FILE = "training_record.json"
RECORD_VERSION = 1
Origin = Literal["training", "conversion"]
"""Who wrote the checkpoint. After a conversion, nothing is known about its training."""
NUM_SKETCHES = 4
ROWS_AT_ONCE = 1024
"""Rows per block: a block of fp32 then stays in the processor's cache."""
MAX_CHUNKS = 64
PLAIN_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that weights are stored in."""

# Keys of config.json that do not affect what is computed from given weights.
NOT_COMPUTED = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "speculators_config",
    "speculators_version",
    "tie_word_embeddings",
}
NOT_COMPUTED_BY_LAYERS = NOT_COMPUTED | {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "pad_token_id",
    "pretraining_tp",
    "use_cache",
}
LAYERS = "transformer_layer_config"
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
VERIFIER_TENSORS = ("embed_tokens.weight", "lm_head.weight", "model.norm.weight")
VERIFIER_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "model_type")
NUM_LAYER_TENSORS = 6
"""Matrices of a verifier's layers of which some rows are recorded: a fine-tuned one may keep its embedding."""


def write_training_record(
    directory: str | Path, training_keys: frozenset[str] = frozenset(), *, origin: Origin = "training"
) -> Path:
    """Describes the checkpoint that `directory` now holds; returns the file.

    `training_keys`: top-level keys of config.json that only training reads.
    """
    directory = Path(directory)
    values = json.loads((directory / "config.json").read_text())
    hidden_size = hidden_size_of(values)
    record = {
        "record_version": RECORD_VERSION,
        "origin": origin,
        "speculators_version": installed_version(),
        "speculators_model_type": values.get("speculators_model_type"),
        "config": {key: value for key, value in computed_config(values).items() if key not in training_keys},
        "rope": recorded_rope(values),
        "tensors": {name: fingerprint(t, hidden_size) for name, t in sorted(stored_tensors(directory).items())},
        "num_speculative_tokens": recorded_num_tokens(values),
        "verifier": recorded_verifier(values),
    }
    file = directory / RECORD_FILE
    with atomic_write(file) as writer:
        writer.write(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return file


def read_training_record(directory: str | Path) -> dict[str, Any] | None:
    """Reads the record; None when the checkpoint was not trained or converted here.

    Raises `ValueError` for a record of another version.
    """
    file = Path(directory) / RECORD_FILE
    if not file.is_file():
        return None
    record = read_json_object(file, "delete it, or take it from where the checkpoint was trained")
    if record.get("record_version") != RECORD_VERSION:
        raise ValueError(f"{file} has version {record.get('record_version')}; this release reads {RECORD_VERSION}")
    if not is_record(record):
        raise ValueError(f"{file} is damaged: take it from where the checkpoint was trained, or delete it")
    return record


def is_record(values: Mapping[str, Any]) -> bool:
    """Says whether every part that is read later has the type in which it was written."""
    verifier, num_tokens = values.get("verifier"), values.get("num_speculative_tokens")
    if not isinstance(values.get("config"), dict) or not isinstance(values.get("tensors"), dict):
        return False
    verifier = {} if verifier is None else verifier
    if not isinstance(verifier, dict) or not (num_tokens is None or (type(num_tokens) is int and num_tokens > 0)):
        return False
    rows, tokenizer = verifier.get("tensors") or {}, verifier.get("tokenizer")
    names = (verifier.get("name_or_path"), verifier.get("quantization") or "")
    is_named = not verifier or all(isinstance(name, str) for name in names)
    is_tokenizer = not tokenizer or (isinstance(tokenizer, dict) and {"sha256", "num_tokens"} <= tokenizer.keys())
    if not (is_named and is_tokenizer and isinstance(rows, dict)):
        return False
    if not (isinstance(rope := values.get("rope") or [], list) and all(map(is_number, rope))):
        return False
    fingerprints = [*values["tensors"].values(), *(found for found in rows.values() if found is not None)]
    return all(map(is_fingerprint, fingerprints))


def is_number(value: Any) -> bool:
    return isinstance(value, float | int) and abs(value) < 1e30


def is_fingerprint(values: Any) -> bool:
    if not isinstance(values, dict) or not {"shape", "dtype", "sha256"} <= values.keys():
        return False
    chunks, rounded, norm = values.get("chunks") or [], values.get("rounded") or {}, values.get("norm")
    is_typed = all(isinstance(values[key], kind) for key, kind in (("dtype", str), ("sha256", str), ("shape", list)))
    if not is_typed or not isinstance(rounded, dict) or not (norm is None or is_number(norm)):
        return False
    sketches = [*(chunks if isinstance(chunks, list) else [None]), *([values["sketch"]] if "sketch" in values else [])]
    return all(isinstance(s, list) and len(s) == NUM_SKETCHES and all(map(is_number, s)) for s in sketches)


# -- config ------------------------------------------------------------------------------------------------------------


def computed_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that affect the computation, by dotted key, with rope in one spelling."""
    layers = values.get(LAYERS)
    top = {key: value for key, value in values.items() if key not in NOT_COMPUTED and key != LAYERS}
    flat = flattened(top)
    if isinstance(layers, Mapping):
        kept = {key: v for key, v in layers.items() if key not in NOT_COMPUTED_BY_LAYERS and key not in ROPE_KEYS}
        flat |= flattened({**kept, "rope_parameters": rope_of(layers)}, LAYERS + ".")
    return flat


def rope_of(layers: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers reads it: the older `rope_scaling` replaces `rope_parameters`, and what is inside wins over what
    stands beside."""
    given = layers.get("rope_scaling") or layers.get("rope_parameters")
    found = dict(given) if isinstance(given, Mapping) else {}
    if any(isinstance(value, Mapping) for value in found.values()):
        return found  # one set per kind of layer
    for key in ("rope_theta", "partial_rotary_factor"):
        if key not in found and layers.get(key) is not None:
            found[key] = layers[key]
    found["rope_type"] = found.pop("type", None) or found.get("rope_type") or "default"
    return found


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def hidden_size_of(values: Mapping[str, Any]) -> int | None:
    layers = values.get(LAYERS)
    found = (layers.get("hidden_size") if isinstance(layers, Mapping) else None) or values.get("hidden_size")
    return found if type(found) is int and found > 0 else None


def recorded_rope(values: Mapping[str, Any]) -> list[float] | None:
    layers = values.get(LAYERS)
    kind = SpeculatorModelConfig.default_transformer_model_type
    return rope_numbers(layers, kind) if isinstance(layers, Mapping) else None


def recorded_num_tokens(values: Mapping[str, Any]) -> int | None:
    methods = (values.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return methods[0].get("speculative_tokens")


# -- tensors -----------------------------------------------------------------------------------------------------------


def fingerprint(tensor: Tensor, chunk_width: int | None = None) -> dict[str, Any]:
    """Describes a tensor by shape, type and hash; floats also by norm, sketch, the hashes of the tensor rounded to
    other types, and a sketch per `chunk_width` columns."""
    tensor, own_type = values_of(tensor), dtype_name(tensor.dtype)
    found: dict[str, Any] = {"shape": list(tensor.shape), "dtype": own_type, "sha256": sha256(tensor)}
    if tensor.is_floating_point() and tensor.numel():
        matrix = as_matrix(tensor)
        found["sketch"] = sketch(matrix)
        found["norm"] = norm if is_number(norm := norm_of(tensor)) else None
        shorter = [name for name in PLAIN_TYPES if name not in (own_type, "float32")]  # float32 changes neither of them
        found["rounded"] = {name: sha256(tensor, PLAIN_TYPES[name]) for name in shorter}
        if tensor.ndim == 2 and chunk_width and is_chunked(matrix.shape[1], chunk_width):
            found["chunks"] = [sketch(chunk) for chunk in matrix.split(chunk_width, dim=1)]
    return found


def norm_of(tensor: Tensor) -> float:
    blocks = (block.double() for block in tensor.reshape(-1).split(VALUES_AT_ONCE))
    return sum(float(torch.dot(block, block)) for block in blocks) ** 0.5


def is_chunked(width: int, chunk_width: int) -> bool:
    return width % chunk_width == 0 and 1 < width // chunk_width <= MAX_CHUNKS


def sha256(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """Hashes the stored bytes; `dtype`: those of the tensor rounded to it."""
    digest = hashlib.sha256()
    for block in bytes_of(tensor, dtype):
        digest.update(block)
    return digest.hexdigest()


def as_matrix(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor[None] if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)


def sketch(matrix_RC: Tensor) -> list[float]:
    num_rows, num_columns = matrix_RC.shape
    rows_RK, columns_CK = signs(num_rows, 1), signs(num_columns, 2)
    total_K, square = torch.zeros(NUM_SKETCHES, dtype=torch.float64), 0.0
    for start in range(0, num_rows, ROWS_AT_ONCE):
        block = matrix_RC[start : start + ROWS_AT_ONCE].float()
        total_K += ((block @ columns_CK) * rows_RK[start : start + ROWS_AT_ONCE]).sum(0).double()
        square += float(torch.dot(block.flatten(), block.flatten()))
    return [round(float(value) / square**0.5, 6) if square else 0.0 for value in total_K]


@lru_cache(maxsize=32)
def signs(count: int, salt: int) -> Tensor:
    """Draws signs [count, NUM_SKETCHES] from numpy's old generator, which numpy promises never to change."""
    drawn = np.random.RandomState(salt).randint(0, 2, size=(NUM_SKETCHES, count))
    return torch.from_numpy(drawn.T * 2 - 1).float()


# -- verifier ----------------------------------------------------------------------------------------------------------


def recorded_verifier(values: Mapping[str, Any]) -> dict[str, Any] | None:
    recorded = values.get("speculators_config") or {}
    name = (recorded.get("verifier") or {}).get("name_or_path")
    return None if name is None else verifier_facts(name)


@lru_cache(maxsize=4)
def verifier_facts(name: str) -> dict[str, Any]:
    """Describes a verifier without loading it: sizes, tokenizer, some rows. Facts that cannot be read here are null."""
    facts: dict[str, Any] = {"name_or_path": name, "tokenizer": tokenizer_facts(name)}
    try:
        config = open_config(name)
    except (OSError, ValueError):
        return facts
    facts |= {key: getattr(text_config(config), key, None) for key in VERIFIER_SIZES}
    facts["quantization"] = precision_of(name, config)
    names = (*VERIFIER_TENSORS, *layer_matrices(name, NUM_LAYER_TENSORS))
    facts["tensors"] = {tensor: rows_fingerprint(tensor, name) for tensor in names}
    return facts


def rows_fingerprint(tensor: str, verifier: str) -> dict[str, Any] | None:
    """Fingerprints some rows of a tensor; None when they cannot be read here."""
    found = verifier_rows(tensor, verifier)
    return None if found is None else {**fingerprint(found.rows), "shape": list(found.shape)}
