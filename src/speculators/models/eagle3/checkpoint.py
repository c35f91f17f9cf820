"""EAGLE-3 on disk: our directory and that of the EAGLE repository. vLLM serves both; the contract says what it
misreads.

EAGLE repository, SpecForge             ours
midlayer.*                              layers.0.*
d2t, t2d, fc, norm, lm_head             the same
embed_tokens (often absent)             the same
config: that of the draft layer, with   top level beside transformer_layer_config
draft_vocab_size, eagle_config, flags
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from speculators.checkpoint.findings import VLLM_HERE, Finding, error, missing_keys
from speculators.checkpoint.formats import (
    SPECULATORS,
    CheckpointContract,
    CheckpointFormat,
    Converted,
    DirectoryContents,
    ForeignCheckpoint,
    OurCheckpoint,
    dtype_name,
    ids_in,
)
from speculators.checkpoint.tensors import stored_tensors
from speculators.models.draft_model import complete_layer_config, layer_config_of, layer_values, with_biases
from speculators.models.eagle3.config import DEFAULT_NUM_AUX, Eagle3SpeculatorConfig
from speculators.utils.names import did_you_mean
from speculators.verifier.config import get_verifier_config, make_speculators_config, resolve_target_layer_ids
from speculators.verifier.loading import EMBEDDING, is_copy

NATIVE = "eagle3"
IDS = "eagle_aux_hidden_state_layer_ids"
LAYER_IDS_ARE, ENTERING, OUTPUTS = "layer_ids_are", "entering", "outputs"
CONVENTIONS = (ENTERING, OUTPUTS)
"""Whether id i of another project means the state that enters layer i (as ours) or its output (ours i + 1)."""
THEIR_LAYER, OUR_LAYER = "midlayer.", "layers.0."
SERVED_FAMILIES = ("llama", "qwen3")
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
NOT_LAYER_KEYS = (
    *FLAGS,
    IDS,
    LAYER_IDS_ARE,
    "architectures",
    "auto_map",
    "eagle_config",
    "draft_vocab_size",
    "target_hidden_size",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
CONVERTED_TOKENS = 3
"""Draft tokens per round of a converted checkpoint, whose own config names no number."""
ASSUMED = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
}
"""Values that the authors' code assumes for keys that an old config.json lacks."""


def complete_transformer_layer_config(config: Any, num_aux: int = DEFAULT_NUM_AUX) -> Any:
    """Returns a copy with every key that an engine reads."""
    config = complete_layer_config(config)
    if config.model_type == "llama" and num_aux != DEFAULT_NUM_AUX:
        # vLLM's llama variant sizes fc by this key and ignores eagle_aux_hidden_state_layer_ids.
        config.num_aux_hidden_states = num_aux
    return config


