"""Checks the tensors: names, shapes, types, values, the map of the draft vocabulary, and changes since training.

Shapes: V verifier vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculators.checkpoint.findings import Finding, error, warning
from speculators.checkpoint.record import RECORD_FILE, fingerprint
from speculators.nn.draft_tokens import verifier_ids
from speculators.utils.loading import SAFETENSORS, SAFETENSORS_INDEX

PLAIN_TYPES = (torch.float32, torch.float16, torch.bfloat16)
MAP, KEPT = "d2t", "t2d"
VALUES_AT_ONCE = 1 << 22
ROUNDING = 0.05
"""Sketches nearer than this are of the same weights: rounding moves them by some 0.002, fp8 by 0.03."""
TENSOR_FIX = "take the tensor from where the checkpoint was trained"


def tensor_findings(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], shared: frozenset[str], *, is_served: bool
) -> Iterator[Finding]:
    """Compares tensors with those that config.json calls for; `shared` ones may be missing.

    `is_served`: vLLM loads this very directory, and refuses names that it does not know.
    """
    for name in sorted(expected.keys() - tensors.keys() - shared):
        served_as = "zeros: draft id i would stand for token i" if name == MAP else "whatever the memory holds"
        yield error(
            "tensor-missing",
            name,
            "not in the checkpoint",
            f"vLLM's loaders do not report it and serve {served_as}",
            "take the checkpoint from where it was saved, or export it again",
        )
    for name in sorted(tensors.keys() - expected.keys()):
        severity = error if is_served else warning
        yield severity(
            "tensor-unexpected",
            name,
            f"{shape_of(tensors[name])}, which this drafter does not have",
            "vLLM refuses names it does not know",
            "remove the tensor, or correct the option in config.json it is for",
        )
    for name in sorted(tensors.keys() & expected.keys()):
        yield from single_tensor_findings(name, tensors[name], expected[name])


def single_tensor_findings(name: str, tensor: Tensor, expected: Tensor) -> Iterator[Finding]:
    if tensor.shape != expected.shape:
        yield error(
            "tensor-shape",
            name,
            shape_of(tensor),
            f"config.json calls for {shape_of(expected)}",
            "correct config.json, or take the tensor of this drafter",
        )
    if not expected.is_floating_point():
        if tensor.dtype != expected.dtype:
            kind = type_of(expected)
            yield error("tensor-type", name, type_of(tensor), f"it must be {kind}", f"store it as {kind}")
        return
    if tensor.dtype not in PLAIN_TYPES:
        yield error(
            "tensor-type",
            name,
            type_of(tensor),
            f"weights are {', '.join(map(short, PLAIN_TYPES))}",
            "export with --dtype bfloat16",
        )
    elif not is_finite(tensor):
        yield error(
            "not-finite",
            name,
            f"{int((~torch.isfinite(tensor)).sum())} values are NaN or infinite",
            "a weight that was never loaded is NaN",
            "save the drafter again after load_verifier_weights",
        )


def file_findings(path: Path) -> Iterator[Finding]:
    """Reports stray weight files: without an index, vLLM loads every safetensors file of a directory."""
    if (path / SAFETENSORS_INDEX).is_file():
        return
    for file in sorted(path.glob("*.safetensors")):
        if file.name != SAFETENSORS:
            yield error(
                "stray-weights",
                file.name,
                f"is in the same directory as {SAFETENSORS}",
                "vLLM loads every *.safetensors of the directory, in no certain order",
                "move the file away, or export",
            )


def is_finite(tensor: Tensor) -> bool:
    """Says whether all values are finite; sums squares in blocks, many times faster than testing each value."""
    blocks = (block.float() for block in tensor.reshape(-1).split(VALUES_AT_ONCE))
    return all(bool(torch.isfinite(torch.dot(block, block))) for block in blocks) or bool(torch.isfinite(tensor).all())


def dtype_findings(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    stored = sorted({short(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()})
    written = values.get("dtype") or values.get("torch_dtype")
    if written is not None and stored and [written] != stored:
        yield warning(
            "dtype-differs", "dtype", repr(written), f"the tensors are {', '.join(stored)}", f"write {stored[0]!r}"
        )


def map_findings(tensors: Mapping[str, Tensor], vocab_size: int) -> Iterator[Finding]:
    """Checks that d2t [D] holds offsets to strictly increasing tokens, and that t2d [V] marks the same tokens."""
    d2t_D, t2d_V = tensors[MAP], tensors[KEPT]
    fix = "take d2t and t2d from the same vocabulary mapping the drafter was trained with"
    targets_D = verifier_ids(d2t_D)
    outside = int(((targets_D < 0) | (targets_D >= vocab_size)).sum())
    if outside:
        yield error(
            "map-out-of-range",
            MAP,
            f"{outside} draft ids stand for tokens outside 0..{vocab_size - 1}",
            "token = draft id + d2t[draft id] must be a token of the verifier",
            fix,
        )
        return
    if not bool((targets_D[1:] > targets_D[:-1]).all()):
        yield error(
            "map-not-increasing",
            MAP,
            "two draft ids stand for the same token, or out of order",
            "d2t holds offsets to strictly increasing tokens (a list of tokens is not a list of offsets)",
            fix,
        )
        return
    if t2d_V.shape != (vocab_size,):  # reported with the other shapes; a damaged config may name any number
        return
    kept_V = torch.zeros(vocab_size, dtype=torch.bool)
    kept_V[targets_D] = True
    if not torch.equal(kept_V, t2d_V.bool()):
        yield error(
            "map-inconsistent",
            f"{MAP}, {KEPT}",
            f"they disagree on {int((kept_V ^ t2d_V.bool()).sum())} tokens",
            "t2d marks the tokens that d2t reaches",
            fix,
        )


def changed_tensor_findings(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], hidden: int | None
) -> Iterator[Finding]:
    for name, trained in sorted(record["tensors"].items()):
        if name not in tensors or list(tensors[name].shape) != trained["shape"]:
            continue  # missing tensors and shapes are looked at elsewhere
        now = fingerprint(tensors[name], hidden)
        if now["sha256"] != trained["sha256"]:
            yield from changed_tensor(name, trained, now)


def changed_tensor(name: str, trained: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Finding]:
    if "sketch" in trained and "sketch" in now and is_near(trained["sketch"], now["sketch"]):
        if trained["dtype"] == now["dtype"]:
            yield warning(
                "tensor-edited",
                name,
                "nearly, not exactly, the trained values",
                f"{RECORD_FILE} has their hash",
                TENSOR_FIX,
            )
        return  # stored in another type
    order = order_of(trained.get("chunks"), now.get("chunks"))
    found = "not the trained values" if order is None else f"its column chunks are in the order {order}"
    rule = "they have another hash and another sketch than in training"
    if order is not None:
        rule = f"it was trained in the order {sorted(order)}: each chunk reads one state of the verifier"
    yield error("tensor-changed", name, found, rule, TENSOR_FIX)


def order_of(trained: Sequence[Any] | None, now: Sequence[Any] | None) -> list[int] | None:
    """Which trained chunk each chunk is; None unless they are all there."""
    if not trained or not now:
        return None
    order = [next((j for j, old in enumerate(trained) if is_near(old, new)), -1) for new in now]
    return order if sorted(order) == list(range(len(trained))) else None


def is_near(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < ROUNDING


def shape_of(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def type_of(tensor: Tensor) -> str:
    return short(tensor.dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
