"""`EngineProfile`: what one release of a serving engine takes, as data. One file per release in `engine_profiles/`.

A new release is a new file: nothing here names a release, a method or a kind of drafter. Imports no torch.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from speculators.utils.names import did_you_mean, refuse_option

if TYPE_CHECKING:
    from speculators.checkpoint.formats import CheckpointContract
    from speculators.config import SpeculatorModelConfig

FOLDER = Path(__file__).parent / "engine_profiles"
OUR_FORMAT = "speculators"


@dataclass(frozen=True)
class Serving:
    """The verifier to serve, and the speculative config beside it. Always both, never a checkpoint alone: an engine may
    refuse one that was trained for a directory."""

    model: str
    speculative_config: Mapping[str, Any]

    def told(self, settings: Mapping[str, Any]) -> Serving:
        """The same with these settings, which come first."""
        return Serving(self.model, {**settings, **self.speculative_config, **settings})


@dataclass(frozen=True)
class ServedDrafter:
    """How an engine takes the drafters of one type."""

    format: str
    """The directory that it serves: a name of `CheckpointContract.formats`, or ours."""
    settings: Mapping[str, Any]
    """Its method, and what else it must be told beside the directory and the number of draft tokens."""
    tensors: tuple[str, ...]
    """Without these it drafts from uninitialised memory. "a|b": either name."""


@dataclass(frozen=True)
class EngineProfile:
    """One release of an engine. The fields are the keys of its file."""

    engine: str
    version: str
    """Major and minor number; patch releases are taken for equal."""
    held_against: Literal["process", "source"]
    """Whether our tests run the engine, or only read its source."""
    serve: tuple[str, ...]
    """The command that serves a verifier with a drafter, with placeholders."""
    methods: tuple[str, ...]
    refused_methods: Mapping[str, str]
    """Methods that its config class names and the engine does not serve, and why."""
    old_method_names: tuple[str, ...]
    """Deprecated words for one of its methods: each the `model_type` of a draft inside a verifier. For the tables of
    docs/serving.md, and tests that hold ours against the engine's."""
    settings: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    """The values of settings that are words."""
    lossy: tuple[str, ...]
    """Values of rejection_sample_method that change the distribution of the answers. For the tables of docs/serving.md.
    """
    drafters: Mapping[str, ServedDrafter]
    """`speculators_model_type` -> how it is served; other types of ours are not."""
    checkpoint_types: tuple[str, ...]
    """Types whose config.json of ours it reads by itself: here it counts whether there are any; tests hold the names
    against the engine's."""
    serves_local_verifiers_by_checkpoint: bool
    """Whether the checkpoint's path alone serves it where its recorded verifier is a directory."""
    lengthens_drafts_of: tuple[str, ...]
    """Methods whose draft's max_position_embeddings it raises to the verifier's."""
    lengthened_rope_types: tuple[str, ...] | None
    """Only with these rotary embeddings; None: with any."""

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.version}"

    @property
    def title(self) -> str:
        """The name in a sentence: "vLLM 0.32"."""
        return f"{TITLES.get(self.engine, self.engine)} {self.version}"

    @property
    def number(self) -> tuple[int, ...]:
        return release_number(self.version)

    def describes(self, version: str) -> bool:
        """Whether an installed version is this release."""
        return release_number(version) == self.number

    def takes_method(self, method: str) -> bool:
        return method in self.methods and method not in self.refused_methods

    def format_of(self, model_type: str, contract: CheckpointContract) -> str | None:
        """The format of the directory that the engine serves for such drafters; None: it serves none of them.

        Types that no file knows are of algorithms outside this package: their contract names a format of vLLM.
        """
        known = self.drafters.get(model_type)
        if known is not None:
            return known.format
        is_ours = any(model_type in profile.drafters for profile in profiles())
        named = contract.served_format
        if is_ours or self.engine != VLLM or named in (None, OUR_FORMAT):
            return None
        method = contract.format_named(str(named)).method
        return named if method is not None and self.takes_method(method) else None

    def refusal(self, contract: CheckpointContract, config: SpeculatorModelConfig) -> str | None:
        """Says why the engine serves this drafter in no directory; None: it does, in the one of `format_of`."""
        served = self.format_of(config.speculators_model_type, contract)
        if served is None:
            return f"{self.name} serves no drafter of this type"
        why = None if served == OUR_FORMAT else contract.format_named(served).refusal(config)
        return None if why is None else f"{self.name} cannot serve it: {why}"

    def serving(
        self,
        contract: CheckpointContract,
        config: SpeculatorModelConfig,
        format_name: str,
        directory: str,
        verifier: str,
    ) -> Serving | None:
        """Says how the engine serves a directory of that format beside `verifier`; None: it does not."""
        model_type = config.speculators_model_type
        said = contract.serving(config, format_name, directory, verifier)
        known = self.drafters.get(model_type)
        if known is not None and known.format == format_name:
            tokens = drafts_per_round(config)
            knows = format_name != OUR_FORMAT and contract.format_named(format_name).method is not None
            if said is None and tokens is not None and not knows:  # what the format itself says nothing of
                said = Serving(verifier, {"model": directory, "num_speculative_tokens": tokens})
            return None if said is None else said.told(known.settings)
        if said is None or format_name == OUR_FORMAT or self.engine != VLLM:
            return None
        return said if self.takes_method(said.speculative_config["method"]) else None

    def command(self, serving: Serving) -> str:
        """The shell command that serves a verifier with its drafter."""
        said = dict(serving.speculative_config)
        model = refuse_option(serving.model)
        tokens = said["num_speculative_tokens"]
        words = {
            "{verifier}": model,
            "{settings}": json.dumps(said),
            "{method}": said["method"],
            "{model}": said.get("model", model),
            "{num_speculative_tokens}": str(tokens),
            "{num_verified_tokens}": str(tokens + 1),
        }
        return shlex.join([words.get(word, word) for word in self.serve])


