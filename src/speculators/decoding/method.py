"""Parses the names of drafters: `none` (plain decoding), a method's name, a speculator's directory, or vLLM's JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from speculators.decoding.config.methods import facts_of, refuse_unknown_method
from speculators.utils.files import read_json_object
from speculators.utils.names import did_you_mean_path, is_in_hub_cache, is_misspelt_path, looks_like_a_path

PLAIN = "none"
PATH_KEYS = ("speculators_model_type", "model_type")
"""Where a checkpoint's config.json says what it is: ours first."""

NAME_DEFAULTS: dict[str, dict[str, Any]] = {"ngram": {"num_speculative_tokens": 4}}
"""What a method's bare name stands for, where its own configuration leaves it open."""

Drafter = str | os.PathLike[str] | Mapping[str, Any]
"""`none`, `ngram`, a speculator's directory or anything that has one (a training result), vLLM's JSON or its dict."""


@dataclass(frozen=True)
class Method:
    name: str
    speculative_config: dict[str, Any] | None
    """What vLLM's `--speculative-config` takes; None = plain decoding."""

    @property
    def num_speculative_tokens(self) -> int | None:
        """K, where it was said; None where the method's own configuration decides."""
        return 0 if self.speculative_config is None else self.speculative_config.get("num_speculative_tokens")


def parse_methods(
    drafters: Sequence[Drafter], num_speculative_tokens: int | None, tree: Mapping[str, Any] | None = None
) -> list[Method]:
    """The methods of a comparison, with names that differ; see `parse_method`."""
    methods: list[Method] = []
    for drafter in drafters:
        method = parse_method(drafter, num_speculative_tokens, tree)
        taken = {other.name for other in methods}
        name = next(name for name in chain([method.name], numbered(method.name)) if name not in taken)
        methods.append(replace(method, name=name))
    if tree and not any(
        method.speculative_config and tree.keys() <= method.speculative_config.keys() for method in methods
    ):
        raise ValueError(f"{', '.join(tree)}: none of the methods {list(drafters)} is a speculator's directory")
    return methods


def numbered(name: str) -> Iterator[str]:
    return (f"{name}-{number}" for number in count(2))


def parse_method(
    drafter: Drafter, num_speculative_tokens: int | None = None, tree: Mapping[str, Any] | None = None
) -> Method:
    """`none`, `ngram`, `path/to/speculator` or '{"method": "ngram", "num_speculative_tokens": 3, ...}'.

    `num_speculative_tokens`: for drafters that do not say K. `tree`: what a speculator's directory is to draft (a
    `speculative_token_tree` or a `dynamic_tree`); JSON says so itself. Raises `ValueError` for a directory that is not
    there, for text that is not JSON and for an unknown method.
    """
    if isinstance(drafter, Mapping):
        config = dict(drafter)
    else:
        text = os.fspath(drafter)
        if text == PLAIN:
            return Method(PLAIN, None)
        config = config_of(text, tree or {}, is_path=not isinstance(drafter, str))
    if num_speculative_tokens is not None:
        config.setdefault("num_speculative_tokens", num_speculative_tokens)
    for key, value in NAME_DEFAULTS.get(config.get("method", ""), {}).items():
        config.setdefault(key, value)
    return Method(name_of(config), config)


def config_of(text: str, tree: Mapping[str, Any], *, is_path: bool) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"method {text} looks like JSON but is not: {error}") from error
    is_hub_id = "/" in text and not looks_like_a_path(text) and (is_in_hub_cache(text) or not is_misspelt_path(text))
    if Path(text).is_dir() or is_hub_id:
        return {"model": text, **tree}
    if "/" in text or is_path:
        raise ValueError(
            f"method {text}: no such directory.{did_you_mean_path(text)} Give a speculator's directory or model id, "
            "a method's name or JSON"
        )
    refuse_unknown_method(text)
    facts = facts_of(text)
    if not facts.model_defaults_to_method and not facts.model_defaults_to_target:
        config = f'{{"method": "{text}", "model": "..."}}'
        raise ValueError(f"method {text} drafts with a model, and none is named: give its directory, or {config}")
    return {"method": text}


def name_of(config: dict[str, Any]) -> str:
    if config.get("method"):
        return str(config["method"])
    path = Path(str(config.get("model", "")))
    if (path / "config.json").is_file():
        written = read_json_object(path / "config.json", "the checkpoint is damaged; copy or train it again")
        for key in PATH_KEYS:
            if written.get(key):
                return str(written[key])
    return path.name or "speculative"
