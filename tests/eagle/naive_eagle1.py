"""EAGLE's and HASS's training loss in Python loops, from the formulas alone: one query, one head, one key at a time.

Shares no code with the library. Reads weights by their names on disk. Everything in float64.
"""

import torch
from naive_layers import attend, rms_norm, rotate


class NaiveEagle:
    """`embedding`, `head`, `norm` are the verifier's tensors."""

    def __init__(self, weights, nested, embedding, head, norm):
        self.w = {name: w.double().detach().requires_grad_() for name, w in weights.items()}
        self.embedding, self.head, self.gain = embedding.double(), head.double(), norm.double()
        self.nested, self.eps, self.theta = nested, nested.rms_norm_eps, nested.rope_parameters["rope_theta"]

    def norm(self, name, x):
        """The norm of that name, if there is one."""
        return rms_norm(x, self.w[name + ".weight"], self.eps) if name + ".weight" in self.w else x

    def feature(self, last_hidden):
        return rms_norm(last_hidden.double(), self.gain, self.eps)

    def linear(self, name, x):
        out = self.w[name + ".weight"] @ x
        return out + self.w[name + ".bias"] if name + ".bias" in self.w else out

    def heads(self, kind, x, position):
        heads = list(self.linear(f"transformer.self_attn.{kind}_proj", x).split(self.nested.head_dim))
        if kind == "v":
            return heads
        return [rotate(self.norm(f"transformer.self_attn.{kind}_norm", head), position, self.theta) for head in heads]

    def entry(self, token, feature):
        """What the layer reads."""
        embed = self.norm("embedding_layernorm", self.embedding[token])
        return self.linear("fusion_fc", torch.cat([embed, feature]))

    def key_value(self, h, position):
        x = self.norm("transformer.input_layernorm", h)
        return self.heads("k", x, position), self.heads("v", x, position)

    def layer(self, h, position, visible):
        queries = self.heads("q", self.norm("transformer.input_layernorm", h), position)
        attended = attend(queries, visible, self.nested.num_key_value_heads)
        a = h + self.linear("transformer.self_attn.o_proj", attended)
        x = self.norm("transformer.post_attention_layernorm", a)
        gate = self.linear("transformer.mlp.gate_proj", x)
        return a + self.linear(
            "transformer.mlp.down_proj", gate * torch.sigmoid(gate) * self.linear("transformer.mlp.up_proj", x)
        )

    def logits(self, feature):
        return self.head @ self.norm("pre_lm_head_layernorm", feature)

    def hass(self, tokens, states, num_forwards, *, detach=True):
        """HASS as its paper has it, for one document: {(m, t): predicted feature} of forward m + 1 at column t.

        tokens[t] = x[t+1], states[t] = y[t]. Stream 0 is the true features, stream j the predictions of forward j,
        moved right by one. Query t of forward m + 1 is made of (x[t+1], stream m at t) and sees stream 0 at columns
        c <= t - m and stream j at the one column t - m + j, j = 1..m. Rows t < m see nothing and are left out."""
        length = len(tokens)
        streams = [[self.feature(y) for y in states]]
        out = {}
        for m in range(num_forwards):
            for t in range(m, length):
                h = self.entry(tokens[t], streams[m][t])
                columns = [(0, c) for c in range(t - m + 1)] + [(j, t - m + j) for j in range(1, m + 1)]
                visible = [self.key_value(self.entry(tokens[c], streams[j][c]), c) for j, c in columns]
                out[m, t] = self.layer(h, t, visible)
            streams.append([None] * length)
            for t in range(m, length - 1):
                streams[m + 1][t + 1] = out[m, t].detach() if detach else out[m, t]
        return out

    def loss(self, batch, num_forwards, row_loss, regression_weight, *, detach=True):
        """Sum over forwards of the mean over supervised columns of row_loss + regression_weight * smooth L1."""
        documents, mask = batch["document_ids"][0].tolist(), batch["loss_mask"][0].tolist()
        losses = [[] for _ in range(num_forwards)]
        for document in sorted(set(documents) - {-1}):
            columns = [i for i, d in enumerate(documents) if d == document]
            tokens = [batch["input_ids"][0, i] for i in columns]
            states = [batch["hidden_states"][0, i] for i in columns]
            for (m, t), predicted in self.hass(tokens, states, num_forwards, detach=detach).items():
                if mask[columns[t]]:
                    target = self.feature(batch["verifier_last_hidden_states"][0, columns[t]])
                    diff = (predicted - target).abs()
                    smooth = torch.where(diff < 1, 0.5 * diff * diff, diff - 0.5).mean()
                    losses[m].append(row_loss(self.logits(predicted), self.head @ target) + regression_weight * smooth)
        return sum(sum(of_forward) / (len(of_forward) + 1e-5) for of_forward in losses)


def top_cross_entropy(draft, target, k):
    p, q = target.exp() / target.exp().sum(), draft.exp() / draft.exp().sum()
    best = sorted(range(len(p)), key=lambda v: -p[v].item())[:k]
    return -sum(p[v] * q[v].log() for v in best)
