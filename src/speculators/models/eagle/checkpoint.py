"""EAGLE on disk: our directory, and the native one of the EAGLE repository, which vLLM serves with method "eagle".

native                              ours
fc.weight, fc.bias                  fusion_fc.*             (fusion_bias iff there is a bias)
layers.0.*                          transformer.*
embed_layernorm.weight              embedding_layernorm.weight            (layernorms iff one of these three)
lm_head_layernorm.weight            pre_lm_head_layernorm.weight
hidden_layernorm.weight             transformer.input_layernorm.weight
embed_tokens.weight                 -                       (the verifier's)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from speculators.checkpoint.findings import VLLM_HERE, Finding, error
from speculators.checkpoint.formats import (
    CheckpointContract,
    CheckpointFormat,
    Converted,
    DirectoryContents,
    ForeignCheckpoint,
    OurCheckpoint,
    dtype_name,
    refuse_missing,
)
from speculators.checkpoint.tensors import stored_tensors
from speculators.model import SpeculatorModel
from speculators.models.draft_model import complete_layer_config, layer_config_of, layer_values, with_biases
from speculators.models.eagle.config import NUM_TOKENS, EagleSpeculatorConfig, layer_architecture
from speculators.nn.attention import layer_window
from speculators.utils.files import read_json_object
from speculators.verifier.config import make_speculators_config

NATIVE = "eagle"
SGLANG_CLASS = "LlamaForCausalLMEagle"
FUSION = "fc.weight"
UNLOADABLE = ("lm_head.weight", "layers.0.input_layernorm.weight")
"""vLLM's EAGLE class has no such parameters, and refuses the names."""
EXTRA_NORMS = {
    "embed_layernorm.weight": "embedding_layernorm.weight",
    "lm_head_layernorm.weight": "pre_lm_head_layernorm.weight",
    "hidden_layernorm.weight": "transformer.input_layernorm.weight",
}
VERIFIERS_OWN = ("embed_tokens.weight", "lm_head.weight")
NOT_LAYER_KEYS = ("architectures", "auto_map", "bias", "qkv_bias", "dtype", "torch_dtype", "transformers_version")
NATIVE_LAYER, OUR_LAYER = "layers.0.", "transformer."


def complete_eagle_config(config: Any) -> Any:
    """Returns a complete copy of the nested config: one layer that sees everything.

    vLLM's EAGLE layers count on from the verifier's, which no `layer_types` of one entry survives (llama.py), and
    without the key they do not slide: so a drafter whose layer slides could not be served as it was trained.
    """
    if config.num_hidden_layers != 1:
        raise ValueError(f"num_layers={config.num_hidden_layers}: an EAGLE drafter is one layer; give num_layers=1")
    config = complete_layer_config(config)
    config.layer_types, config.sliding_window, config.use_sliding_window = ["full_attention"], None, False
    return config


def native_to_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames native tensors to ours. Raises `ValueError` on names that no EAGLE drafter of one layer has."""
    ours = {}
    for name, tensor in tensors.items():
        if name in EXTRA_NORMS:
            ours[EXTRA_NORMS[name]] = tensor
        elif name.startswith("fc."):
            ours["fusion_" + name] = tensor
        elif name.startswith(NATIVE_LAYER):
            ours[OUR_LAYER + name.removeprefix(NATIVE_LAYER)] = tensor
        else:
            raise ValueError(f"tensor {name!r} is of no EAGLE drafter with one layer; known are fc.*, layers.0.*")
    return ours


def ours_to_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    norms = {ours: native for native, ours in EXTRA_NORMS.items()}
    native = {}
    for name, tensor in tensors.items():
        renamed = norms.get(name) or name.replace("fusion_fc.", "fc.").replace(OUR_LAYER, NATIVE_LAYER)
        native[renamed] = tensor
    return native


def refused_layer(nested: Any) -> str | None:
    """Says why a layer is of no EAGLE class, nor of the layout."""
    if nested.model_type == "llama" and layer_window(nested, 0) is None:
        return None
    return (
        f"the EAGLE repository's layout, and engines' classes, have llama layers that see everything, not model_type="
        f"{nested.model_type!r} with a window of {layer_window(nested, 0)}; use --engine speculators, or train with "
        "--draft-arch llama"
    )


def native_config(config: EagleSpeculatorConfig, dtype: torch.dtype) -> dict[str, Any]:
    values = layer_values(config.transformer_layer_config)
    for key in ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"):
        values.pop(key, None)
    return {
        **values,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "bias": config.fusion_bias,
        "dtype": dtype_name(dtype),
    }


def save_native(config: EagleSpeculatorConfig, tensors: dict[str, Tensor], path: str | Path) -> Path:
    """Writes the directory to serve with `{"method": "eagle", "model": path}`. Raises `ValueError` for a drafter that
    vLLM does not refuse: it fails on a name or serves another drafter."""
    why = EagleFormat().refusal(config)
    if why is not None:
        raise ValueError(f"vLLM cannot run this drafter: {why}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    native_contents(config, tensors).write(path)
    return path


def native_contents(config: EagleSpeculatorConfig, tensors: Mapping[str, Tensor]) -> DirectoryContents:
    """Returns the EAGLE repository's layout, which has a place for a bias of `fc` and for HASS's norms; vLLM has not.

    Raises `ValueError` for a layer that the layout cannot describe.
    """
    why = refused_layer(config.transformer_layer_config)
    if why is not None:
        raise ValueError(why)
    names = SpeculatorModel.expected_tensors(config).keys()
    refuse_missing(names - tensors.keys())
    native = ours_to_native({name: tensors[name] for name in names})
    return DirectoryContents(native, native_config(config, native["fc.weight"].dtype))


def read_native(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns config fields and tensors of a native directory, without those that are the verifier's."""
    path = Path(path)
    values = read_json_object(path / "config.json")
    tensors = stored_tensors(path)
    ours = native_to_ours({name: tensor for name, tensor in tensors.items() if name not in VERIFIERS_OWN})
    if values.get("num_hidden_layers", 1) != 1:
        raise ValueError(f"{path} has num_hidden_layers={values['num_hidden_layers']}: an EAGLE drafter is one layer")
    nested = layer_config_of({**values, "num_hidden_layers": 1}, NOT_LAYER_KEYS, model_type="llama")
    ours = with_biases(nested, ours)
    fields = {
        "transformer_layer_config": complete_layer_config(nested),
        "layernorms": bool(ours.keys() & set(EXTRA_NORMS.values())),
        "fusion_bias": "fusion_fc.bias" in ours,
    }
    return fields, ours


