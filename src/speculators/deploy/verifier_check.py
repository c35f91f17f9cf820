"""The drafter and its verifier: is it there, does it fit, and are the weights that were copied from it still its own.

Nothing of the verifier is loaded but config.json, some rows of its embedding and head, and its tokenizer
(`deep_check` loads it).
Shapes: V verifier vocabulary, D draft vocabulary, H hidden size, R sampled rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from speculators.checkpoint.findings import Finding, error, warning
from speculators.checkpoint.record import PLAIN_TYPES, VERIFIER_TENSORS, as_matrix, norm_of, sketch, verifier_facts
from speculators.config import SpeculatorModelConfig
from speculators.deploy.tensor_check import MAP, likeness
from speculators.utils.loading import Rows, spaced
from speculators.utils.names import has_model, looks_like_a_path
from speculators.utils.quantized import is_on_grid
from speculators.verifier.config import open_config, text_config
from speculators.verifier.loading import EMBEDDING, verifier_rows

WHERE = "speculators_config.verifier"
SAME_DIRECTION, SURELY_COPIED = 0.9, 0.999
"""Least cosine between copied rows and the verifier's (1 up to rounding; about 0 for other rows), and a median that
heads which were trained by themselves do not have."""
SAME_SCALE = 0.02
OTHER_PRECISION, OTHER_PRECISION_NORM = 1.0, 0.2
"""Sketches nearer than this, and norms nearer than this share, may be of the same weights: two bits move a sketch by
some 0.3."""
UNSAID = "rounded to 4 bits or fewer (neighbours in a row are equal), which its files do not say"
SHIFTS = (-1, 1, -2, 2)
"""Rows beside, which are looked at where a head's rows are not the verifier's."""
DAMAGED = "take the weights from where they were made; start a training run that diverged again, with a smaller --lr"


def verifier_config(name: str) -> tuple[PretrainedConfig | None, list[Finding]]:
    """Reads the verifier's config; None, with a finding, when it cannot be read from here."""
    where = f"{WHERE}.name_or_path"
    fix = "write a hub id, or an absolute path that exists on the serving machine; or check with --verifier"
    if looks_like_a_path(name) and not has_model(name):
        rule = "engines serve this model; it is not a directory with a config.json here, nor a GGUF file"
        return None, [error("verifier-unreachable", where, repr(name), rule, fix)]
    try:
        config = open_config(name)
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        return None, [error("verifier-unreachable", where, repr(name), reason, fix)]
    if not os.path.exists(name) or Path(name).is_absolute():
        return config, []
    rule = "a relative path means another directory wherever the server is started"
    return config, [warning("verifier-relative", where, repr(name), rule, "write the absolute path")]


