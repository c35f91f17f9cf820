"""DSpark's heads and losses in loops over the formulas, on the loops of `dflash_naive`. Shares no library code."""

import math

import torch
from dflash_naive import NaiveDFlash


def overlap(draft, target):
    p, q = target.exp() / target.exp().sum(), draft.exp() / draft.exp().sum()
    return torch.minimum(p, q).sum()


class NaiveDSpark(NaiveDFlash):
    def __init__(self, weights, nested, *, kind, confidence_reads_markov=True, **backbone):
        super().__init__(weights, nested, **backbone)
        self.kind, self.confidence_reads_markov = kind, confidence_reads_markov
        self.kappa, self.chance = {}, {}

    def phi(self, state, e, h):
        """(phi, next state)"""
        if self.kind == "vanilla":
            return e, state
        if self.kind == "gated":
            gate = self.w["markov_head.gate_proj.weight"] @ torch.cat([h, e]) + self.w["markov_head.gate_proj.bias"]
            return torch.sigmoid(gate) * e, state
        joint = self.w["markov_head.joint_proj.weight"] @ torch.cat([state, e, h])
        gate, candidate, out = (joint + self.w["markov_head.joint_proj.bias"]).split(len(e))
        gate = torch.sigmoid(gate)
        return torch.tanh(out), gate * state + (1 - gate) * torch.tanh(candidate)

    def accept_chance(self, draft, batch, column):
        """sum min(p, q) over the draft vocabulary, p normalised over the whole one."""
        target = self.target(batch, column)
        weights = target.exp() if self.outside_head is None else torch.cat([target, self.others(batch, column)]).exp()
        p, q = (target.exp() / weights.sum()), draft.exp() / draft.exp().sum()
        return torch.minimum(p, q).sum()

    def blocks(self, batch):
        tokens, context, found = batch["input_ids"][0].tolist(), self.context(batch), {}
        first = 0 if self.from_anchor else 1
        for p in self.anchors(batch):
            hidden, logits, kappas = self.block(context, batch, p), {}, {}
            state = torch.zeros(self.w["markov_head.markov_w1.weight"].shape[1], dtype=torch.float64)
            for k in range(first, self.size):
                before = tokens[p + k] if self.from_anchor else tokens[p + k - 1]
                e = self.w["markov_head.markov_w1.weight"][before]
                phi, state = self.phi(state, e, hidden[k])
                logits[k] = self.w["lm_head.weight"] @ hidden[k] + self.w["markov_head.markov_w2.weight"] @ phi
                if "confidence_head.proj.weight" in self.w:
                    read = torch.cat([hidden[k], e]) if self.confidence_reads_markov else hidden[k]
                    kappa = self.w["confidence_head.proj.weight"] @ read + self.w["confidence_head.proj.bias"]
                    kappas[k] = kappa[0]
            found[p] = {k: (logits[k], self.target(batch, column)) for k, column in self.drafting_slots(batch, p)}
            self.kappa[p] = kappas
            self.chance[p] = {k: self.accept_chance(logits[k], batch, c) for k, c in self.drafting_slots(batch, p)}
        return found

    def confidence_loss(self, found, gamma, label):
        """Binary cross entropy against label(draft, target), always with the fixed decay."""
        first = 0 if self.from_anchor else 1
        total, count = 0.0, 0
        for p, slots in found.items():
            for k, (draft, target) in slots.items():
                a, y = torch.sigmoid(self.kappa[p][k]), label(draft.detach(), target.detach())
                total = total - (y * a.log() + (1 - y) * (1 - a).log()) * math.exp(-(k - first) / gamma)
                count += 1
        return total / (count + 1e-8)