class Eagle3Format(CheckpointFormat):
    name = NATIVE
    method: ClassVar[str | None] = "eagle3"
    algorithm: ClassVar[str] = NATIVE
    has_mask_hidden: ClassVar[bool] = False
    conventions: ClassVar[tuple[str, ...]] = (ENTERING,)
    """What `layer_ids_are` says in such a directory; one that does not say it counts as the first."""
    options: ClassVar[tuple[str, ...]] = (*FLAGS, IDS, LAYER_IDS_ARE)

    def recognises(self, source: ForeignCheckpoint) -> bool:
        names = source.tensor_names
        is_head = "fc.weight" in names and {"midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"} & names
        said = OUTPUTS if source.values.get(LAYER_IDS_ARE) == OUTPUTS else ENTERING
        return bool(is_head) and ("mask_hidden" in names) == self.has_mask_hidden and said in self.conventions

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        values, found = source.values, []
        nested = (values.get("eagle_config") or {}).get(IDS)
        if nested and not values.get(IDS):
            found.append(ids_nested("eagle_config." + IDS, nested))
        if values.get("draft_vocab_size") is None and "d2t" in source.tensor_names:
            found += missing_keys(values, {"draft_vocab_size": "takes the verifier's, and ignores d2t"})
        return found

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        tensors = {name.replace(THEIR_LAYER, OUR_LAYER): tensor for name, tensor in source.tensors().items()}
        values = source.values
        nested = nested_config(values, tensors, verifier)
        tensors = with_biases(nested, tensors)
        flags: dict[str, Any] = {
            flag: options[flag] if options.get(flag) is not None else values.get(flag) for flag in FLAGS
        }
        flags["norm_before_fc"] = flags["norm_before_fc"] or "input_norm.weight" in tensors
        flags["fc_norm"] = flags["fc_norm"] or "fc_norm.0.weight" in tensors
        num_aux = tensors["fc.weight"].shape[1] // (values.get("target_hidden_size") or nested.hidden_size)
        ids, notes = options.get(IDS), list[str]()
        if ids is None:
            ids, notes = layer_ids_of(source, verifier, options.get(LAYER_IDS_ARE) or values.get(LAYER_IDS_ARE))
        if ids is None and verifier is not None and num_aux == DEFAULT_NUM_AUX:
            ids = resolve_target_layer_ids(None, verifier)
            notes.append(f"the checkpoint names no layers to read: {ids}, the default of engines, was written down")
        nested = complete_transformer_layer_config(nested, num_aux)
        is_trained = False
        if EMBEDDING not in tensors and verifier is not None:
            tensors |= stored_tensors(verifier, [EMBEDDING])
        elif verifier is not None:
            is_trained = not is_copy(tensors[EMBEDDING], EMBEDDING, verifier)
            notes.append(f"its own embedding {'differs from' if is_trained else 'is a copy of'} the verifier's; kept")
        config = self.config_of(
            values | {key: value for key, value in options.items() if value is not None},
            embed_requires_grad=is_trained or self.has_mask_hidden,
            transformer_layer_config=nested,
            draft_vocab_size=values.get("draft_vocab_size") or tensors["lm_head.weight"].shape[0],
            target_hidden_size=values.get("target_hidden_size"),
            eagle_aux_hidden_state_layer_ids=ids,
            speculators_config=make_speculators_config(self.algorithm, CONVERTED_TOKENS, verifier),
            **{flag: bool(value) for flag, value in flags.items()},
        )
        return Converted(config, without_identity_map(tensors, config), notes)

    def config_of(self, values: Mapping[str, Any], **fields: Any) -> Eagle3SpeculatorConfig:
        return Eagle3SpeculatorConfig(**fields)

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        config: Any = checkpoint.config
        nested = config.transformer_layer_config
        tensors = {name.replace(OUR_LAYER, THEIR_LAYER): tensor for name, tensor in checkpoint.tensors.items()}
        return DirectoryContents(
            tensors,
            {
                **layer_values(nested),
                **{flag: getattr(config, flag) for flag in FLAGS},
                IDS: config.eagle_aux_hidden_state_layer_ids,
                "eagle_config": {IDS: config.eagle_aux_hidden_state_layer_ids},
                "architectures": [
                    "LlamaForCausalLMEagle3" if nested.model_type == "llama" else "Eagle3Qwen3ForCausalLM"
                ],
                "draft_vocab_size": config.draft_vocab_size,
                "dtype": dtype_name(tensors["fc.weight"].dtype),
            },
        )


class Eagle3Contract(CheckpointContract):
    formats: ClassVar[tuple[CheckpointFormat, ...]] = (Eagle3Format(),)
    served_format = SPECULATORS
    borrows_from_verifier = True
    training_keys = frozenset({"embed_requires_grad"})
    absent_means: ClassVar[Mapping[str, str]] = {
        "norm_before_residual": "takes it for true (a config of ours without it means false)",
        "draft_vocab_size": "takes the verifier's",
    }

    def findings(self, values: Mapping[str, Any], config: Any, format_name: str) -> list[Finding]:
        return [
            *missing_keys(values, self.absent_means),
            *layer_findings(values, config.transformer_layer_config, config.num_aux),
        ]

    upgrade_options = (IDS,)

    def upgraded(self, config: Any, verifier: str, **options: Any) -> Any:
        """Releases 0.1 and 0.2 wrote no layers to read and took the default."""
        config = super().upgraded(config, verifier, **options)
        if config.eagle_aux_hidden_state_layer_ids is None and config.num_aux == DEFAULT_NUM_AUX:
            config.eagle_aux_hidden_state_layer_ids = resolve_target_layer_ids(None, verifier)
        return config

    def completed(self, config: Any) -> Any:
        config = copy.deepcopy(config)
        nested = config.transformer_layer_config
        ids = config.eagle_aux_hidden_state_layer_ids or (getattr(nested, "eagle_config", None) or {}).get(IDS)
        config.eagle_aux_hidden_state_layer_ids = ids
        if hasattr(nested, "eagle_config"):
            del nested.eagle_config  # said at the top level now
        config.transformer_layer_config = complete_transformer_layer_config(nested, config.num_aux)
        return config


