"""Builds the drafter, new or from a checkpoint, and its shape: a decoder config synthesised from the verifier's, or
read from a file.

Everything the drafter must share with its verifier (vocabulary, hidden size) is taken from it; everything else can be
chosen. Head counts, rope and norms follow the verifier because they suit its states.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from speculators.config import SpeculatorModelConfig
from speculators.model import SpeculatorModel
from speculators.model_loading import load_tensors
from speculators.provenance import changed_settings, refuse_changes
from speculators.train.config import TrainConfig
from speculators.train.flags import flag_of
from speculators.train.keys import RECORDED_KEYS, DraftKeys
from speculators.train.vocab_mapping import load_vocab_mapping, resolve_vocab_mapping
from speculators.utils.files import absolute_if_directory
from speculators.verifier.config import (
    flatten_rope_parameters,
    open_verifier_config,
    resolve_draft_intermediate_size,
    text_config,
)

logger = logging.getLogger(__name__)

COPIED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
MAX_LAYER_SHARE = 1 / 3
"""Of the verifier's layers: a drafter with more of them takes a large part of the time that it is to save."""


def load_verifier_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    try:
        return open_verifier_config(name, trust_remote_code)
    except ValueError as error:
        raise ValueError(f"--verifier {error}") from error


def check_heads(config: TrainConfig, verifier_config: PretrainedConfig) -> None:
    """Raises `ValueError` where a new drafter's layers would follow the attention of a verifier that has none."""
    cls, source, keys = SpeculatorModel.get_class(config.speculator_type), text_config(verifier_config), config.draft
    if keys.from_pretrained or keys.draft_config or not cls.has_chosen_layers:
        return
    if not getattr(source, "num_attention_heads", None):
        raise ValueError(
            f"--verifier {config.verifier.verifier_name_or_path} is a {source.model_type} and has no attention heads, "
            f"which the drafter's layers would follow: give their shape with --draft-config, the config.json of a "
            f"llama or qwen3 decoder with hidden_size {source.hidden_size}"
        )


def build_model(config: TrainConfig, verifier_config: PretrainedConfig) -> SpeculatorModel:
    """A drafter with fp32 weights: new, or the one named by --from-pretrained."""
    verifier = absolute_if_directory(config.verifier.verifier_name_or_path)
    keys, cls = config.draft, SpeculatorModel.get_class(config.speculator_type)
    if keys.from_pretrained:
        return pretrained_model(config, cls, verifier).float()
    mapping = resolve_vocab_mapping(
        target_vocab_size=text_config(verifier_config).vocab_size,
        draft_vocab_size=keys.draft_vocab_size,
        data_path=config.data.data_path,
        token_freq_path=keys.token_freq_path,
        d2t_path=keys.d2t_path,
        t2d_path=keys.t2d_path,
    )
    d2t, t2d = (None, None) if mapping is None else mapping
    size = None if d2t is None else len(d2t)
    shape = draft_config(verifier_config, keys) if cls.has_chosen_layers else text_config(verifier_config)
    given = {"t2d": t2d, "d2t": d2t, "draft_vocab_size": size, "verifier_name_or_path": verifier}
    return cls.from_training_args(shape, **{**config.flatten(), **given}).float()


def pretrained_model(config: TrainConfig, cls: type[SpeculatorModel], verifier: str) -> SpeculatorModel:
    """Raises `ValueError` when a given key says otherwise than the checkpoint, and for one of an algorithm that `cls`
    does not build on."""
    keys, flat = config.draft, config.flatten()
    recorded = SpeculatorModelConfig.from_pretrained(keys.from_pretrained)
    source = SpeculatorModel.get_class(recorded.speculators_model_type)
    if not issubclass(cls, source):
        raise ValueError(
            f"--from-pretrained {keys.from_pretrained} is of '{recorded.speculators_model_type}', whose weights "
            f"'{config.speculator_type}' does not continue: name one of '{config.speculator_type}', or of an algorithm "
            "that it builds on"
        )
    fields = {key: cls.recorded_keys.get(key, key) for key in config.equal if key not in ("d2t_path", "t2d_path")}
    fields = {key: field for key, field in fields.items() if source is cls or field in source.config_class.model_fields}
    before = {flag_of(key): getattr(recorded, field, None) for key, field in fields.items()}
    now = {flag_of(key): flat[key] for key in fields}
    ways_out = "its weights and shape are kept: leave these out, or train a new drafter without --from-pretrained"
    refuse_changes(changed_settings(before, now), f"--from-pretrained {keys.from_pretrained}", ways_out)
    d2t, t2d = None, None
    if keys.d2t_path is not None and keys.t2d_path is not None:
        d2t, t2d = load_vocab_mapping(keys.d2t_path, keys.t2d_path)
        own = load_tensors(keys.from_pretrained, {}).get("t2d")
        if own is not None and not torch.equal(own.bool(), t2d):
            raise ValueError(
                f"--d2t-path and --t2d-path are another draft vocabulary than that of {keys.from_pretrained}, and the "
                f"rows of its head belong to its own: leave them out, or train a new drafter without --from-pretrained"
            )
    if source is not cls:
        return warm_started(config, cls, recorded, verifier)
    options = {"attn_implementation": keys.draft_attn_impl} if config.provenance["draft_attn_impl"] != "default" else {}
    return cls.from_pretrained(
        keys.from_pretrained, verifier=verifier, dtype=torch.float32, t2d=t2d, d2t=d2t, **options
    )


