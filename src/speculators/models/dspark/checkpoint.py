"""DSpark on disk: our directory and the dense format of its authors. vLLM serves both; the contract says what it
misreads.

The dense format has our tensors; its config is the draft layers' with the drafter's keys beside them, and
`target_layer_ids` j counts outputs: our j + 1.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, ClassVar

from transformers import PretrainedConfig

from speculators.checkpoint.findings import VLLM_HERE, Finding, error
from speculators.checkpoint.formats import (
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
from speculators.models.dflash.checkpoint import (
    NOT_LAYER_KEYS,
    DFlashContract,
    check_names,
    complete_block_config,
    with_verifier_positions,
)
from speculators.models.dflash.config import is_sliding
from speculators.models.draft_model import layer_config_of, layer_values, read_window
from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.verifier.config import make_speculators_config

logger = logging.getLogger(__name__)

DENSE = "dspark"
SERVED_CLASS, OTHER_CLASS = "Qwen3DSparkModel", "DSparkDraftModel"
OWN_KEYS = (
    "block_size",
    "mask_token_id",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "sample_from_anchor",
)
INSIDE = (*(key for key in OWN_KEYS if key not in ("block_size", "sample_from_anchor")), "target_layer_ids")
FIXED = {"projector_type": "dspark", "attention_mode": "gqa"}
"""Of SpecForge's `dflash_config`."""
OLD_PREFIX, PREFIX = "logit_head.", "markov_head."


SERVED_HEAD = "vanilla"
"""The one kind of Markov head vLLM loads; the tensors of the others are unknown names to it."""


def pin_causality(nested: PretrainedConfig, sliding_window_non_causal: bool) -> None:
    """vLLM serves sliding layers causal and full layers not, which is how they are trained; only slots of sliding
    layers that see later ones must be written down."""
    slides = any(is_sliding(nested, i) for i in range(nested.num_hidden_layers))
    if sliding_window_non_causal and slides and getattr(nested, "is_causal", None) is None:
        nested.is_causal = False


def warn_if_not_served(config: DSparkSpeculatorConfig) -> None:
    if config.markov_head_type != SERVED_HEAD or config.markov_rank == 0:
        logger.warning(
            "vLLM serves markov_head_type='vanilla' with markov_rank > 0 only, not %r with rank %d",
            config.markov_head_type,
            config.markov_rank,
        )


class DenseFormat(CheckpointFormat):
    name = DENSE
    method: ClassVar[str | None] = "dspark"
    architecture: ClassVar[str] = SERVED_CLASS
    options = ("aux_hidden_state_layer_ids", "mask_token_id")

    def recognises(self, source: ForeignCheckpoint) -> bool:
        return self.architecture in source.architectures

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        values = {**source.values, **(source.values.get("dflash_config") or {})}
        values |= {key: value for key, value in options.items() if value is not None}
        own = {key: values[key] for key in OWN_KEYS if values.get(key) is not None}
        ids = options.get("aux_hidden_state_layer_ids") or [
            layer + 1 for layer in ids_in(values, "target_layer_ids") or ()
        ]
        if not ids or "block_size" not in own:
            raise ValueError(f"{source.path / 'config.json'} must say target_layer_ids and block_size")
        left_out = {*NOT_LAYER_KEYS, *OWN_KEYS, "target_layer_ids", "dspark_bonus_anchor"}
        nested = layer_config_of(source.values, left_out, model_type="qwen3")
        read_window(nested, source.values.get("dflash_config") or {})
        nested = complete_block_config(nested)
        nested = with_verifier_positions(nested, verifier)
        drafts_at_anchor = own.setdefault("sample_from_anchor", not source.values.get("dspark_bonus_anchor", False))
        tensors = {name.replace(OLD_PREFIX, PREFIX): tensor for name, tensor in source.tensors().items()}
        own.setdefault("enable_confidence_head", "confidence_head.proj.weight" in tensors)
        num_tokens = count_in(own, "block_size", least=1 + (not drafts_at_anchor)) - (not drafts_at_anchor)
        config = DSparkSpeculatorConfig(
            transformer_layer_config=nested,
            draft_vocab_size=values.get("draft_vocab_size") or nested.vocab_size,
            aux_hidden_state_layer_ids=ids,
            speculators_config=make_speculators_config("dspark", num_tokens, verifier),
            **own,
        )
        is_whole = config.draft_vocab_size == nested.vocab_size
        named = {"embed_tokens.weight", "lm_head.weight"} if is_whole else {"embed_tokens.weight"}
        copies = {name: tensor for name, tensor in tensors.items() if name in named}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in named}
        check_names(set(tensors), set(SpeculatorModel.expected_tensors(config)), source.path)
        return Converted(config, tensors, copies=copies)

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        config: Any = checkpoint.config
        tensors = {name: checkpoint.tensors[name] for name in SpeculatorModel.expected_tensors(config)}
        values = layer_values(config.transformer_layer_config)
        if config.trained_causal != config.served_causal:
            values["is_causal"] = config.trained_causal[0]
        return DirectoryContents(
            tensors,
            {
                **values,
                **{key: getattr(config, key) for key in OWN_KEYS},
                "architectures": [self.architecture],
                "model_type": "qwen3",
                "draft_vocab_size": config.draft_vocab_size,
                "dspark_bonus_anchor": not config.sample_from_anchor,
                "target_layer_ids": [layer - 1 for layer in config.aux_hidden_state_layer_ids],
                "dtype": dtype_name(tensors["fc.weight"].dtype),
            },
        )


class SpecForgeFormat(DenseFormat):
    """The same tensors; the drafter's keys stand in `dflash_config`, and every block drafts at its anchor."""

    name = "specforge"
    method = None  # vLLM's class of this name is another drafter
    architecture = OTHER_CLASS

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        config: Any = checkpoint.config
        if not config.sample_from_anchor:
            raise ValueError("sample_from_anchor=False: SpecForge has no such drafters; use --engine dspark")
        dense = super().contents(checkpoint, verifier)
        values = dict(dense.values)
        inside = {key: values.pop(key) for key in INSIDE}
        for key in ("sample_from_anchor", "dspark_bonus_anchor"):
            del values[key]
        return replace(dense, values={**values, "dflash_config": {**FIXED, **inside}})


class DSparkContract(DFlashContract):
    formats = (DenseFormat(), SpecForgeFormat())
    absent_means = {
        "aux_hidden_state_layer_ids": "does not load the checkpoint",
        "mask_token_id": "has no token for masked slots",
        "sample_from_anchor": "takes it for false: every draft would be one token late",
        "markov_rank": "builds no Markov head",
        "markov_head_type": "takes it for vanilla",
    }

    def warn_before_saving(self, config: Any) -> None:
        super().warn_before_saving(config)
        warn_if_not_served(config)

    def option_findings(self, config: Any) -> list[Finding]:
        if config.markov_head_type == SERVED_HEAD and config.markov_rank > 0:
            return []
        return [
            error(
                "not-servable",
                "markov_head_type",
                f"{config.markov_head_type!r} of rank {config.markov_rank}",
                f"{VLLM_HERE} loads a {SERVED_HEAD!r} head with a rank above 0, nothing else",
                f"train with --markov-head-type {SERVED_HEAD}, or decode here",
            )
        ]