def layer_findings(values: Mapping[str, Any], nested: Any, num_aux: int) -> Iterator[Finding]:
    """Checks the keys that vLLM reads of the draft layers and of the verifier layers that feed them."""
    if nested.model_type not in SERVED_FAMILIES:
        yield error(
            "not-servable",
            "transformer_layer_config.model_type",
            repr(nested.model_type),
            f"{VLLM_HERE} has draft layers for {SERVED_FAMILIES}",
            "train with --draft-arch llama or qwen3",
        )
    inside = (getattr(nested, "eagle_config", None) or values.get("eagle_config") or {}).get(IDS)
    if not values.get(IDS) and inside:
        yield ids_nested("eagle_config." + IDS, inside)
    elif not values.get(IDS):
        yield error(
            "aux-ids-missing",
            IDS,
            repr(values.get(IDS)),
            "engines then read the layers 2, n // 2 and n - 3",
            "write the ids that the drafter was trained with",
        )
    written = getattr(nested, "num_aux_hidden_states", None)
    if nested.model_type == "llama" and (written or DEFAULT_NUM_AUX) != num_aux:
        yield error(
            "num-aux-missing",
            "transformer_layer_config.num_aux_hidden_states",
            repr(written),
            f"llama drafts of {VLLM_HERE} size fc by this key alone, {DEFAULT_NUM_AUX} without it",
            f"write {num_aux} there",
        )


def layer_ids_of(
    source: ForeignCheckpoint, verifier: str | None, are: str | None
) -> tuple[list[int] | None, list[str]]:
    """Returns the ids of config.json as we count them, None when it has none, and a note on how they were read.

    vLLM reads those at the top level as ours. Those in `eagle_config` are written for SGLang by some (outputs), for
    vLLM by others: known where they are an engine's default. Raises `ValueError` where that is not known.
    """
    if are is not None and are not in CONVENTIONS:
        raise ValueError(f"{LAYER_IDS_ARE}={are!r}: it is one of {CONVENTIONS}.{did_you_mean(are, CONVENTIONS)}")
    top, inside = ids_in(source.values, IDS), ids_in(source.values.get("eagle_config") or {}, IDS)
    ids = list(top or inside or [])
    if not ids:
        return None, []
    shifted = [layer + 1 for layer in ids]
    if are is not None:
        return (shifted if are == OUTPUTS else ids), []
    if top:
        return ids, []
    default = None if verifier is None else resolve_target_layer_ids(None, verifier)
    if ids == default:
        return ids, []
    if shifted == default:
        return shifted, [f"eagle_config names outputs of layers, {ids}, the default of SpecForge: written as {shifted}"]
    raise ValueError(
        f"eagle_config.{IDS}={ids} counts either the states that enter layers, as vLLM reads it, or their outputs, as "
        f"SpecForge and SGLang do, which are {shifted} here; its writer knows: say --layer-ids-are entering or outputs"
    )


def ids_nested(where: str, ids: Any) -> Finding:
    return error(
        "aux-ids-nested",
        where,
        repr(ids),
        f"{VLLM_HERE}'s newer model runner reads the top level only, and falls back to the layers 2, n // 2 and n - 3",
        f"write {IDS} at the top level of config.json",
    )


def nested_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor], verifier: str | None) -> Any:
    """Builds the draft layers' config. Its vocabulary is the verifier's, whatever the file says."""
    verifier_config = None if verifier is None else get_verifier_config(verifier)
    nested = layer_config_of(values, NOT_LAYER_KEYS, model_type="llama", **ASSUMED)
    if "t2d" in tensors:
        nested.vocab_size = tensors["t2d"].shape[0]
    elif verifier_config is not None:
        nested.vocab_size = verifier_config.vocab_size
    if verifier_config is not None:
        longest = getattr(verifier_config, "max_position_embeddings", 0)
        nested.max_position_embeddings = max(nested.max_position_embeddings, longest)
    return nested


def without_identity_map(tensors: dict[str, Tensor], config: Eagle3SpeculatorConfig) -> dict[str, Tensor]:
    """Drops a map of the whole vocabulary onto itself: neither we nor vLLM store one."""
    if config.draft_vocab_size != config.target_vocab_size:
        return tensors
    if ("d2t" in tensors and tensors["d2t"].any()) or ("t2d" in tensors and not tensors["t2d"].all()):
        raise ValueError("d2t or t2d moves tokens, though the draft vocabulary is the verifier's: one of them is wrong")
    return {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
