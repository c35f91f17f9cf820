"""DFlash on disk: our directory and that of its authors (z-lab). vLLM serves both; the contract says what it misreads.

z-lab                                   ours
dflash_config.target_layer_ids  j       aux_hidden_state_layer_ids  j + 1     (output of layer j)
block_size, dflash_config.*             top level
everything else at the top level        transformer_layer_config
fused self_attn.qkv_proj (some files)   q_proj, k_proj, v_proj
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from speculators.checkpoint.findings import VLLM_HERE, Finding, error, mask_token_findings, missing_keys
from speculators.checkpoint.formats import (
    SPECULATORS,
    CheckpointContract,
    CheckpointFormat,
    Converted,
    DirectoryContents,
    ForeignCheckpoint,
    OurCheckpoint,
    count_in,
    dtype_name,
    ids_in,
)
from speculators.model import SpeculatorModel
from speculators.models.dflash.config import DFlashSpeculatorConfig, is_sliding
from speculators.models.draft_model import complete_layer_config, layer_config_of, layer_values, read_window
from speculators.nn.rope import head_dim, rope_parameters
from speculators.verifier.config import get_verifier_config, make_speculators_config

logger = logging.getLogger(__name__)

ZLAB = "z-lab"
MASK_KEY = "sliding_window_non_causal"
ARCHITECTURE = "DFlashDraftModel"
NOT_LAYER_KEYS = (
    "architectures",
    "auto_map",
    "block_size",
    "dflash_config",
    "num_target_layers",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "draft_vocab_size",
    "target_hidden_size",
)
"""Keys of a z-lab config.json that do not describe the draft layers."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
FUSED = "self_attn.qkv_proj."
OTHER_FUNCTION = ("g_proj", "aux_hidden_norms")
"""Tensors of variants that compute something else: leaving them out would change the drafts."""


def complete_block_config(config: Any) -> Any:
    """Returns a complete copy of the nested config, of the one family that engines have layers for."""
    if config.model_type != "qwen3":
        raise ValueError(
            f"draft layers of model_type={config.model_type!r} cannot be served: engines read q_norm and k_norm, which "
            "only qwen3 layers have; use --draft-arch qwen3"
        )
    return complete_layer_config(config)


def pin_causality(nested: PretrainedConfig, sliding_window_non_causal: bool) -> None:
    """Writes `is_causal` where vLLM would otherwise serve another mask than the trained one.

    vLLM's mask is causal in all layers or in none: `is_causal` if there, else `not sliding_window_non_causal`. Ours, by
    the kind of layer, agrees when all layers slide, or when none is causal. All full: they are trained to see the whole
    block, so that is written down. A mixture of causal sliding and full layers cannot be served: all become causal.
    """
    if getattr(nested, "is_causal", None) is not None or sliding_window_non_causal:
        return
    num_sliding = sum(is_sliding(nested, i) for i in range(nested.num_hidden_layers))
    if num_sliding == 0:
        nested.is_causal = False
    elif num_sliding < nested.num_hidden_layers:
        nested.is_causal = True
        logger.warning(
            "sliding and full layers are mixed: vLLM serves them with one kind of mask, so the full layers are trained "
            "causal too; use sliding_window_non_causal to let the slots of all layers see their whole block"
        )


def warn_if_served_differently(config: DFlashSpeculatorConfig) -> None:
    ours = [layer_mask.causal for layer_mask in config.layer_masks]
    if ours != config.served_causal:
        logger.warning(
            "the layers of this drafter are causal within a block as %s, but vLLM will serve them as %s; if it was "
            "trained that way, set is_causal inside transformer_layer_config (or sliding_window_non_causal)",
            ours,
            config.served_causal,
        )


