"""How vLLM serves Medusa: by a directory of the heads, with method "medusa"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speculators.checkpoint.findings import Finding, error
from speculators.checkpoint.formats import (
    CheckpointContract,
    CheckpointFormat,
    Converted,
    ForeignCheckpoint,
    OurCheckpoint,
    Serving,
)
from speculators.models.last_state_model import norm_eps_of
from speculators.models.medusa.checkpoint import read_native, save_native, to_our_name
from speculators.models.medusa.config import MedusaSpeculatorConfig
from speculators.models.utils import get_verifier_config, make_speculators_config

NATIVE = "medusa"


class MedusaFormat(CheckpointFormat):
    name = NATIVE

    def recognises(self, source: ForeignCheckpoint) -> bool:
        return {"blocks.0.layers.0.weight", "lm_heads.0.weight"} <= {to_our_name(name) for name in source.tensor_names}

    def findings(self, source: ForeignCheckpoint) -> list[Finding]:
        found = []
        biased = sorted(name for name in source.tensor_names if name.endswith(".bias"))
        if biased and not source.values.get("medusa_fc_bias"):
            found.append(
                error(
                    "option-dropped",
                    "medusa_fc_bias",
                    f"not true, and there is {biased[0]}",
                    "vLLM then leaves every bias out, silently",
                    'write "medusa_fc_bias": true',
                )
            )
        if source.values.get("model_type") != "medusa":
            found.append(
                error(
                    "key-missing",
                    "model_type",
                    repr(source.values.get("model_type")),
                    "vLLM finds its config class by it",
                    'write "model_type": "medusa"',
                )
            )
        return found

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        fields, tensors = read_native(source.path)
        if verifier is not None:
            fields["rms_norm_eps"] = norm_eps_of(get_verifier_config(verifier), MedusaSpeculatorConfig)
            fields["speculators_config"] = make_speculators_config("medusa", fields["num_heads"], verifier)
        return Converted(MedusaSpeculatorConfig(**fields), tensors)

    def write(self, checkpoint: OurCheckpoint, directory: Path, verifier: str | None) -> None:
        save_native(checkpoint.config, dict(checkpoint.tensors), directory)  # type: ignore[arg-type]

    def serving(self, config: Any, directory: str, verifier: str) -> Serving:
        # vLLM takes as many heads as this says: more than there are fails, fewer drops the last ones
        method = {"method": "medusa", "model": directory, "num_speculative_tokens": config.num_heads}
        return Serving(verifier, method)


class MedusaContract(CheckpointContract):
    formats = (MedusaFormat(),)
    served_format = NATIVE
