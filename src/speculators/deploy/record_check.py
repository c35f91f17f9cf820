"""The checkpoint against the record of what it was trained with: every later edit or mix-up has a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from speculators.checkpoint.findings import Finding, error, warning
from speculators.checkpoint.record import LAYERS, RECORD_FILE, computed_config, fingerprint, verifier_facts

ROUNDING = 0.05
"""Sketches nearer than this are of the same weights: rounding moves them by some 0.002, fp8 by 0.03."""
CONFIG_MEND = "write the value back, or take config.json from where the checkpoint was trained"
TENSOR_MEND = "take the tensor from where the checkpoint was trained"


def config_findings(
    record: Mapping[str, Any], values: Mapping[str, Any], training_keys: frozenset[str], *, is_ours: bool
) -> Iterator[Finding]:
    """`is_ours`: config.json is in our format, so that a key that is gone or new says something."""
    trained, now = record["config"], computed_config(values)
    for key in sorted(trained.keys() - training_keys):
        if key not in now and is_ours:
            yield error(
                "config-changed", key, "not in config.json", f"it was {trained[key]!r} in training", CONFIG_MEND
            )
        elif key in now and now[key] != trained[key]:
            yield error("config-changed", key, repr(now[key]), f"it was {trained[key]!r} in training", CONFIG_MEND)
    for key in sorted(now.keys() - trained.keys()):
        if is_ours and key.startswith(LAYERS):
            yield error(
                "config-added",
                key,
                repr(now[key]),
                "it was not there in training, and engines read it",
                "remove the key, or take config.json from where the checkpoint was trained",
            )


def tensor_findings(record: Mapping[str, Any], tensors: Mapping[str, Tensor], hidden: int | None) -> Iterator[Finding]:
    for name, trained in sorted(record["tensors"].items()):
        if name not in tensors or list(tensors[name].shape) != trained["shape"]:
            continue  # missing tensors and shapes are looked at elsewhere
        now = fingerprint(tensors[name], hidden)
        if now["sha256"] != trained["sha256"]:
            yield from changed(name, trained, now)


def changed(name: str, trained: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Finding]:
    if "sketch" in trained and "sketch" in now and is_near(trained["sketch"], now["sketch"]):
        if trained["dtype"] == now["dtype"]:
            yield warning(
                "tensor-edited",
                name,
                "nearly, not exactly, the trained values",
                f"{RECORD_FILE} has their hash",
                TENSOR_MEND,
            )
        return  # stored in another type
    order = order_of(trained.get("chunks"), now.get("chunks"))
    found = "not the trained values" if order is None else f"its column chunks are in the order {order}"
    rule = "they have another hash and another sketch than in training"
    if order is not None:
        rule = f"it was trained in the order {sorted(order)}: each chunk reads one state of the verifier"
    yield error("tensor-changed", name, found, rule, TENSOR_MEND)


def order_of(trained: Sequence[Any] | None, now: Sequence[Any] | None) -> list[int] | None:
    """Which trained chunk each chunk is; None unless they are all there."""
    if not trained or not now:
        return None
    order = [next((j for j, old in enumerate(trained) if is_near(old, new)), -1) for new in now]
    return order if sorted(order) == list(range(len(trained))) else None


def is_near(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < ROUNDING


def verifier_findings(record: Mapping[str, Any], verifier: str) -> Iterator[Finding]:
    """The verifier now against the one in training, by tokenizer and by some rows."""
    trained, now = record.get("verifier"), verifier_facts(verifier)
    if trained is None:
        return
    mend = f"use the verifier of training ({trained['name_or_path']}), or train a drafter for this one"
    old, new = trained.get("tokenizer"), now.get("tokenizer")
    if old and new and old["sha256"] != new["sha256"]:
        yield error(
            "verifier-tokenizer",
            verifier,
            f"its tokenizer has {new['num_tokens']} tokens, and gives them other ids",
            f"in training the tokenizer had {old['num_tokens']} tokens",
            mend,
        )
    for name, old in (trained.get("tensors") or {}).items():
        new = (now.get("tensors") or {}).get(name)
        if old and new and not same_rows(old, new):
            yield error(
                "verifier-differs",
                f"{verifier}: {name}",
                "not as in training",
                "the drafter learned from another verifier",
                mend,
            )


def same_rows(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if old["shape"] != new["shape"]:
        return False
    return old["sha256"] == new["sha256"] or is_near(old["sketch"], new["sketch"])