class ZLabFormat(CheckpointFormat):
    name = ZLAB
    aliases = ("specforge",)
    method = "dflash"
    options = ("aux_hidden_state_layer_ids", "mask_token_id")

    def recognises(self, source: ForeignCheckpoint) -> bool:
        return ARCHITECTURE in source.architectures and "dflash_config" in source.values

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        values = source.values.get("dflash_config") or {}
        absent = [key for key in ("target_layer_ids", "mask_token_id") if values.get(key) is None]
        rule = f"{VLLM_HERE} reads it"
        return [
            error("key-missing", f"dflash_config.{key}", "not in config.json", rule, "write it there") for key in absent
        ]

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        values = source.values
        own = values.get("dflash_config") or {}
        block_size = count_in(own if values.get("block_size") is None else values, "block_size", least=2)
        tensors = split_fused(source.tensors(), values)
        nested = layer_config_of(values, NOT_LAYER_KEYS, model_type="qwen3")
        if "causal" in own and getattr(nested, "is_causal", None) is None:
            nested.is_causal = bool(own["causal"])
        read_window(nested, own)
        nested = with_verifier_positions(complete_block_config(nested), verifier)
        # vLLM would serve full layers causal if our config did not say otherwise
        slides = any(is_sliding(nested, i) for i in range(nested.num_hidden_layers))
        sees_all = getattr(nested, "is_causal", None) is None and not slides
        ids = options.get("aux_hidden_state_layer_ids") or layer_ids(own, nested.num_hidden_layers, values, verifier)
        config = DFlashSpeculatorConfig(
            transformer_layer_config=nested,
            draft_vocab_size=values.get("draft_vocab_size") or nested.vocab_size,
            block_size=block_size,
            target_hidden_size=values.get("target_hidden_size"),
            aux_hidden_state_layer_ids=ids,
            mask_token_id=options.get("mask_token_id", own.get("mask_token_id")),
            sliding_window_non_causal=sees_all,
            speculators_config=make_speculators_config("dflash", block_size - 1, verifier),
        )
        check_names(set(tensors), set(SpeculatorModel.expected_tensors(config)), source.path)
        return Converted(config, tensors, conversion_notes(ids, verifier))

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        config: Any = checkpoint.config
        if config.sample_from_anchor:
            raise ValueError("sample_from_anchor=True: the format has no such drafters, and vLLM refuses them")
        tensors = {name: checkpoint.tensors[name] for name in SpeculatorModel.expected_tensors(config)}
        return DirectoryContents(tensors, zlab_values(config, verifier, tensors["fc.weight"].dtype))


class DFlashContract(CheckpointContract):
    formats: ClassVar[tuple[CheckpointFormat, ...]] = (ZLabFormat(),)
    served_format = SPECULATORS
    borrows_from_verifier = True
    training_keys = frozenset({"max_anchors"})
    upgrade_options = ("aux_hidden_state_layer_ids", "mask_token_id")
    absent_means: ClassVar[Mapping[str, str]] = {
        "aux_hidden_state_layer_ids": "does not load the checkpoint",
        "mask_token_id": "does not load the checkpoint",
        "sliding_window_non_causal": "takes it for true: no layer is causal",
    }

    def findings(self, values: Mapping[str, Any], config: Any, format_name: str) -> list[Finding]:
        found = [*missing_keys(values, self.absent_means), *mask_token_findings(values, config.target_vocab_size)]
        if config.trained_causal != config.served_causal:
            found.append(mask_finding(config))
        if format_name == ZLAB:  # there vLLM goes by the kind of each layer
            found = [each for each in found if each.where != MASK_KEY]
        return found + self.option_findings(config)

    def option_findings(self, config: Any) -> list[Finding]:
        if not config.sample_from_anchor:
            return []
        return [
            error(
                "not-servable",
                "sample_from_anchor",
                "true",
                f"{VLLM_HERE} refuses it for this type",
                "train with --no-sample-from-anchor",
            )
        ]

    def most_drafts(self, config: Any) -> int:
        return config.num_drafts

    def warn_before_saving(self, config: Any) -> None:
        warn_if_served_differently(config)

    def completed(self, config: Any) -> Any:
        config = copy.deepcopy(config)
        nested = complete_block_config(config.transformer_layer_config)
        if config.trained_causal != config.served_causal and len(set(config.trained_causal)) == 1:
            nested.is_causal = config.trained_causal[0]
        config.transformer_layer_config = nested
        return config


