"""Sizes, packed rows, commits and an MLP speculator in loops over the formulas. Shapes: V 40, H 16."""

import torch
import torch.nn.functional as F

from speculators.interfaces import Committed, DraftSampling

VOCAB, HIDDEN, EPS = 40, 16, 1e-4


def packed_batch(lengths, seed=0, padding=0, supervised=0.7):
    """A packed row as the trainer gives it: documents of the given lengths, then padding (with noise in it)."""
    generator = torch.Generator().manual_seed(seed)
    documents = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    total = len(documents)
    return {
        "hidden_states": torch.randn(1, total, HIDDEN, generator=generator),
        "input_ids": torch.randint(0, VOCAB, (1, total), generator=generator),
        "loss_mask": (torch.rand(1, total, generator=generator) < supervised).long(),
        "document_ids": torch.tensor([documents]),
    }


def normed(state, weight):
    return weight * state / (state.pow(2).mean() + EPS).sqrt()


class NaiveMLP:
    """One (step, column) at a time, in double precision."""

    def __init__(self, model):
        self.w = {name: t.detach().double().clone() for name, t in model.state_dict().items()}
        for name, tensor in self.w.items():
            tensor.requires_grad_(not name.startswith("verifier"))
        config = model.config
        self.n, self.tied, self.scale_input = config.num_layers, config.tie_weights, config.scale_input
        self.width = config.intermediate_size

    def of(self, kind, step, part="weight"):
        last = 1 if kind == "proj" else 0
        return self.w[f"{kind}.{min(step, last) if self.tied else step}.{part}"]

    def logits(self, step, state, tokens):
        """After `tokens`, the one that follows the state's and the `step` further ones."""
        s = normed(state.double(), self.w["verifier_norm.weight"])
        if self.scale_input:
            s = s / (s.pow(2).mean() + 1e-6).sqrt() / 2**0.5
        state_weight = 0.5 ** (0.5 / self.n)
        token_weight = ((1 - state_weight**2) * self.width / 2) ** 0.5
        for i in range(step + 1):
            z = self.of("proj", i) @ s + token_weight / state_weight * self.of("emb", i)[tokens[i]]
            z = z / (z.pow(2).mean() + 1e-6).sqrt() * self.of("ln", i) + self.of("ln", i, "bias")
            s = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        return self.of("head", step) @ s

    def verifier_logits(self, state):
        return self.w["verifier_lm_head.weight"] @ normed(state.double(), self.w["verifier_norm.weight"])

    def loss(self, batch, decay, hard):
        tokens, mask, documents = (batch[key][0].tolist() for key in ("input_ids", "loss_mask", "document_ids"))
        states, total = batch["hidden_states"][0], 0.0
        for step in range(self.n):
            losses = []
            for t in range(len(tokens)):
                target = t + 2 + step
                if target >= len(tokens) or documents[t] == -1 or documents[t] != documents[target] or not mask[target]:
                    continue
                logits = self.logits(step, states[t], tokens[t + 1 : target])
                p = F.one_hot(torch.tensor(tokens[target]), VOCAB).double()
                if not hard:
                    p = self.verifier_logits(states[target - 1]).softmax(-1)
                entropy = (p * p.clamp_min(1e-300).log()).sum()
                losses.append(entropy - (p * logits.log_softmax(-1)).sum())
            total = total + decay**step * sum(losses) / len(losses)
        return total


class Request:
    """Tokens and verifier states of one request, made up as it grows."""

    def __init__(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        self.states = torch.randn(100, HIDDEN, generator=generator)
        self.num_seen = 0

    def unseen(self):
        start, self.num_seen = self.num_seen, len(self.tokens)
        states = [self.states[i - 1] if i else torch.zeros(HIDDEN) for i in range(start, len(self.tokens))]
        return self.tokens[start:], states


def commit(requests, active=None):
    """What each request emitted since; right padded with noise that must not matter."""
    fresh = [r.unseen() if active is None or active[b] else ([], []) for b, r in enumerate(requests)]
    width = max(len(tokens) for tokens, _ in fresh)
    token_ids, states = torch.zeros(len(requests), width, dtype=torch.int64), torch.randn(len(requests), width, HIDDEN)
    for b, (tokens, rows) in enumerate(fresh):
        if tokens:
            token_ids[b, : len(tokens)], states[b, : len(rows)] = torch.tensor(tokens), torch.stack(rows)
    counts = torch.tensor([len(tokens) for tokens, _ in fresh])
    return Committed(token_ids, states, counts, torch.tensor([len(r.tokens) for r in requests]))


def sampled(num_rows, temperature=1.0):
    return DraftSampling(torch.full((num_rows,), temperature), torch.Generator().manual_seed(0), probabilistic=True)
