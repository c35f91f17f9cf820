"""Checks config.json by itself (keys that engines read without a default, values they would misread) and against the
record of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from speculators.checkpoint.engine_profile import drafts_per_round
from speculators.checkpoint.findings import VLLM_HERE, Finding, error, warning
from speculators.checkpoint.record import LAYERS, ROPE_KEYS, computed_config, recorded_rope
from speculators.config import SpeculatorModelConfig
from speculators.model import SpeculatorModel

SETTINGS = "speculators_config"
ROPE = f"{LAYERS}.rope_parameters"
MOST_FINDINGS = 20
"""Invalid values of one config.json that are listed."""
SAME_ANGLE = 1e-4
"""Rotary frequencies nearer than this share are the same: float32 arithmetic of two versions differs by 1e-6."""
CONFIG_FIX = "write the value back, or take config.json from where the checkpoint was trained"
# vLLM builds a generic config of the draft layers from the dict, which has no default for a missing key.
LAYER_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
)


def structure_findings(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks the parts that every speculator's config.json has."""
    name = values.get("speculators_model_type")
    known = SpeculatorModel.available_names()
    if not isinstance(name, str) or name not in known:
        yield error("type-unknown", "speculators_model_type", repr(name), f"known are {known}", "correct the name")
    if not isinstance(values.get(SETTINGS), Mapping):
        yield missing_key(SETTINGS, "readers recognise a speculator by it")
        return
    if at(values, SETTINGS, "proposal_methods", 0, "speculative_tokens") is None:
        yield missing_key(
            f"{SETTINGS}.proposal_methods[0].speculative_tokens", "engines draft this many tokens per round"
        )
    if at(values, SETTINGS, "verifier", "name_or_path") is None:
        yield missing_key(f"{SETTINGS}.verifier.name_or_path", "engines serve this model, with its tokenizer")
    default = at(values, SETTINGS, "default_proposal_method")
    first = at(values, SETTINGS, "proposal_methods", 0, "proposal_type")
    if default != first:
        yield warning(
            "proposal-not-first",
            f"{SETTINGS}.default_proposal_method",
            f"{default!r}, and the first method is {first!r}",
            "readers take the first method only",
            f"put {default!r} first in proposal_methods",
        )
    if at(values, SETTINGS, "algorithm") != name:
        yield warning(
            "algorithm-differs",
            f"{SETTINGS}.algorithm",
            repr(at(values, SETTINGS, "algorithm")),
            f"speculators_model_type is {name!r}, and that is what counts",
            f"write {name!r}",
        )
    if "model_type" in values:
        yield warning(
            "stray-model-type",
            "model_type",
            repr(values["model_type"]),
            "loaders of other libraries would load the directory as such a model",
            "remove the key",
        )
    if "auto_map" in values:
        yield warning("auto-map", "auto_map", repr(values["auto_map"]), "loaders ask for remote code", "remove the key")


