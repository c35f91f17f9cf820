"""The one place that knows what a verifier is: its config, the weights a drafter takes from its files, loading it,
reading its residual stream.

    config     text part, layers, final norm, logit transform
    loading    the model, or its embedding, head and final norm alone, read from files
    capture    its residual stream, and logits made from it
"""

from speculators.verifier.capture import (
    CapturedStates,
    VerifierParts,
    capture_states,
    check_reproduces_logits,
    decoder_of,
    logits_from_last_hidden,
    turn_of,
    verifier_parts,
)
from speculators.verifier.config import (
    LogitTransform,
    get_verifier_config,
    logit_transform,
    open_verifier_config,
    resolve_target_layer_ids,
    text_config,
)
from speculators.verifier.loading import VerifierWeights, load_verifier, read_verifier_weights

__all__ = [
    "CapturedStates",
    "LogitTransform",
    "VerifierParts",
    "VerifierWeights",
    "capture_states",
    "check_reproduces_logits",
    "decoder_of",
    "get_verifier_config",
    "load_verifier",
    "logit_transform",
    "logits_from_last_hidden",
    "open_verifier_config",
    "read_verifier_weights",
    "resolve_target_layer_ids",
    "text_config",
    "turn_of",
    "verifier_parts",
]