def warm_started(
    config: TrainConfig, cls: type[SpeculatorModel], recorded: SpeculatorModelConfig, verifier: str
) -> SpeculatorModel:
    """A new drafter that begins with the weights of the algorithm it builds on: its shape, vocabulary and every tensor
    that both have. What is new is initialised as ever, and named in a line.

    Raises `ValueError` for tensors that it has not, or has in another size.
    """
    path, tensors = config.draft.from_pretrained, load_tensors(config.draft.from_pretrained, {})
    known = (key for key in (*RECORDED_KEYS, *cls.training_args.model_fields) if key not in cls.chosen_anew)
    fields = {key: cls.recorded_keys.get(key, key) for key in known}
    kept = {
        key: getattr(recorded, field) for key, field in fields.items() if getattr(recorded, field, None) is not None
    }
    vocabulary = {"t2d": tensors.get("t2d"), "d2t": tensors.get("d2t"), "verifier_name_or_path": verifier}
    layers = copy.deepcopy(getattr(recorded, "transformer_layer_config", None))
    model = cls.from_training_args(layers, **{**config.flatten(), **kept, **vocabulary}).float()
    own, trained = model.state_dict(), {name for name, param in model.named_parameters() if param.requires_grad}
    wrong = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise ValueError(
            f"--from-pretrained {path} has tensors that a '{config.speculator_type}' of its shape has not, or not of "
            f"this size: {', '.join(sorted(wrong))}; train without it"
        )
    model.load_state_dict({name: tensors[name] for name in trained & tensors.keys()}, strict=False)
    new = ", ".join(f"{name} ({own[name].numel():,})" for name in sorted(trained - tensors.keys()))
    num_taken = sum(own[name].numel() for name in trained & tensors.keys())
    begun = f"{len(trained & tensors.keys())} tensors ({num_taken:,} numbers) of {path}"
    logger.warning("the %s begins with %s; new are: %s", config.speculator_type, begun, new or "none")
    return model


def draft_config(verifier: PretrainedConfig, keys: DraftKeys) -> PretrainedConfig:
    """The decoder config an algorithm's `from_training_args` receives."""
    source = text_config(verifier)
    if keys.draft_config:
        return draft_config_from_file(keys.draft_config, source)
    heads = source.num_attention_heads
    kv_heads = getattr(source, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(
            f"the verifier has {heads} attention heads over {kv_heads} key-value heads, which does not "
            "divide: give the drafter's shape with --draft-config"
        )
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // heads
    warn_of_depth(keys.num_layers, getattr(source, "num_hidden_layers", None))
    values = {name: getattr(source, name) for name in COPIED if getattr(source, name, None) is not None}
    values |= {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": keys.num_layers,
        "intermediate_size": resolve_draft_intermediate_size(source),
        "hidden_act": keys.draft_hidden_act,
        "tie_word_embeddings": False,
        **sliding_layers(keys),
        **rope(source),
    }
    try:
        return AutoConfig.for_model(keys.draft_arch, **values)
    except ValueError as error:
        raise ValueError(
            f"--draft-arch {keys.draft_arch}: transformers knows no such architecture; use e.g. llama or "
            f"qwen3 ({error})"
        ) from error


def warn_of_depth(num_layers: int, num_verifier_layers: int | None) -> None:
    """Defaults of several layers are made for verifiers of dozens."""
    if num_layers > 1 and num_verifier_layers and num_layers > MAX_LAYER_SHARE * num_verifier_layers:
        logger.warning(
            "the drafter has %d layers beside the verifier's %d: drafting will cost a large part of what it saves; "
            "--num-layers %d is faster",
            num_layers,
            num_verifier_layers,
            max(1, num_verifier_layers // 6),
        )


def sliding_layers(keys: DraftKeys) -> dict[str, Any]:
    full = set(keys.full_attention_indices or ())
    outside = [index for index in full if not 0 <= index < keys.num_layers]
    if outside:
        raise ValueError(
            f"--full-attention-indices {outside[0]}: the drafter has {keys.num_layers} layers, 0..{keys.num_layers - 1}"
        )
    kinds = ["full_attention" if index in full else "sliding_attention" for index in range(keys.num_layers)]
    is_sliding = "sliding_attention" in kinds
    return {
        "layer_types": kinds,
        "sliding_window": keys.sliding_window if is_sliding else None,
        "use_sliding_window": is_sliding,
        "max_window_layers": 0,
    }


def rope(source: PretrainedConfig) -> dict[str, Any]:
    """Rope settings of the verifier, without what only its own kernels read."""
    settings = flatten_rope_parameters(getattr(source, "rope_parameters", None))
    if settings is None:
        return {}
    settings = dict(settings)
    settings.pop("type", None)
    settings.pop("mrope_interleaved", None)
    if "mrope_section" not in settings:
        settings.pop("partial_rotary_factor", None)
    return {"rope_parameters": settings}


def draft_config_from_file(path: str, verifier: PretrainedConfig) -> PretrainedConfig:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--draft-config {file} cannot be read as JSON: {error}") from error
    values = values.get("transformer_layer_config", values)  # a whole speculator config holds its decoder there
    if "model_type" not in values:
        raise ValueError(f"--draft-config {file} has no model_type: it must name a decoder, e.g. llama or qwen3")
    if values.get("hidden_size") != verifier.hidden_size:
        raise ValueError(
            f"--draft-config {file} has hidden_size={values.get('hidden_size')}, the verifier "
            f"{verifier.hidden_size}: they must be equal, the drafter reads the verifier's states"
        )
    if values.get("vocab_size") not in (None, verifier.vocab_size):
        warnings.warn(
            f"{file}: vocab_size={values['vocab_size']} replaced by the verifier's {verifier.vocab_size}", stacklevel=2
        )
    values = {**values, "vocab_size": verifier.vocab_size}
    return AutoConfig.for_model(values.pop("model_type"), **values)
