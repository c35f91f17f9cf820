"""Completes and checks the `--speculative-config` that `serve` gives vLLM, before vLLM is looked for."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from speculators.checkpoint.engine_profile import EngineProfile
from speculators.checkpoint.io import read_model_config
from speculators.decoding.config import ModelInfo, SpeculativeConfig
from speculators.decoding.config.checks import refuse_other_vocabulary
from speculators.decoding.config.draft import is_readable_here, lookup, read_hf_config
from speculators.decoding.config.engine_settings import RETIRED_SETTINGS
from speculators.decoding.config.infer import is_import_path
from speculators.decoding.config.methods import METHODS, facts_of

FIRST = ("method", "model", "num_speculative_tokens")
NAME_THEM = (
    "name them with --draft (directory or hub id), or serve the trained checkpoint itself, which names its verifier: "
    "speculators serve CHECKPOINT"
)


def in_vllms_words(settings: dict[str, Any], verifier: str, profile: EngineProfile) -> dict[str, Any]:
    """The settings completed and checked as vLLM will."""
    method = settings.get("method")
    refuse_no_drafter(settings)
    target = target_of(settings, verifier)
    try:
        config = SpeculativeConfig(**settings, target_model_config=target)
    except NotImplementedError as error:
        holder = settings.get("model", verifier)
        raise ValueError(f"--method {method}: {holder} is no such drafter; name one with --draft ({error})") from error
    except ValidationError as error:
        is_about_k = "num_speculative_tokens" in str(error) and not RETIRED_SETTINGS.keys() & settings.keys()
        if "num_speculative_tokens" in settings or not is_about_k:
            raise
        raise ValueError("neither a flag nor the drafter says how many tokens to draft per round: give -k N") from error
    if config.uses_draft_model() and not config.use_heterogeneous_vocab and is_readable_here(verifier):
        draft = config.draft_model_config
        if draft is not None:  # None: on the hub; the server reads it
            refuse_other_vocabulary(ModelInfo(verifier, read_hf_config(verifier)), draft)
    unsupported = config.vllm_unsupported(profile.version)
    if unsupported:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unsupported.items())
        raise ValueError(
            f"{profile.title} would not accept {reasons}. Leave it out, or decode here with `speculators generate`"
        )
    said = dict(sorted(json.loads(config.to_vllm_json(profile.version)).items()))
    return {name: said[name] for name in FIRST if name in said} | said  # the same command each time


def drafts_with_a_model(settings: dict[str, Any]) -> bool:
    """Whether `model` of the settings is a directory or a hub id; else it is a class, or a method's name."""
    method, model = settings.get("method"), settings["model"]
    if method is not None:
        return facts_of(method).has_network
    return not is_import_path(model) and model.strip("[]") not in METHODS


def target_of(settings: dict[str, Any], verifier: str) -> ModelInfo | None:
    """The verifier's config, where the settings cannot be completed without: it holds the drafter itself, or a draft on
    the hub is to be recognised."""
    method, model = settings.get("method"), settings.get("model")
    if model is None and facts_of(settings["method"]).model_defaults_to_target:
        unread, why = verifier, f"--method {method} without --draft takes layers of the verifier itself"
    elif method is None and drafts_with_a_model(settings) and not is_readable_here(settings["model"]):
        unread, why = settings["model"], "what kind of drafter it is would be a guess; say it with --method"
    else:
        return None
    if not read_model_config(unread) or not read_model_config(verifier):
        raise ValueError(f"the config.json of {unread} cannot be read here, and {why}")
    config = read_hf_config(verifier)
    own_types = facts_of(method).own_drafter_in if method is not None else None
    if own_types and lookup(config, "model_type") not in own_types:
        raise ValueError(
            f"--method {method} drafts with weights of its own unless the verifier is of type "
            f"{' or '.join(sorted(own_types))}, and {verifier} is a {lookup(config, 'model_type')!r}; {NAME_THEM}"
        )
    return ModelInfo(verifier, config)


def refuse_no_drafter(settings: dict[str, Any]) -> None:
    method, model = settings.get("method"), settings.get("model")
    if model is not None:
        return
    if method is None:
        raise ValueError(
            f"{', '.join(f'{name}={value!r}' for name, value in settings.items())} was given but nothing that drafts; "
            "name a drafter with --draft, or a method that needs none: --method ngram, --method suffix"
        )
    facts = facts_of(method)
    if method == "custom_class":  # the one drafter that is code
        raise ValueError(f"--method {method} drafts with a class of yours; name it with --draft module.Class")
    if not facts.model_defaults_to_method and not facts.model_defaults_to_target:
        raise ValueError(f"--method {method} drafts with weights of its own, and none are named; {NAME_THEM}")


def refuse_method_without_model(method: str | None, drafter: str, verifier: str) -> None:
    if method is not None and not facts_of(method).has_network:
        raise ValueError(
            f"--method {method} drafts without a model, but with --verifier {drafter} would be one; leave {drafter} "
            f"out: speculators serve {verifier} --method {method}"
        )
