"""The drafter and its verifier: is it there, does it fit, and are the weights that were copied from it still its own.

Nothing of the verifier is loaded but config.json, some rows of its embedding and head, and its tokenizer.
Shapes: V verifier vocabulary, D draft vocabulary, H hidden size, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from speculators.checkpoint.findings import Finding, error, warning
from speculators.checkpoint.record import verifier_facts
from speculators.config import SpeculatorModelConfig
from speculators.deploy.tensor_check import MAP, is_near
from speculators.utils.files import looks_like_a_path
from speculators.utils.loading import Rows, spaced
from speculators.verifier.config import open_config, text_config
from speculators.verifier.loading import EMBEDDING, verifier_rows

WHERE = "speculators_config.verifier"
SAME_DIRECTION = 0.9
"""Least median cosine between copied rows and the verifier's: 1 up to rounding; about 0 for other rows."""


def verifier_config(name: str) -> tuple[PretrainedConfig | None, list[Finding]]:
    """Reads the verifier's config; None, with a finding, when it cannot be read from here."""
    fix = "write a hub id, or an absolute path that exists on the serving machine; or check with --verifier"
    if looks_like_a_path(name) and not (Path(name) / "config.json").is_file():
        return None, [
            error(
                "verifier-unreachable",
                f"{WHERE}.name_or_path",
                repr(name),
                "vLLM serves this model; it is not a directory with a config.json here",
                fix,
            )
        ]
    try:
        config = open_config(name)
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        return None, [error("verifier-unreachable", f"{WHERE}.name_or_path", repr(name), reason, fix)]
    relative = Path(name).is_dir() and not Path(name).is_absolute()
    found = [
        warning(
            "verifier-relative",
            f"{WHERE}.name_or_path",
            repr(name),
            "a relative path means another directory wherever the server is started",
            "write the absolute path",
        )
    ]
    return config, found if relative else []


def fit_findings(
    verifier: PretrainedConfig, config: SpeculatorModelConfig, layer_ids: Sequence[int]
) -> Iterator[Finding]:
    """Compares sizes, layers and class of the verifier with the drafter's `config`; it reads the layers `layer_ids`."""
    text = text_config(verifier)
    layers = getattr(config, "transformer_layer_config", config)
    fix = "use the verifier the drafter was trained for"
    for what, ours in (("hidden_size", getattr(layers, "hidden_size", None)), ("vocab_size", vocab_size_of(config))):
        theirs = getattr(text, what, None)
        if None not in (theirs, ours) and theirs != ours:
            code = f"verifier-{what.replace('_', '-')}"
            yield error(code, what, f"the drafter's is {ours}", f"the verifier's is {theirs}", fix)
    num_layers = getattr(text, "num_hidden_layers", None)
    if list(layer_ids) != sorted(set(layer_ids)):
        yield error(
            "aux-ids-order",
            "aux layer ids",
            str(list(layer_ids)),
            "vLLM sorts them and drops duplicates, and the columns of fc follow them",
            "write them in increasing order, as trained",
        )
    outside = [layer for layer in layer_ids if num_layers is not None and not 0 <= layer <= num_layers]
    if outside:
        yield error(
            "aux-ids-range",
            "aux layer ids",
            str(outside),
            f"the verifier has {num_layers} layers; ids count finished layers, so 0..{num_layers} are valid",
            "write the ids that the drafter was trained with",
        )
    recorded = config.speculators_config.verifier.architectures if config.speculators_config is not None else []
    actual = verifier.architectures or []
    if recorded and actual and recorded != actual:
        yield error("verifier-class", f"{WHERE}.architectures", str(recorded), f"the verifier is {actual}", fix)
    longest, drafted = getattr(text, "max_position_embeddings", None), getattr(layers, "max_position_embeddings", None)
    if longest and drafted and drafted < longest:
        yield warning(
            "positions-short",
            "max_position_embeddings",
            str(drafted),
            f"the verifier's is {longest}; vLLM raises it for EAGLE's methods only",
            "write the verifier's",
        )


