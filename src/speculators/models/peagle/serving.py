"""What vLLM misreads of a P-EAGLE checkpoint. It serves our directory, as EAGLE-3 with parallel drafting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from speculators.checkpoint_format import CheckpointFormat
from speculators.findings import Finding, error
from speculators.models.eagle3.serving import Eagle3Contract
from speculators.models.peagle.checkpoint import write_fc_norm
from speculators.models.peagle.config import PEagleSpeculatorConfig


class PEagleContract(Eagle3Contract):
    formats: ClassVar[tuple[CheckpointFormat, ...]] = ()
    training_keys: ClassVar[frozenset[str]] = Eagle3Contract.training_keys | set(PEagleSpeculatorConfig.training_fields)
    absent_means: ClassVar[Mapping[str, str]] = {
        "mask_token_id": "does not load the checkpoint",
        "draft_vocab_size": "takes the verifier's",
    }

    def shared_tensors(self, config: Any) -> frozenset[str]:
        """Never the embedding: engines would take the verifier's for the trained one."""
        return super().shared_tensors(config) - {"embed_tokens.weight"}

    def findings(self, values: Mapping[str, Any], config: Any) -> list[Finding]:
        found = super().findings(values, config)
        nested = config.transformer_layer_config
        if values.get("mask_token_id", 0) is None:
            found.append(
                error("mask-token-missing", "mask_token_id", "null", "masked slots need a token",
                      "write the id the drafter was trained with")
            )  # fmt: skip
        if config.fc_norm and not getattr(nested, "fc_norm", False):
            found.append(
                error(
                    "option-dropped", "fc_norm", "true at the top level only", "vLLM does not pass it on for this type",
                    "write fc_norm inside transformer_layer_config too",
                )
            )  # fmt: skip
        return found

    def completed(self, config: Any) -> Any:
        config = super().completed(config)
        write_fc_norm(config.transformer_layer_config, config.fc_norm)
        return config
