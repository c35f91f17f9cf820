"""MLP speculators of other projects (IBM, fms-fsdp): read, not written. No vLLM of today serves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from speculators.checkpoint_contract import CheckpointContract
from speculators.checkpoint_format import CheckpointFormat, Converted, ForeignCheckpoint
from speculators.models.mlp.config import OLD_NAMES, MLPSpeculatorConfig
from speculators.models.utils import get_verifier_config, recorded

PREFIX = "speculator."
THEIR_DEFAULTS = {"tie_weights": False, "scale_input": False}
FIELDS = ("vocab_size", "tie_weights", "scale_input", *OLD_NAMES)


class FmsFormat(CheckpointFormat):
    name: ClassVar[str] = "mlp_speculator"

    def recognises(self, source: ForeignCheckpoint) -> bool:
        return source.values.get("model_type") == self.name

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        values: Mapping[str, Any] = {**THEIR_DEFAULTS, **source.values}
        fields = {key: values[key] for key in FIELDS if key in values}
        if verifier is not None:
            fields["speculators_config"] = recorded("mlp", values["n_predict"], verifier, trust_remote_code=False)
            fields["rms_norm_eps"] = get_verifier_config(verifier).rms_norm_eps
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in source.tensors().items()}
        return Converted(MLPSpeculatorConfig(**fields), tensors)


class MLPContract(CheckpointContract):
    formats = (FmsFormat(),)