def vocab_size_of(config: SpeculatorModelConfig) -> int | None:
    """Returns the verifier's vocabulary size by the drafter's config; None when the config has no such key."""
    return getattr(config, "target_vocab_size", None) or getattr(config, "vocab_size", None)


def copy_findings(
    tensors: Mapping[str, Tensor], copies: Mapping[str, str], verifier: str, origin: str | None
) -> Iterator[Finding]:
    """Compares copied rows with the verifier's rows of the same tokens.

    `origin` is the record's: after training here, heads are copies; after a conversion they may have been trained by
    themselves; None: unknown.
    """
    for name, theirs in copies.items():
        if name not in tensors or tensors[name].ndim != 2:
            continue
        rows_R, found = own_rows(tensors, name), None
        if rows_R is None or (found := rows_of_copied(theirs, verifier, rows_R)) is None:
            continue
        ours_RH = tensors[name][spaced(len(tensors[name]))]
        if found.rows.shape != ours_RH.shape:
            continue  # the sizes are compared elsewhere
        cosine = float(torch.cosine_similarity(ours_RH.float(), found.rows.float(), dim=1).median())
        is_head = name != EMBEDDING
        if cosine < SAME_DIRECTION and not (is_head and origin == "conversion"):
            is_surely_copy = not is_head or origin == "training"
            severity = error if is_surely_copy else warning
            yield severity(
                "head-rows-differ" if is_head else "embedding-differs",
                name,
                f"its rows differ from the verifier's rows of the same tokens (median cosine {cosine:.2f})",
                "they are copies of the verifier's" + (f", chosen by {MAP}" if is_head and MAP in tensors else ""),
                "use the verifier, tokenizer and vocabulary map of training"
                if is_surely_copy
                else "nothing, if the head was trained by itself",
            )


def weights_are_here(verifier: str) -> bool:
    """Says whether rows of the verifier can be read without a download of gigabytes."""
    return verifier_rows(EMBEDDING, verifier, [0]) is not None


def own_rows(tensors: Mapping[str, Tensor], name: str) -> list[int] | None:
    """Returns the verifier's row for each of our sampled rows; None when the map is not usable."""
    rows = spaced(len(tensors[name]))
    if name == EMBEDDING or MAP not in tensors:
        return rows
    if len(tensors[MAP]) != len(tensors[name]):
        return None
    return [i + int(tensors[MAP][i]) for i in rows]


def rows_of_copied(name: str, verifier: str, rows: list[int]) -> Rows | None:
    """None when they cannot be read. A tied head is stored as the embedding."""
    found = verifier_rows(name, verifier, rows)
    return found if found is not None else verifier_rows(EMBEDDING, verifier, rows)


def changed_verifier_findings(record: Mapping[str, Any], verifier: str) -> Iterator[Finding]:
    """Compares the verifier with the one in training, by tokenizer and by some rows of its weights."""
    trained, now = record.get("verifier"), verifier_facts(verifier)
    if trained is None:
        return
    fix = f"use the verifier of training ({trained['name_or_path']}), or train a drafter for this one"
    old, new = trained.get("tokenizer"), now.get("tokenizer")
    if old and new and old["sha256"] != new["sha256"]:
        yield error(
            "verifier-tokenizer",
            verifier,
            f"its tokenizer has {new['num_tokens']} tokens, with other ids",
            f"in training the tokenizer had {old['num_tokens']} tokens",
            fix,
        )
    for name, old in (trained.get("tensors") or {}).items():
        new = (now.get("tensors") or {}).get(name)
        if old and new and not same_rows(old, new):
            yield error(
                "verifier-differs",
                f"{verifier}: {name}",
                "not as in training",
                "the drafter learned from another verifier",
                fix,
            )


def same_rows(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if old["shape"] != new["shape"]:
        return False
    return old["sha256"] == new["sha256"] or is_near(old["sketch"], new["sketch"])
