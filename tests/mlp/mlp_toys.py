"""An MLP speculator in loops over the formulas."""

import torch
from last_state_toys import NaiveHeads, normed


class NaiveMLP(NaiveHeads):
    def __init__(self, model):
        super().__init__(model)
        config = model.config
        self.num_heads, self.tied, self.scale_input = config.num_layers, config.tie_weights, config.scale_input
        self.width = config.intermediate_size

    def of(self, kind, step, part="weight"):
        last = 1 if kind == "proj" else 0
        return self.w[f"{kind}.{min(step, last) if self.tied else step}.{part}"]

    def logits(self, head, state, tokens):
        s = normed(state.double(), self.w["verifier_norm.weight"])
        if self.scale_input:
            s = s / (s.pow(2).mean() + 1e-6).sqrt() / 2**0.5
        state_weight = 0.5 ** (0.5 / self.num_heads)
        token_weight = ((1 - state_weight**2) * self.width / 2) ** 0.5
        for i in range(head + 1):
            z = self.of("proj", i) @ s + token_weight / state_weight * self.of("emb", i)[tokens[i]]
            z = z / (z.pow(2).mean() + 1e-6).sqrt() * self.of("ln", i) + self.of("ln", i, "bias")
            s = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        return self.of("head", head) @ s
