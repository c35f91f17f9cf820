"""How vLLM serves EAGLE: by the directory of the EAGLE repository, with method "eagle"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.checkpoint.findings import Finding, error, warning
from speculators.checkpoint.formats import (
    CheckpointContract,
    CheckpointFormat,
    Converted,
    ForeignCheckpoint,
    OurCheckpoint,
)
from speculators.models.eagle.checkpoint import check_servable, read_native, save_native
from speculators.models.eagle.config import NUM_TOKENS, EagleSpeculatorConfig, layer_architecture
from speculators.models.utils import make_speculators_config

NATIVE = "eagle"
FUSION = "fc.weight"
UNLOADABLE = ("lm_head.weight", "layers.0.input_layernorm.weight")
"""vLLM's EAGLE class has no such parameters, and refuses the names."""


class EagleFormat(CheckpointFormat):
    name = NATIVE
    method = "eagle"

    def recognises(self, source: ForeignCheckpoint) -> bool:
        names = source.tensor_names
        first = "layers.0.self_attn.q_proj.weight"
        others = {"hidden_norm.weight", "norm.weight", "layers.0.hidden_norm.weight", "d2t"}
        return FUSION in names and first in names and not (names & others)

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        found = [
            error(
                "name-unloadable",
                name,
                "is in the checkpoint",
                "vLLM's EAGLE class has no such parameter and refuses to load",
                "leave it out: the verifier's is used",
            )
            for name in UNLOADABLE
            if name in source.tensor_names
        ]
        if source.values.get("architectures") != ["LlamaForCausalLM"]:
            found.append(
                error(
                    "architecture-unknown",
                    "architectures",
                    repr(source.values.get("architectures")),
                    "vLLM puts Eagle before it, and EagleLlamaForCausalLM is the class there is",
                    'write "architectures": ["LlamaForCausalLM"]',
                )
            )
        if "layer_types" in source.values:
            found.append(
                error(
                    "layer-types-short",
                    "layer_types",
                    repr(source.values["layer_types"]),
                    "vLLM's EAGLE layers count on from the verifier's, past the end of this list",
                    "leave it out",
                )
            )
        return found

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        fields, tensors = read_native(source.path)
        recorded = make_speculators_config("eagle", NUM_TOKENS, verifier)
        config = EagleSpeculatorConfig(**fields, speculators_config=recorded)
        config.transformer_layer_architecture = layer_architecture(config)
        return Converted(config, tensors)

    def write(self, checkpoint: OurCheckpoint, directory: Path, verifier: str | None) -> None:
        save_native(checkpoint.config, dict(checkpoint.tensors), directory)  # type: ignore[arg-type]


class EagleContract(CheckpointContract):
    formats = (EagleFormat(),)
    served_format = NATIVE

    def findings(self, values: Mapping[str, Any], config: Any) -> list[Finding]:
        try:
            check_servable(config)
        except ValueError as problem:
            return [warning("not-servable", "config.json", str(problem), "no engine can serve it", "decode it here")]
        return []