def fit_findings(
    verifier: PretrainedConfig, config: SpeculatorModelConfig, layer_ids: Sequence[int], *, same_tokenizer: bool
) -> Iterator[Finding]:
    """Compares sizes, layers and class of the verifier with the drafter's `config`; it reads the layers `layer_ids`."""
    text = text_config(verifier)
    layers = getattr(config, "transformer_layer_config", config)
    fix = "use the verifier the drafter was trained for"
    width = getattr(config, "target_hidden_size", None) or getattr(layers, "hidden_size", None)
    for what, ours in (("hidden_size", width), ("vocab_size", vocab_size_of(config))):
        theirs = getattr(text, what, None)
        if None not in (theirs, ours) and theirs != ours:
            code, rule = f"verifier-{what.replace('_', '-')}", f"the verifier's is {theirs}"
            if what == "vocab_size" and same_tokenizer:
                rule += "; the tokenizer is the same, the tables are padded to different numbers of rows"
            yield error(code, what, f"the drafter's is {ours}", rule, fix)
    num_layers = getattr(text, "num_hidden_layers", None)
    if list(layer_ids) != sorted(set(layer_ids)):
        yield error(
            "aux-ids-order",
            "aux layer ids",
            str(list(layer_ids)),
            "engines sort them and drop duplicates, and the columns of fc follow them",
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
        cosine_R, scale = compared_rows(ours_RH, found.rows)
        is_head = name != EMBEDDING
        code = "head-rows-differ" if is_head else "embedding-differs"
        rule = "they are copies of the verifier's" + (f", chosen by {MAP}" if is_head and MAP in tensors else "")
        fix = "use the verifier, tokenizer and vocabulary map of training"
        median, num_other = float(cosine_R.median()), int((cosine_R < SAME_DIRECTION).sum())
        is_surely_copy = not is_head or origin == "training" or median > SURELY_COPIED
        if is_surely_copy and num_other:
            what = f"{num_other} of {len(cosine_R)} of its rows differ from the verifier's rows of the same tokens"
            yield error(code, name, f"{what} (median cosine {median:.2f})", rule, fix)
        elif is_surely_copy and abs(scale - 1) > SAME_SCALE:
            yield error(code, name, f"its rows are {scale:.3g} times the verifier's", rule, fix)
        elif median < SAME_DIRECTION and (shift := shift_of(tensors, name, theirs, verifier)):
            yield error("head-rows-shifted", name, f"its rows are the verifier's of the tokens {shift}", rule, fix)
        elif median < SAME_DIRECTION and origin != "conversion":
            what = f"its rows differ from the verifier's rows of the same tokens (median cosine {median:.2f})"
            yield warning(code, name, what, rule, "nothing, if the head was trained by itself")


def compared_rows(ours_RH: Tensor, theirs_RH: Tensor) -> tuple[Tensor, float]:
    """Returns the cosine of each pair of rows (1 where both are zero), and how many times larger ours are."""
    ours_RH, theirs_RH = ours_RH.float(), theirs_RH.float()
    ours_R, theirs_R = ours_RH.norm(dim=1), theirs_RH.norm(dim=1)
    cosine_R = torch.cosine_similarity(ours_RH, theirs_RH, dim=1).where((ours_R > 0) | (theirs_R > 0), 1.0)
    return cosine_R, float((ours_R / theirs_R.clamp_min(1e-30)).median())


def shift_of(tensors: Mapping[str, Tensor], name: str, theirs: str, verifier: str) -> str | None:
    """Says which tokens a head's rows stand for, when they are the verifier's rows of tokens beside."""
    rows = spaced(len(tensors[name]))
    for shift in SHIFTS:
        inside = [row for row in rows if 0 <= row + shift < len(tensors[name])]
        beside = own_rows(tensors, name, [row + shift for row in inside])
        own = own_rows(tensors, name, inside)
        if beside is None or own is None:
            return None
        moved = [max(token + shift, 0) for token in own]
        for tokens, words in ((beside, f"of the rows {shift:+d} from theirs"), (moved, f"{shift:+d} from theirs")):
            found = rows_of_copied(theirs, verifier, tokens)
            if (
                found is not None
                and float(compared_rows(tensors[name][inside], found.rows)[0].median()) > SAME_DIRECTION
            ):
                return words
    return None


def weights_are_here(verifier: str) -> bool:
    """Says whether rows of the verifier can be read without a download of gigabytes."""
    return verifier_rows(EMBEDDING, verifier, [0]) is not None


def own_rows(tensors: Mapping[str, Tensor], name: str, rows: Sequence[int] | None = None) -> list[int] | None:
    """Returns the verifier's row for each of our rows (None: sampled ones); None when the map is not usable."""
    rows = spaced(len(tensors[name])) if rows is None else list(rows)
    if name == EMBEDDING or MAP not in tensors:
        return rows
    if len(tensors[MAP]) != len(tensors[name]):
        return None
    return [i + int(tensors[MAP][i]) for i in rows]


def rows_of_copied(name: str, verifier: str, rows: list[int]) -> Rows | None:
    """None when they cannot be read. A tied head is stored as the embedding."""
    found = verifier_rows(name, verifier, rows)
    return found if found is not None else verifier_rows(EMBEDDING, verifier, rows)


def rows_not_finite(verifier: str) -> Iterator[Finding]:
    """Looks at the sampled rows of the verifier alone; the deep check reads all."""
    for name in VERIFIER_TENSORS:
        found = verifier_rows(name, verifier)
        if found is not None and found.rows.is_floating_point() and not bool(found.rows.isfinite().all()):
            rule = "every weight must be a number"
            yield error("weight-not-finite", f"the verifier's {name}", "NaN or infinite values", rule, DAMAGED)


def has_same_tokenizer(record: Mapping[str, Any] | None, verifier: str) -> bool:
    """Whether the verifier is known to have the tokenizer of the one in training."""
    old = ((record or {}).get("verifier") or {}).get("tokenizer")
    new = verifier_facts(verifier)["tokenizer"] if old else None
    return bool(old and new and old["sha256"] == new["sha256"])


def changed_verifier_findings(record: Mapping[str, Any], verifier: str) -> Iterator[Finding]:
    """Compares the verifier with the one in training, by tokenizer, sizes and some rows of its weights."""
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
    for key in ("num_hidden_layers", "model_type"):
        if None not in (trained.get(key), now.get(key)) and trained[key] != now[key]:
            yield error("verifier-differs", f"{verifier}: {key}", repr(now[key]), f"it was {trained[key]!r}", fix)
    other_precision, unsaid, found_other = precision_finding(trained, now, verifier), None, False
    for name, old in (trained.get("tensors") or {}).items():
        found = verifier_rows(name, verifier) if old else None
        is_fitting = found is not None and list(found.shape) == old["shape"]
        if found is None or (not is_fitting and has_same_tokenizer(record, verifier)):
            continue  # not here; or a table that is padded otherwise, which is said with the sizes
        if old["dtype"].startswith("float8"):
            continue  # an earlier release recorded FP8 without its scales
        if other_precision:
            like = "same" if is_fitting and is_rerounded(old, found.rows) else "other"
        else:
            like = likeness(old, found.rows) if is_fitting else "other"
            if like == "other" and is_fitting and is_on_grid(found.rows) and is_rerounded(old, found.rows):
                like, unsaid = "rounded", precision_warning(verifier, "not quantised", UNSAID)
        found_other = found_other or like == "other"
        rule = "the drafter learned from another verifier"
        if like == "other":
            yield error("verifier-differs", f"{verifier}: {name}", "not as in training", rule, fix)
        elif like == "near":
            yield warning("verifier-edited", f"{verifier}: {name}", "nearly, not exactly, as in training", rule, fix)
    if not found_other and (finding := other_precision or unsaid):
        yield finding


def precision_finding(trained: Mapping[str, Any], now: Mapping[str, Any], verifier: str) -> Finding | None:
    """Compares how the verifier's weights are quantised with how they were; None where that is the same or unknown."""
    if "quantization" not in now:
        return None
    if "quantization" in trained:
        old = trained["quantization"]
    else:  # a record of an earlier release, which has the types of some matrices
        layers = [found for name, found in (trained.get("tensors") or {}).items() if found and "layers." in name]
        if not layers or any(found["dtype"] not in PLAIN_TYPES for found in layers):
            return None
        old = None
    if old == now["quantization"]:
        return None
    old, new = (kind or "not quantised" for kind in (old, now["quantization"]))
    return precision_warning(verifier, old, new)


def precision_warning(verifier: str, old: str, new: str) -> Finding:
    return warning(
        "verifier-precision",
        verifier,
        f"its weights are: {new}",
        f"the drafter learned from states of the same model with weights: {old}. Text stays exact; fewer drafts may be "
        "accepted",
        "measure it with this verifier (speculators evaluate); train on states of this verifier where that is too few",
    )


def is_rerounded(trained: Mapping[str, Any], tensor: Tensor) -> bool:
    """Says whether a tensor may be the trained one at another precision: as large, and in its direction."""
    norm = trained.get("norm")
    is_as_large = norm is None or abs(norm_of(tensor) - norm) <= OTHER_PRECISION_NORM * norm
    pairs = zip(trained.get("sketch") or (), sketch(as_matrix(tensor)), strict=False)
    return is_as_large and all(abs(x - y) < OTHER_PRECISION for x, y in pairs)