def drafts_per_round(config: SpeculatorModelConfig) -> int | None:
    """Returns the recorded draft tokens per round; None when config.json does not say."""
    recorded = config.speculators_config
    return getattr(recorded.proposal_methods[0], "speculative_tokens", None) if recorded is not None else None


VLLM = "vllm"
TITLES = {VLLM: "vLLM", "sglang": "SGLang"}


def read_profile(file: Path) -> EngineProfile:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    values["choices"] = {name: tuple(words) for name, words in values["choices"].items()}
    values["drafters"] = {
        model_type: ServedDrafter(said["format"], said["settings"], tuple(said["tensors"]))
        for model_type, said in values["drafters"].items()
    }
    return EngineProfile(**values)


@cache
def profiles() -> tuple[EngineProfile, ...]:
    """All releases that are described: engine by engine, oldest first."""
    found = [read_profile(file) for file in FOLDER.glob("*.yaml")]
    return tuple(sorted(found, key=lambda profile: (profile.engine != VLLM, profile.engine, profile.number)))


def profile_names() -> list[str]:
    return [profile.name for profile in profiles()]


def releases(engine: str) -> list[EngineProfile]:
    """The described releases of one engine, oldest first."""
    return [profile for profile in profiles() if profile.engine == engine]


def newest_profile() -> EngineProfile:
    """vLLM's newest release that is described."""
    return releases(VLLM)[-1]


def profile_named(name: str) -> EngineProfile:
    """Returns the profile "vllm-0.33". Raises `ValueError` for another name, with the nearest."""
    for profile in profiles():
        if profile.name == name:
            return profile
    raise ValueError(
        f"no engine {name!r} is described; there are {profile_names()}.{did_you_mean(name, profile_names())}"
    )


def profile_of_version(engine: str, version: str) -> EngineProfile:
    """Returns the profile of an installed version ("0.32.0+cpu"), else the newest before it, else the oldest."""
    described = releases(engine)
    before = [profile for profile in described if profile.number <= release_number(version)]
    return before[-1] if before else described[0]


def release_number(version: str) -> tuple[int, ...]:
    """Major and minor number of a version; empty when it does not begin with numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return () if found is None else (int(found[1]), int(found[2]))


def way_out(model_type: str) -> str:
    """Says which releases serve such drafters, for a message about one that does not."""
    serving = [profile.name for profile in profiles() if model_type in profile.drafters]
    return f"; `speculators export --engine` writes what {' or '.join(serving)} serves" if serving else ""