def mask_finding(config: Any) -> Finding:
    trained, served = config.trained_causal, config.served_causal
    found = f"trained causal within a block: {trained}, served: {served} (per layer)"
    if len(set(trained)) > 1:
        rule, fix = f"{VLLM_HERE} has one mask for all layers of our layout", f"export --engine {ZLAB}, which says both"
        return error("not-servable", MASK_KEY, found, rule, fix)
    fix = "set is_causal inside transformer_layer_config to what was trained"
    return error("mask-differs", MASK_KEY, found, "both must agree", fix)


def zlab_values(config: Any, verifier: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the format. vLLM goes by `is_causal`, `dflash_config.causal`, the kind of layer, in this order."""
    nested = config.transformer_layer_config
    values = {**layer_values(nested), "architectures": [ARCHITECTURE], "model_type": "qwen3"}
    by_kind = [is_sliding(nested, i) for i in range(nested.num_hidden_layers)]
    if config.trained_causal != by_kind:
        values["is_causal"] = config.trained_causal[0]
    return {
        **values,
        "block_size": config.block_size,
        "draft_vocab_size": config.draft_vocab_size,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": [layer - 1 for layer in config.aux_hidden_state_layer_ids],
        },
        **({} if verifier is None else {"num_target_layers": get_verifier_config(verifier).num_hidden_layers}),
        "dtype": dtype_name(dtype),
    }


def with_verifier_positions(nested: Any, verifier: str | None) -> Any:
    """Raises `max_position_embeddings` to the verifier's, which vLLM does for EAGLE's methods only; not where rope
    depends on it."""
    longest = None if verifier is None else get_verifier_config(verifier).max_position_embeddings
    if longest is not None and rope_parameters(nested)["rope_type"] in FIXED_ROPES:
        nested.max_position_embeddings = max(nested.max_position_embeddings, longest)
    return nested


def layer_ids(own: Mapping[str, Any], num_draft: int, values: Mapping[str, Any], verifier: str | None) -> list[int]:
    """Returns layer ids as we count them; without a list, the format's default: evenly from layer 1 to three before the
    last."""
    found: Sequence[int] | None = ids_in(own, "target_layer_ids")
    if found is None:
        num_layers = values.get("num_target_layers")
        if num_layers is None and verifier is not None:
            num_layers = get_verifier_config(verifier).num_hidden_layers
        if num_layers is None:
            raise ValueError("config.json names no target_layer_ids, and their default needs the verifier: name it")
        step = (num_layers - 4) / max(num_draft - 1, 1)
        found = [num_layers // 2] if num_draft == 1 else [round(1 + i * step) for i in range(num_draft)]
    return [layer + 1 for layer in found]


def conversion_notes(ids: Sequence[int], verifier: str | None) -> list[str]:
    num_layers = get_verifier_config(verifier).num_hidden_layers if verifier is not None else None
    if num_layers not in ids:
        return []
    return [
        f"the drafter reads the state after the verifier's last layer ({num_layers}): its authors' code gives it after "
        "the final norm, engines before; expect lower acceptance than published"
    ]


def split_fused(tensors: dict[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
    if not any(FUSED in name for name in tensors):
        return tensors
    if any("self_attn.q_proj." in name for name in tensors):
        raise ValueError("the checkpoint has both fused qkv_proj and q_proj: it is unknown which holds the weights")
    nested = layer_config_of(values, NOT_LAYER_KEYS, model_type="qwen3")
    size = head_dim(nested)
    rows = [nested.num_attention_heads * size, *[nested.num_key_value_heads * size] * 2]
    out = {}
    for name, tensor in tensors.items():
        if FUSED not in name:
            out[name] = tensor
            continue
        for kind, part in zip("qkv", tensor.split(rows), strict=True):
            out[name.replace("qkv_proj", f"{kind}_proj")] = part.contiguous()
    return out


def check_names(found: set[str], expected: set[str], path: Path) -> None:
    other = sorted(name for name in found if any(part in name for part in OTHER_FUNCTION))
    if other:
        raise ValueError(f"{path} has {other}: a variant that computes another function, which has no drafter here")
    if expected - found:
        raise ValueError(f"Draft weights missing in {path}: {sorted(expected - found)}")
    if found - expected:
        raise ValueError(f"Unexpected keys in {path}: {sorted(found - expected)}")
