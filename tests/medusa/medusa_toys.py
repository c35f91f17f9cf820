"""Sizes, packed rows, commits and a Medusa in loops over the formulas. Shapes: V 40, H 16."""

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


class NaiveMedusa:
    """One (head, column) at a time, in double precision."""

    def __init__(self, model):
        self.w = {name: t.detach().double().clone() for name, t in model.state_dict().items()}
        for name, tensor in self.w.items():
            tensor.requires_grad_(not name.startswith("verifier"))
        self.num_heads, self.num_layers = model.config.num_heads, model.config.num_hidden_layers

    def logits(self, head, state):
        r = normed(state.double(), self.w["verifier_norm.weight"])
        for j in range(self.num_layers):
            u = self.w[f"blocks.{head}.layers.{j}.weight"] @ r + self.w[f"blocks.{head}.layers.{j}.bias"]
            r = r + u / (1 + torch.exp(-u))
        return self.w[f"lm_heads.{head}.weight"] @ r

    def verifier_logits(self, state):
        return self.w["verifier_lm_head.weight"] @ normed(state.double(), self.w["verifier_norm.weight"])

    def loss(self, batch, decay, hard):
        tokens, mask, documents = (batch[key][0].tolist() for key in ("input_ids", "loss_mask", "document_ids"))
        states, total, correct = batch["hidden_states"][0], 0.0, {}
        for head in range(self.num_heads):
            losses = []
            for t in range(len(tokens)):
                target = t + 2 + head
                if target >= len(tokens) or documents[t] == -1 or documents[t] != documents[target] or not mask[target]:
                    continue
                logits = self.logits(head, states[t])
                p = F.one_hot(torch.tensor(tokens[target]), VOCAB).double()
                if not hard:
                    p = self.verifier_logits(states[target - 1]).softmax(-1)
                entropy = (p * p.clamp_min(1e-300).log()).sum()
                losses.append(entropy - (p * logits.log_softmax(-1)).sum())
                correct[head, t] = bool(logits.argmax() == p.argmax())
            total = total + decay**head * sum(losses) / len(losses)
        return total, correct


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
