"""The deep check: loads both models and runs them on a few tokens. Every weight and score must be a number.

Shapes: V verifier vocabulary, H hidden size, D width of the states that are read, T tokens, K drafts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.checkpoint.findings import Finding, error
from speculators.deploy.verifier_check import DAMAGED
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.model import SpeculatorModel
from speculators.verifier import capture_states, load_verifier, verifier_parts

NUM_RUN_TOKENS = 24
"""Of each text that is tried."""
NUM_DRAFTS = 3
TOKEN_ID_STEPS = (1, 7, 31)
"""Three texts, of neighbouring and of distant token ids."""


def deep_findings(checkpoint: str | os.PathLike[str], verifier: str) -> list[Finding]:
    """Reports weights and scores of either model that are not finite; in float32, so that no range is too narrow.

    Raises `ValueError` for a model that cannot be loaded."""
    model = load_verifier(verifier, dtype=torch.float32)
    found = [*weight_findings(model)]
    drafter = SpeculatorModel.from_pretrained(str(checkpoint), verifier=verifier, dtype=torch.float32)
    vocab_size = verifier_parts(model).config.vocab_size
    for step in TOKEN_ID_STEPS:
        token_ids_T = torch.arange(0, vocab_size, step)[:NUM_RUN_TOKENS]
        found += score_findings(model, drafter, token_ids_T)
    return list(dict.fromkeys(found))


def weight_findings(model: nn.Module) -> Iterator[Finding]:
    """Of the verifier; the drafter's are read by every check."""
    for name, weight in model.named_parameters():
        num_bad = int((~weight.isfinite()).sum())
        if num_bad:
            rule = "every weight must be a number"
            yield error(
                "weight-not-finite", f"the verifier's {name}", f"{num_bad} of {weight.numel()} values", rule, DAMAGED
            )


@torch.no_grad()
def score_findings(model: PreTrainedModel, drafter: SpeculatorModel, token_ids_T: Tensor) -> Iterator[Finding]:
    """A forward of the verifier over one text, and of the drafter over the states that it gave."""
    spec = CaptureSpec(drafter.capture.aux_layer_ids, last_hidden=True)
    with capture_states(model, spec) as states:
        logits_TV = model(input_ids=token_ids_T[None], use_cache=False).logits[0]
    found = f"NaN, infinite or all -inf for tokens {token_ids_T[0]}..{token_ids_T[-1]}"
    rule = "every position must have a largest score"
    if not logits_TV.amax(-1).isfinite().all():
        yield error("scores-not-finite", "the verifier's scores", found, rule, DAMAGED)
        return
    assert states.last_hidden is not None
    num_known = len(token_ids_T) - NUM_DRAFTS - 1  # states of the last known token and of drafts: nobody has them
    aux_TD = None if states.aux is None else states.aux[0].clone()
    last_TH = states.last_hidden[0].clone()
    for rows in (aux_TD, last_TH):
        if rows is not None:
            rows[num_known:] = 0
    logits_KV = drafter.draft_logits(VerifierStates(token_ids_T, aux_TD, last_TH), NUM_DRAFTS)
    if logits_KV is not None and not logits_KV.amax(-1).isfinite().all():
        yield error("drafts-not-finite", "the drafter's scores", found, rule, DAMAGED)
