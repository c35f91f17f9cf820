"""Requests that grow as a test says, what is committed of them, and q of drafts by the training forward."""

import torch
from eagle1_toys import HIDDEN, VOCAB

from speculators.interfaces import Committed, DraftSampling
from speculators.models.eagle.training import Objective, PackedBatch, unroll

PROMPTS = [[3, 5, 7], [11] * 40, [2], [9, 8, 7, 6, 5, 4]]


class Sequence:
    """Tokens and last states of one request, made up as it grows."""

    def __init__(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        self.states = torch.randn(200, HIDDEN, generator=generator)
        self.num_seen = 0

    def unseen(self):
        start, self.num_seen = self.num_seen, len(self.tokens)
        states = [self.states[i - 1] if i else torch.zeros(HIDDEN) for i in range(start, len(self.tokens))]
        return self.tokens[start:], states


def commit(sequences, active=None):
    """A `Committed` of what each sequence emitted since; right padded with noise that must not matter."""
    fresh = [s.unseen() if active is None or active[b] else ([], []) for b, s in enumerate(sequences)]
    width = max(len(tokens) for tokens, _ in fresh)
    token_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    states = torch.randn(len(sequences), width, HIDDEN) * 9
    for b, (tokens, rows) in enumerate(fresh):
        if tokens:
            token_ids[b, : len(tokens)] = torch.tensor(tokens)
            states[b, : len(rows)] = torch.stack(rows)
    counts = torch.tensor([len(tokens) for tokens, _ in fresh])
    return Committed(token_ids, states, counts, torch.tensor([len(s.tokens) for s in sequences]))


def sampling(num_rows):
    return DraftSampling(torch.ones(num_rows), torch.Generator().manual_seed(0), probabilistic=True)


def trained(model, sequence, drafts):
    """q of each draft by the training forward, the drafts forced."""
    tokens = torch.tensor([*sequence.tokens[1:], *drafts])[None]
    states = torch.zeros(1, tokens.shape[1], HIDDEN)
    column = len(sequence.tokens) - 2
    states[0, : column + 1] = sequence.states[: column + 1]
    batch = PackedBatch.of(states, tokens, None, None, None, states)
    objective = Objective({}, 0.0, len(drafts), False, 0.0)
    with torch.no_grad():
        features = model.network.combine(batch.states_TH)
        steps = unroll(model.network, batch, features, torch.arange(tokens.shape[1]), objective, "eager")
        return model.lm_head(torch.stack([step.normed_RH[column] for step in steps])).softmax(-1)
