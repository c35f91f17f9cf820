"""Prompts of several lengths, and q of drafts by the training forward."""

import torch
from drafter_toys import HIDDEN

from speculators.models.eagle.training import unroll
from speculators.nn.routes import DENSE

PROMPTS = [[3, 5, 7], [11] * 40, [2], [9, 8, 7, 6, 5, 4]]


def trained(model, request, drafts):
    """q of each draft by the training forward, the drafts forced."""
    tokens = torch.tensor([*request.tokens[1:], *drafts])[None]
    states = torch.zeros(1, tokens.shape[1], HIDDEN)
    column = len(request.tokens) - 2
    states[0, : column + 1] = request.states[: column + 1]
    batch = model.packed_batch(states, tokens, verifier_last_hidden_states=states)
    with torch.no_grad():
        features = model.network.combine(batch.aux_TD)
        steps = unroll(model.network, batch, features, torch.arange(tokens.shape[1]), len(drafts), False, DENSE)
        return model.lm_head(torch.stack([step.normed_RH[column] for step in steps])).softmax(-1)
