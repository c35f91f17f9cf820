"""Layouts of an EAGLE-3 head that one project alone reads, beside the one that vLLM serves (`checkpoint.Eagle3Format`).

Tensors are the same in all. What differs is what config.json can say, and what its reader takes for granted:

layout            read by                  layer ids                         options
specforge         SpecForge                eagle_config, outputs: ours - 1   norm_before_fc, fc_norm, norm_output
sglang            SGLang 0.5 (its source)  the same                          none; three states, no biases
safeailab         SafeAILab/EAGLE          none: 2, n // 2, n - 3            none; three states, no biases

All have one llama layer whose residual starts before the norm. A drafter that a layout cannot say is refused: its
reader would draft something else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from speculators.checkpoint.findings import Finding
from speculators.checkpoint.formats import DirectoryContents, ForeignCheckpoint, OurCheckpoint
from speculators.models.eagle3.checkpoint import FLAGS, IDS, LAYER_IDS_ARE, OUTPUTS, Eagle3Contract, Eagle3Format
from speculators.models.eagle3.config import DEFAULT_NUM_AUX
from speculators.nn.attention import layer_window
from speculators.verifier.config import resolve_target_layer_ids

BIASES = ("attention_bias", "mlp_bias")


class SpecForgeFormat(Eagle3Format):
    name = "specforge"
    method: ClassVar[str | None] = None  # vLLM reads no ids in eagle_config, or counts them otherwise
    conventions = (OUTPUTS,)
    held_flags: ClassVar[tuple[str, ...]] = ("norm_before_fc", "fc_norm", "norm_output")
    """Options that the reader computes with."""

    def recognises(self, source: ForeignCheckpoint) -> bool:
        is_plain = not any(source.values.get(flag) for flag in FLAGS)
        return is_plain == (not self.held_flags) and super().recognises(source)

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        return []  # those of the base say what vLLM reads

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        why = self.refusal(checkpoint.config)
        if why is not None:
            raise ValueError(why)
        served = super().contents(checkpoint, verifier)
        values = dict(served.values)
        layers = self.layer_values(checkpoint.config, values, verifier)
        return replace(served, values={**values, **layers})

    def layer_values(self, config: Any, values: dict[str, Any], verifier: str | None) -> dict[str, Any]:
        """Takes from `values` what the layout does not have; returns how it names the layers to read."""
        ids = values.pop(IDS) or []
        return {"eagle_config": {IDS: [layer - 1 for layer in ids]}, LAYER_IDS_ARE: OUTPUTS}

    def refusal(self, config: Any) -> str | None:
        """Names what the layout's reader would compute otherwise, or not at all."""
        nested = config.transformer_layer_config
        odd: dict[str, Any] = {flag: True for flag in FLAGS if getattr(config, flag) and flag not in self.held_flags}
        odd |= {"model_type": nested.model_type} if nested.model_type != "llama" else {}
        odd |= {"num_hidden_layers": nested.num_hidden_layers} if nested.num_hidden_layers != 1 else {}
        odd |= {"sliding_window": layer_window(nested, 0)} if layer_window(nested, 0) is not None else {}
        if not self.held_flags:
            odd |= {"layers read": config.num_aux} if config.num_aux != DEFAULT_NUM_AUX else {}
            odd |= {key: True for key in BIASES if getattr(nested, key, False)}
        if not odd:
            return None
        return (
            f"the layout {self.name!r} cannot say {odd}, and its reader would draft otherwise; export for vLLM, or "
            "train with --no-norm-before-residual, --draft-arch llama and one layer that sees everything, and for "
            "SGLang and the EAGLE repository without norm_before_fc, fc_norm and norm_output"
        )


class SGLangFormat(SpecForgeFormat):
    """SpecForge's, of a head without options: SGLang serves those."""

    name = "sglang"
    method = "EAGLE3"
    held_flags = ()


class RepositoryFormat(SGLangFormat):
    """Written only: what it writes is read as the head that vLLM serves."""

    name = "safeailab"
    method = "eagle3"

    def recognises(self, source: ForeignCheckpoint) -> bool:
        return False

    def layer_values(self, config: Any, values: dict[str, Any], verifier: str | None) -> dict[str, Any]:
        ids = values.pop(IDS)
        values.pop("eagle_config")
        default = None if verifier is None else resolve_target_layer_ids(None, verifier)
        if ids != default:
            raise ValueError(
                f"the layout {self.name!r} does not say which layers the drafter reads: its reader takes {default} of "
                f"this verifier, and the drafter was trained with {ids}; export for vLLM, or train with the default"
            )
        return {}


class Eagle3HeadContract(Eagle3Contract):
    formats = (Eagle3Format(), SpecForgeFormat(), SGLangFormat(), RepositoryFormat())
