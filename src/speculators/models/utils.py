"""What several algorithms ask about a verifier when they are built from the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig

from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.draft_vocab import norm_is_unit_offset
from speculators.nn.norms import RMSNorm, RMSNormPlusOne
from speculators.proposals import GreedyTokenProposalConfig
from speculators.utils.target_layers import get_verifier_config as get_verifier_config  # public here, by contract
from speculators.utils.target_layers import resolve_target_layer_ids as resolve_target_layer_ids

logger = logging.getLogger(__name__)


def resolve_draft_intermediate_size(verifier_config: PretrainedConfig) -> int:
    """MLP width of a draft layer: the verifier's, or 3 x hidden when the verifier has experts instead of one MLP."""
    size = getattr(verifier_config, "intermediate_size", None)
    has_experts = any(getattr(verifier_config, name, None) for name in ("num_experts", "num_local_experts"))
    if size and not has_experts:
        return int(size)
    size = 3 * verifier_config.hidden_size
    logger.warning("the verifier has no dense MLP to copy: the draft layers get intermediate_size=%d", size)
    return size


def flatten_rope_parameters(rope_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """One set of rope parameters out of one per layer type; draft layers take the sliding layers' set."""
    if not rope_parameters or not all(isinstance(value, dict) for value in rope_parameters.values()):
        return rope_parameters
    return rope_parameters.get("sliding_attention") or next(iter(rope_parameters.values()))


def resolve_verifier_norm_class(verifier: str) -> type[nn.Module]:
    """The RMSNorm that computes what the verifier's norms compute with the weights it stores."""
    return RMSNormPlusOne if norm_is_unit_offset(verifier) else RMSNorm


def conditional_torch_compile(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile` where it pays (an accelerator); the function itself elsewhere. Also `@...(dynamic=True)`."""
    if function is None:
        return lambda decorated: conditional_torch_compile(decorated, **options)
    return torch.compile(function, **options) if torch.cuda.is_available() else function


def resolve_mask_token_id(
    mask_token_id: int | None, verifier: str, vocab_size: int, trust_remote_code: bool = False
) -> int:
    """The token of masked slots: the given one, the tokenizer's mask token, the first row of the embedding that no
    token uses, or (with a warning) a special token of the verifier."""
    if mask_token_id is not None:
        if not 0 <= mask_token_id < vocab_size:
            raise ValueError(
                f"mask_token_id={mask_token_id} is no row of the verifier's embedding; give one in 0..{vocab_size - 1}"
            )
        return mask_token_id
    special: list[int | None] = []
    try:
        tokenizer = AutoTokenizer.from_pretrained(verifier, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        config = get_verifier_config(verifier, trust_remote_code)
        special = [getattr(config, "pad_token_id", None), _first(getattr(config, "eos_token_id", None))]
    else:
        if tokenizer.mask_token_id is not None:
            return int(tokenizer.mask_token_id)
        first_unused = max(tokenizer.get_vocab().values(), default=-1) + 1
        if first_unused < vocab_size:
            return first_unused
        special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    found = next((token for token in special if token is not None), None)
    if found is None:
        raise ValueError(
            f"verifier '{verifier}' has no mask token, no spare embedding row and no pad, eos or unk token; "
            "choose a token that does not occur in text with --mask-token-id"
        )
    logger.warning("masked slots are marked with token %d, which also has another meaning; see --mask-token-id", found)
    return int(found)


def _first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def target_logit_transform(verifier: str) -> tuple[float, float | None]:
    """(scale, softcap) between the verifier's head and its logits: logits = softcap(scale * head(state))."""
    values, _ = PretrainedConfig.get_config_dict(verifier)
    values = values.get("text_config") or values
    scale = float(values.get("logit_scale") or 1.0) / float(values.get("logits_scaling") or 1.0)
    softcap = values.get("final_logit_softcapping")
    return scale, None if softcap is None else float(softcap)


def fitting_embedding(verifier_model: Any, vocab_size: int, hidden_size: int) -> Tensor:
    """The verifier's embedding [V, H], if it has the sizes a drafter was trained for."""
    weight = verifier_model.get_input_embeddings().weight
    expected = (vocab_size, hidden_size)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"the verifier's embedding is {tuple(weight.shape)} and this drafter was trained for {expected} "
            "(vocabulary, hidden size); decode with the verifier it was trained for"
        )
    return weight


def make_speculators_config(
    algorithm: str, num_tokens: int, verifier: str | None, trust_remote_code: bool = False
) -> SpeculatorsConfig | None:
    """For whom and how it drafts: greedily, `num_tokens` a round. None where nobody said for whom."""
    if verifier is None:
        return None
    return SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=num_tokens)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(verifier, trust_remote_code=trust_remote_code),
    )
