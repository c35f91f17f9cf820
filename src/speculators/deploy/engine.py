"""Chooses the engine release that a command speaks of, checks a drafter against what its profile says, and says how it
serves one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from speculators.checkpoint.engine_profile import (
    VLLM,
    EngineProfile,
    Serving,
    newest_profile,
    profile_named,
    profile_of_version,
    profiles,
    way_out,
)
from speculators.checkpoint.findings import Finding, error, warning
from speculators.checkpoint.formats import CheckpointContract
from speculators.checkpoint.io import open_checkpoint
from speculators.config import SpeculatorModelConfig
from speculators.deploy.process import PYTHON_VARIABLE, find_vllm, interpreter_of, version_in
from speculators.utils.files import absolute_if_directory
from speculators.utils.names import looks_like_a_path
from speculators.verifier.config import text_config

TENSORS = "tensors"
POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class Engine:
    """The release that a command speaks of."""

    profile: EngineProfile
    because: str
    """Where it was found; empty: it was named."""

    def __str__(self) -> str:
        return self.profile.name + (f" ({self.because})" if self.because else "")


def choose_engine(name: str | None = None, python: str | None = None) -> Engine:
    """Returns the named engine, else the one installed where vLLM is looked for (`find_vllm`), else vLLM's newest.

    A release without a file is described by the newest file before it; `because` says so, and why nothing was found.
    Raises `ValueError` for an unknown name, and when `python` has no engine.
    """
    if name is not None:
        return Engine(profile_named(name), "")
    try:
        found = find_vllm(python)
    except ValueError as problem:
        named = python or os.environ.get(PYTHON_VARIABLE)
        other = None if named is None else other_engine_in(named)
        if other is not None:
            return other
        if python is not None:
            raise
        why = str(problem) if named else "no engine was found here"
        return Engine(newest_profile(), f"the newest that is described: {why}")
    return installed(VLLM, found.version, found.python)


def other_engine_in(named: str) -> Engine | None:
    """Returns the engine beside vLLM that a named Python has; None when it has none, or is no Python."""
    try:
        python = interpreter_of(named)
    except ValueError:
        return None
    for engine in sorted({profile.engine for profile in profiles()} - {VLLM}):
        version = version_in(python, engine)
        if version is not None:
            return installed(engine, version, python)
    return None


def installed(engine: str, version: str, python: Path) -> Engine:
    profile = profile_of_version(engine, version)
    where = f"{engine} {version} in {python}"
    return Engine(profile, where if profile.describes(version) else f"the nearest that is described to {where}")


def serving_of_export(
    directory: str | Path, verifier: str | None = None, profile: EngineProfile | None = None
) -> Serving:
    """Says how an engine serves a directory that was exported in another project's format.

    `profile=None`: by `choose_engine`. Raises `ValueError` when it names no verifier, or the engine does not serve it.
    """
    profile = profile or choose_engine().profile
    opened = open_checkpoint(directory, verifier=verifier)
    recorded, contract = opened.config.speculators_config, opened.model_class.contract
    named = verifier or (None if recorded is None else recorded.verifier.name_or_path)
    if named is None:
        raise ValueError(f"{directory} names no verifier; give it with --verifier")
    where = absolute_if_directory(str(directory))
    serving = profile.serving(contract, opened.config, opened.format, where, named)
    if serving is None:
        model_type = opened.config.speculators_model_type
        raise ValueError(
            f"{directory}: {profile.title} does not serve a drafter of type {model_type!r} in the format "
            f"{opened.format!r}{way_out(model_type)}"
        )
    return serving


@dataclass(frozen=True)
class Unserved:
    """An engine does not serve a directory."""

    why: str
    instead: str
    """What to do."""


def unserved(
    profile: EngineProfile, contract: CheckpointContract, config: SpeculatorModelConfig, format_name: str, path: Path
) -> Unserved:
    """Says why `profile.serving` is None of a directory."""
    why = profile.refusal(contract, config)
    if why is not None:
        others = [other.name for other in profiles() if other.refusal(contract, config) is None]
        elsewhere = f", or serve it by {' or '.join(others)}" if others else ""
        return Unserved(why, f"nothing: decode here with `speculators generate`{elsewhere}")
    if profile.format_of(config.speculators_model_type, contract) != format_name:
        words = ["speculators", "export", str(path), "--engine", profile.name, "--output", "DIRECTORY"]
        why = f"{profile.name} serves what `speculators export` makes of it"
        return Unserved(why, f"what this writes: {shlex.join(words)}")
    lacks = "a verifier that is named, --verifier, and a number of draft tokens in config.json"
    return Unserved(f"{profile.name} serves it with {lacks}", lacks)


def drafter_findings(
    profile: EngineProfile,
    contract: CheckpointContract,
    config: SpeculatorModelConfig,
    format_name: str,
    tensor_names: Collection[str],
) -> Iterator[Finding]:
    """Reports a drafter that the engine serves in no directory, though others of its type, and in a directory that it
    serves as it is tensors that its loader lacks. `tensor_names`: as they are on disk."""
    why = profile.refusal(contract, config)
    if why is not None and profile.format_of(config.speculators_model_type, contract) is not None:
        yield warning("not-servable", "config.json", why, "it would refuse it, or draft otherwise", "decode it here")
    known = profile.drafters.get(config.speculators_model_type)
    if known is None or known.format != format_name:
        return
    for names in known.tensors:
        if not set(names.split("|")) & set(tensor_names):
            what = f"{profile.title} would draft from memory that nobody wrote"
            yield error(
                "tensor-missing", names, "not in the checkpoint", what, "take the weights from where it was made"
            )


def position_findings(
    profile: EngineProfile, config: SpeculatorModelConfig, serving: Serving | None, verifier: PretrainedConfig
) -> Iterator[Finding]:
    """Reports a drafter with fewer positions than its verifier, where the engine does not raise them by itself."""
    layers = getattr(config, "transformer_layer_config", config)
    longest, drafted = getattr(text_config(verifier), POSITIONS, None), getattr(layers, POSITIONS, None)
    if not isinstance(longest, int) or not isinstance(drafted, int) or not 0 < drafted < longest:
        return
    method = None if serving is None else serving.speculative_config["method"]
    rope_type = (getattr(layers, "rope_parameters", None) or {}).get("rope_type", "default")
    rule = f"the verifier's is {longest}; {profile.title} "
    if method not in profile.lengthens_drafts_of:
        raised = " and ".join(profile.lengthens_drafts_of)
        rule += f"raises it for {raised} only" if raised else "raises it for no method"
    elif profile.lengthened_rope_types is not None and rope_type not in profile.lengthened_rope_types:
        rule += f"does not raise it with rope type {rope_type!r}, and shortens the server's max_model_len to it"
    else:
        return
    yield warning("positions-short", POSITIONS, str(drafted), rule, "write the verifier's")


def notes_on_serving(profile: EngineProfile, serving: Serving | None, directory: Path) -> Iterator[str]:
    """Says what a reader who serves the directory otherwise than by the printed command must know."""
    local = serving is not None and looks_like_a_path(serving.model)
    if serving is None or not local or profile.serves_local_verifiers_by_checkpoint or not profile.checkpoint_types:
        return
    if serving.speculative_config.get("model") == str(directory):
        yield (
            f"{profile.title} refuses `vllm serve {directory}` alone: its verifier {serving.model} is a directory. Use "
            "the printed command, or export with --verifier ORG/MODEL"
        )
