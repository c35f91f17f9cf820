"""Checks the tensors: names, shapes, types, values, the map of the draft vocabulary, and changes since training.

Shapes: V verifier vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from speculators.checkpoint.findings import Finding, error, warning
from speculators.checkpoint.record import PLAIN_TYPES, RECORD_FILE, as_matrix, fingerprint, norm_of, sha256, sketch
from speculators.checkpoint.tensors import VALUES_AT_ONCE, values_of
from speculators.nn.draft_tokens import verifier_ids
from speculators.utils.loading import SAFETENSORS, SAFETENSORS_INDEX

MAP, KEPT = "d2t", "t2d"
ROUNDING = 0.05
"""Sketches nearer than this are of the same weights: rounding moves them by some 0.002, fp8 by 0.03."""
NORM_ROUNDING = 0.01
"""Norms nearer than this share are of the same weights."""
Likeness = Literal["same", "rounded", "near", "other"]
"""Of a tensor and a fingerprint. same: equal, or equal after one rounding. rounded: as near as rounding leaves it, and
no hash tells more. near: as near, but edited. other: other values."""
TENSOR_FIX = "take the tensor from where the checkpoint was trained"


def tensor_findings(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], shared: frozenset[str], *, is_served: bool
) -> Iterator[Finding]:
    """Compares tensors with those that config.json calls for; `shared` ones may be missing.

    `is_served`: the engine loads this very directory.
    """
    for name in sorted(expected.keys() - tensors.keys() - shared):
        served_as = "zeros: draft id i would stand for token i" if name == MAP else "whatever the memory holds"
        yield error(
            "tensor-missing",
            name,
            "not in the checkpoint",
            f"engines' loaders do not report it and serve {served_as}",
            "take the checkpoint from where it was saved, or export it again",
        )
    for name in sorted(tensors.keys() - expected.keys()):
        severity = error if is_served else warning
        yield severity(
            "tensor-unexpected",
            name,
            f"{shape_of(tensors[name])}, which this drafter does not have",
            "engines refuse names they do not know, or leave them out",
            "correct the option in config.json it is for, or let `speculators convert` leave out the verifier's own",
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
    if tensor.dtype not in PLAIN_TYPES.values():
        yield error(
            "tensor-type",
            name,
            type_of(tensor),
            f"weights are {', '.join(PLAIN_TYPES)}",
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
    """Reports stray weight files: without an index, engines load every safetensors file of a directory."""
    if (path / SAFETENSORS_INDEX).is_file():
        return
    for file in sorted(path.glob("*.safetensors")):
        if file.name != SAFETENSORS:
            yield error(
                "stray-weights",
                file.name,
                f"is in the same directory as {SAFETENSORS}",
                "engines load every *.safetensors of the directory, in no certain order",
                "move the file away, or export",
            )


def is_finite(tensor: Tensor) -> bool:
    """Says whether all values are finite; sums squares in blocks, many times faster than testing each value."""
    tensor = values_of(tensor)
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
        found = likeness(trained, tensors[name])
        if found in ("near", "other"):
            yield changed_tensor(name, trained, tensors[name], hidden, is_near=found == "near")
        elif found == "rounded" and trained["dtype"] == type_of(tensors[name]):
            rule = f"{RECORD_FILE} has their hash; rounding to a shorter type and back would leave them so"
            yield warning("tensor-edited", name, "nearly, not exactly, the trained values", rule, TENSOR_FIX)


def compared_by_sketch(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names the tensors of which a record of an earlier release says no more than that they are near."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    known = {name: trained for name, trained in record["tensors"].items() if name in floats}
    return [n for n, trained in known.items() if "rounded" not in trained and trained["dtype"] != type_of(floats[n])]


def changed_tensor(
    name: str, trained: Mapping[str, Any], tensor: Tensor, hidden: int | None, *, is_near: bool
) -> Finding:
    now = fingerprint(tensor, hidden)
    order = order_of(trained.get("chunks"), now.get("chunks"))
    if is_near:
        found, rule = (
            "nearly, not exactly, the trained values",
            "stored in any type, they have another hash than trained",
        )
    elif order is not None and order != sorted(order):
        found = f"its column chunks are in the order {order}"
        rule = f"it was trained in the order {sorted(order)}: each chunk reads one state of the verifier"
    else:
        found, rule = "not the trained values", "they have another hash and another sketch than in training"
        if trained.get("norm") and now.get("norm") is not None and are_near(trained["sketch"], now["sketch"]):
            found = f"{now['norm'] / trained['norm']:.3g} times the trained values"
    return error("tensor-changed", name, found, rule, TENSOR_FIX)


def likeness(trained: Mapping[str, Any], tensor: Tensor) -> Likeness:
    """Compares a tensor with the fingerprint of a trained one of its shape."""
    tensor = values_of(tensor)
    known = {trained["dtype"]: trained["sha256"], **(trained.get("rounded") or {})}
    own = type_of(tensor)
    types = PLAIN_TYPES if own in PLAIN_TYPES else {own: tensor.dtype}
    if any(name in known and holds(tensor, t) and sha256(tensor, t) == known[name] for name, t in types.items()):
        return "same"
    if "sketch" not in trained or not tensor.is_floating_point() or not tensor.numel():
        return "other"
    norm = trained.get("norm")
    is_as_large = norm is None or abs(norm_of(tensor) - norm) <= NORM_ROUNDING * norm
    if not is_as_large or not are_near(trained["sketch"], sketch(as_matrix(tensor))):
        return "other"
    if "rounded" in trained:
        return "near"
    shorter = [t for name, t in PLAIN_TYPES.items() if name not in (own, "float32")]
    return "rounded" if own != trained["dtype"] or any(holds(tensor, t) for t in shorter) else "near"


def holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether each value of a tensor is one of that type."""
    blocks = tensor.reshape(-1).split(VALUES_AT_ONCE)
    return tensor.dtype == dtype or all(torch.equal(block.to(dtype).to(tensor.dtype), block) for block in blocks)


def are_near(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < ROUNDING


def order_of(trained: Sequence[Any] | None, now: Sequence[Any] | None) -> list[int] | None:
    """Which trained chunk each chunk is; None unless they are all there."""
    if not trained or not now:
        return None
    order = [next((j for j, old in enumerate(trained) if are_near(old, new)), -1) for new in now]
    return order if sorted(order) == list(range(len(trained))) else None


def shape_of(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def type_of(tensor: Tensor) -> str:
    return short(tensor.dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