def layer_findings(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks the draft layers' config of a drafter that vLLM builds from it."""
    layers = values.get(LAYERS)
    if not isinstance(layers, Mapping):
        yield missing_key(LAYERS, f"{VLLM_HERE} builds the draft layers from it")
        return
    for key in LAYER_KEYS:
        if layers.get(key) is None:
            yield missing_key(f"{LAYERS}.{key}", f"{VLLM_HERE} has no default for it")
    if not any(layers.get(key) for key in ROPE_KEYS[:3]):
        yield missing_key(
            f"{LAYERS}.rope_parameters", f"{VLLM_HERE} then takes a theta of its own, which differs by drafter type"
        )
    rope = layers.get("rope_parameters")
    if isinstance(rope, Mapping) and any(isinstance(value, Mapping) for value in rope.values()):
        yield error(
            "rope-nested",
            f"{LAYERS}.rope_parameters",
            f"one set for each of {sorted(rope)}",
            "draft layers have one set",
            "write the set that was trained with, flat",
        )
    kinds, num_layers = layers.get("layer_types"), layers.get("num_hidden_layers")
    if not isinstance(kinds, list | None):
        yield error("layer-types", f"{LAYERS}.layer_types", repr(kinds), "it is a list of names", "write the list")
        return
    if kinds is not None and len(kinds) != num_layers:
        yield error(
            "layer-types",
            f"{LAYERS}.layer_types",
            f"{len(kinds)} entries",
            f"there are {num_layers} draft layers",
            "give one for each",
        )
    if kinds and "sliding_attention" in kinds and not layers.get("sliding_window"):
        yield error(
            "window-missing",
            f"{LAYERS}.sliding_window",
            repr(layers.get("sliding_window")),
            "sliding layers need a window",
            "write the window that was trained with",
        )


def rope_findings(layers: Mapping[str, Any], where: str) -> Iterator[Finding]:
    """Reports rope that is said twice, differently: readers differ in which they take."""
    inside = layers.get("rope_parameters") or {}
    older = layers.get("rope_scaling") or {}
    said = [part for part in (inside, older) if isinstance(part, Mapping)]
    for key in sorted({key for part in said for key in part} | {"rope_theta", "partial_rotary_factor"}):
        values = [part[key] for part in said if key in part]
        if key in ROPE_KEYS and layers.get(key) is not None:
            values.append(layers[key])
        if any(value != values[0] for value in values[1:]):
            found = " and ".join(map(repr, values))
            rule = "it is said twice; transformers takes rope_scaling, then rope_parameters, others the one beside them"
            yield error("rope-twice", f"{where}{key}", found, rule, "write rope_parameters alone, as trained")


def count_findings(config: SpeculatorModelConfig, most: int | None) -> Iterator[Finding]:
    """Compares the draft tokens per round with the `most` that the drafter can give."""
    told = drafts_per_round(config)
    if told is not None and most is not None and told > most:
        yield error(
            "drafts-too-many",
            f"{SETTINGS}.proposal_methods[0].speculative_tokens",
            str(told),
            f"the drafter has {most} per round",
            f"write at most {most}",
        )


def at(values: Any, *keys: str | int) -> Any:
    """Returns the value at a path of keys and indices; None where the path ends earlier."""
    for key in keys:
        if isinstance(key, str) and isinstance(values, Mapping):
            values = values.get(key)
        elif isinstance(key, int) and isinstance(values, list) and len(values) > key:
            values = values[key]
        else:
            return None
    return values


def missing_key(where: str, meaning: str) -> Finding:
    return error("key-missing", where, "not in config.json", meaning, f"write {where}")


def read_config(path: Path) -> tuple[SpeculatorModelConfig | None, list[Finding]]:
    """Reads the config of the directory `path`; returns None and the reasons when a value is invalid."""
    try:
        return SpeculatorModelConfig.from_pretrained(path), []
    except ValidationError as problem:
        details = [
            (".".join(map(str, detail["loc"])), repr(detail["input"])[:80], detail["msg"].removeprefix("Value error, "))
            for detail in problem.errors(include_url=False)
        ]
    except ValueError as problem:
        details = [("", "unusable", str(problem))]
    return None, [
        error("config-invalid", where or "config.json", found, rule, "correct the value")
        for where, found, rule in details[:MOST_FINDINGS]
    ]


def changed_config_findings(
    record: Mapping[str, Any], values: Mapping[str, Any], training_keys: frozenset[str], *, is_ours: bool
) -> Iterator[Finding]:
    """Reports each value that differs from the record of training.

    `is_ours`: config.json is in our format, so a key that was added or removed matters too.
    """
    trained, now = record["config"], computed_config(values)
    for key in sorted(trained.keys() - training_keys):
        if key not in now and is_ours:
            yield error("config-changed", key, "not in config.json", f"it was {trained[key]!r} in training", CONFIG_FIX)
        elif key in now and now[key] != trained[key]:
            yield error("config-changed", key, repr(now[key]), f"it was {trained[key]!r} in training", CONFIG_FIX)
    for key in sorted(now.keys() - trained.keys()):
        if is_ours and key.startswith(LAYERS):
            yield error(
                "config-added",
                key,
                repr(now[key]),
                "it was not there in training, and engines read it",
                "remove the key, or take config.json from where the checkpoint was trained",
            )
    same_keys = all(now.get(key) == value for key, value in trained.items() if key.startswith(ROPE))
    if same_keys and not is_same_rope(record.get("rope"), recorded_rope(values)):
        found = "other frequencies than in training, by transformers' reading of config.json"
        rule = "head_dim and, for some types of rope, max_position_embeddings make them too"
        yield error("rope-changed", ROPE, found, rule, CONFIG_FIX)


def is_same_rope(trained: Sequence[float] | None, now: Sequence[float] | None) -> bool:
    """Whether no frequency differs; so too when either is not known."""
    if not trained or not now:
        return True
    same_length = len(trained) == len(now)
    return same_length and all(abs(a - b) <= SAME_ANGLE * abs(a) for a, b in zip(trained, now, strict=True))