class EagleFormat(CheckpointFormat):
    name = NATIVE
    aliases = ("safeailab",)
    method = "eagle"
    reader: ClassVar[str] = "vLLM's method 'eagle'"
    holds_bias: ClassVar[bool] = False
    """Whether the reader's `fc` has a bias."""
    has_sglang_class: ClassVar[bool] = False
    """Whether config.json names the class that SGLang looks for."""

    def recognises(self, source: ForeignCheckpoint) -> bool:
        names = source.tensor_names
        first = "layers.0.self_attn.q_proj.weight"
        others = {"hidden_norm.weight", "norm.weight", "layers.0.hidden_norm.weight", "d2t"}
        is_head = FUSION in names and first in names and not (names & others)
        return is_head and (SGLANG_CLASS in source.architectures) == self.has_sglang_class

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        found = [
            error(
                "name-unloadable",
                name,
                "is in the checkpoint",
                f"the EAGLE class of {VLLM_HERE} has no such parameter and refuses to load",
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
                    f"{VLLM_HERE} puts Eagle before it, and has the class EagleLlamaForCausalLM alone",
                    'write "architectures": ["LlamaForCausalLM"]',
                )
            )
        if "layer_types" in source.values:
            found.append(
                error(
                    "layer-types-short",
                    "layer_types",
                    repr(source.values["layer_types"]),
                    f"EAGLE layers of {VLLM_HERE} count on from the verifier's, past the end of this list",
                    "leave it out",
                )
            )
        return found

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        fields, tensors = read_native(source.path)
        recorded = make_speculators_config("eagle", NUM_TOKENS, verifier)
        config = EagleSpeculatorConfig(**fields, speculators_config=recorded)
        config.transformer_layer_architecture = layer_architecture(config)
        copies = {name: tensor for name, tensor in source.tensors().items() if name in VERIFIERS_OWN}
        return Converted(config, tensors, copies=copies)

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        return native_contents(checkpoint.config, checkpoint.tensors)  # type: ignore[arg-type]

    def refusal(self, config: Any) -> str | None:
        if config.fusion_bias and not self.holds_bias:
            return (
                f"fusion_bias=True, and the fc of {self.reader} has no bias (dropping ours would change the drafts); "
                "decode with speculators, or train with fusion_bias=False"
            )
        if config.layernorms:
            return f"layernorms=True: {self.reader} has no such norms; decode with speculators, or train without"
        return refused_layer(config.transformer_layer_config)


class SGLangFormat(EagleFormat):
    """The same tensors under the class name that SGLang 0.5 looks for (srt/models/llama_eagle.py); its `fc` has the
    bias that config.json says. It has no further norms."""

    name = "sglang"
    method = "EAGLE"
    reader = "SGLang"
    holds_bias = has_sglang_class = True

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        why = self.refusal(checkpoint.config)
        if why is not None:
            raise ValueError(why)
        served = super().contents(checkpoint, verifier)
        return replace(served, values={**served.values, "architectures": [SGLANG_CLASS]})

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        return []  # those of the base say what vLLM reads


class EagleContract(CheckpointContract):
    formats = (EagleFormat(), SGLangFormat())
    served_format = NATIVE
