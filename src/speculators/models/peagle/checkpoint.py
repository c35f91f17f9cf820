"""P-EAGLE on disk: our directory and SpecForge's. vLLM serves both as EAGLE-3 with parallel drafting; the contract says
what it misreads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from speculators.checkpoint.findings import VLLM_HERE, Finding, error, mask_token_findings, warning
from speculators.checkpoint.formats import DirectoryContents, OurCheckpoint, Serving, drafts_per_round
from speculators.models.eagle3.checkpoint import CONVENTIONS, Eagle3Contract, Eagle3Format
from speculators.models.peagle.config import PEagleSpeculatorConfig

MASK_TOKENS = ("mask_token_id", "pard_token", "ptd_token_id")


def write_fc_norm(nested: Any, fc_norm: bool) -> None:
    """Writes `fc_norm` inside the nested config too: vLLM does not forward the top-level key of a peagle config
    (speculators/algos.py), but every key inside `transformer_layer_config` becomes one of the draft's config."""
    if fc_norm:
        nested.fc_norm = True


class PEagleFormat(Eagle3Format):
    """SpecForge's format: the tensors of its EAGLE-3 and `mask_hidden`. The mask token has several names."""

    name = "peagle"
    algorithm = "peagle"
    aliases = ("specforge",)
    conventions = CONVENTIONS
    has_mask_hidden = True
    options = (*Eagle3Format.options, "mask_token_id")

    def config_of(self, values: Mapping[str, Any], **fields: Any) -> PEagleSpeculatorConfig:
        token = next((values[key] for key in MASK_TOKENS if values.get(key) is not None), None)
        if token is None:
            raise ValueError(
                f"config.json names no mask token under any of {MASK_TOKENS}: say it with --algorithm-kwargs "
                """'{"mask_token_id": N}'"""
            )
        write_fc_norm(fields["transformer_layer_config"], fields["fc_norm"])
        return PEagleSpeculatorConfig(mask_token_id=token, **fields)

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        # the class names of EAGLE-3: with method "eagle3" vLLM puts Eagle3 before any other
        eagle3, token = super().contents(checkpoint, verifier), checkpoint.config.mask_token_id
        return replace(eagle3, values={**eagle3.values, "mask_token_id": token, "pard_token": token})

    def serving(self, config: Any, directory: str, verifier: str) -> Serving:
        chain = super().serving(config, directory, verifier)
        assert chain is not None and chain.speculative_config is not None
        return Serving(verifier, {**chain.speculative_config, "parallel_drafting": True})


class PEagleContract(Eagle3Contract):
    formats = (PEagleFormat(),)
    training_keys = Eagle3Contract.training_keys | set(PEagleSpeculatorConfig.training_fields)
    absent_means = {"mask_token_id": "does not load the checkpoint", "draft_vocab_size": "takes the verifier's"}

    def shared_tensors(self, config: Any) -> frozenset[str]:
        """Leaves out the embedding: it is trained, and engines would use the verifier's instead."""
        return super().shared_tensors(config) - {"embed_tokens.weight"}

    def findings(self, values: Mapping[str, Any], config: Any, format_name: str) -> list[Finding]:
        found = super().findings(values, config, format_name)
        found += mask_token_findings(values, config.target_vocab_size)
        nested = config.transformer_layer_config
        if config.fc_norm and not getattr(nested, "fc_norm", False):
            found.append(
                error(
                    "option-dropped",
                    "fc_norm",
                    "true at the top level only",
                    f"{VLLM_HERE} does not pass it on for this type",
                    "write fc_norm inside transformer_layer_config too",
                )
            )
        told, trained = drafts_per_round(config), config.training_value("num_depths")
        if told is not None and told > trained:
            found.append(
                warning(
                    "drafts-untrained",
                    "speculators_config.proposal_methods[0].speculative_tokens",
                    str(told),
                    f"{trained} depths were trained; deeper drafts are guesses",
                    f"write at most {trained}",
                )
            )
        return found

    def completed(self, config: Any) -> Any:
        config = super().completed(config)
        write_fc_norm(config.transformer_layer_config, config.fc_norm)
        return config
