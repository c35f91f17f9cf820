"""MTP in Python loops, from the formulas alone: one query, one head, one key at a time, training and drafting.

Shares no code with the library. Reads weights by their names on disk and the verifier's. Everything in float64.
"""

import torch
from naive_layers import attend, rms_norm, rotate


class NaiveMTP:
    def __init__(self, weights, verifier, nested, *, zero_first, raw_states):
        """`verifier`: embed, head, norm of the verifier."""
        self.w = {name: w.double().detach().requires_grad_() for name, w in weights.items()}
        self.embed, self.head, self.final_norm = (verifier[name].double() for name in ("embed", "head", "norm"))
        self.nested, self.eps = nested, nested.rms_norm_eps
        self.theta = nested.rope_parameters["rope_theta"]
        self.zero_first, self.raw_states = zero_first, raw_states

    def norm(self, name, x):
        return rms_norm(x, self.w[f"mtp_layers.0.{name}.weight"], self.eps)

    def linear(self, name, x):
        out = self.w[f"mtp_layers.0.{name}.weight"] @ x
        bias = f"mtp_layers.0.{name}.bias"
        return out + self.w[bias] if bias in self.w else out

    def heads(self, kind, x, position):
        size = len(self.linear(f"self_attn.{kind}_proj", x)) // (
            self.nested.num_attention_heads if kind == "q" else self.nested.num_key_value_heads
        )
        heads = list(self.linear(f"self_attn.{kind}_proj", x).split(size))
        if kind == "v":
            return heads
        if f"mtp_layers.0.self_attn.{kind}_norm.weight" in self.w:
            heads = [self.norm(f"self_attn.{kind}_norm", head) for head in heads]
        return [rotate(head, position, self.theta) for head in heads]

    def verifier_state(self, y):
        return y.double() if self.raw_states else self.normed(y)

    def normed(self, y):
        return rms_norm(y.double(), self.final_norm, self.eps)

    def entry(self, token, hidden, position, zeroed):
        """(residual, query, key and value) of one entry."""
        embed = self.embed[token] * (0.0 if zeroed else 1.0)
        both = torch.cat([self.norm("token_layernorm", embed), self.norm("hidden_layernorm", hidden)])
        m = self.linear("input_proj", both)
        u = self.norm("input_layernorm", m)
        return m, self.heads("q", u, position), (self.heads("k", u, position), self.heads("v", u, position))

    def finish(self, residual, queries, visible):
        a = residual + self.linear("self_attn.o_proj", attend(queries, visible, self.nested.num_key_value_heads))
        u = self.norm("post_attention_layernorm", a)
        gate, up = self.linear("mlp.gate_proj", u), self.linear("mlp.up_proj", u)
        return self.norm("final_layernorm", a + self.linear("mlp.down_proj", gate * torch.sigmoid(gate) * up))

    # -- training ----------------------------------------------------------------------------------------------------

    def loss(self, batch, num_steps, weights, row_loss=None):
        """(loss, loss a step, {(step, column): right?}). `row_loss(draft logits, verifier logits)`, or the tokens."""
        tokens, documents = batch["input_ids"][0].tolist(), batch["document_ids"][0].tolist()
        mask = batch["loss_mask"][0].tolist()
        length = len(tokens)
        num_columns = length - num_steps - 1
        first = [documents.index(d) for d in documents]
        states = [self.verifier_state(y) for y in batch["hidden_states"][0]]
        hidden, step_losses, correct = list(states), [], {}
        for k in range(num_steps):
            entries = [
                self.entry(tokens[t + k + 1], hidden[t], t - first[t], self.zero_first and k == 0 and t == first[t])
                for t in range(num_columns)
            ]
            hidden = [
                self.finish(
                    entries[t][0],
                    entries[t][1],
                    [entries[c][2] for c in range(t + 1) if c == t or documents[c] == documents[t] != -1],
                )
                for t in range(num_columns)
            ]
            losses = []
            for t in range(num_columns):
                goal = t + k + 2
                if documents[t] == documents[goal] != -1 and mask[goal]:
                    logits = self.head @ hidden[t]
                    target = self.head @ self.normed(batch["hidden_states"][0, goal - 1])
                    if row_loss is None:
                        losses.append(-(logits - logits.logsumexp(0))[tokens[goal]])
                        correct[k, t] = bool(logits.argmax() == tokens[goal])
                    else:
                        losses.append(row_loss(logits, target))
                        correct[k, t] = bool(logits.argmax() == target.argmax())
            step_losses.append(weights[k] * sum(losses) / max(len(losses), 1))
        return sum(step_losses), step_losses, correct

    # -- drafting ----------------------------------------------------------------------------------------------------

    def draft_probs(self, tokens, states, drafts):
        """q of each draft after `tokens`, the drafts before it being what they were. states[i] is y of token i."""
        return self.draft_logits(tokens, states, drafts).softmax(-1)

    def draft_logits(self, tokens, states, drafts):
        entries = []
        for i in range(len(tokens) - 1):
            entries.append(self.entry(tokens[i + 1], self.verifier_state(states[i]), i, self.zero_first and i == 0))
        logits = []
        for k, draft in enumerate(drafts):
            residual, queries, _ = entries[-1]
            hidden = self.finish(residual, queries, [entry[2] for entry in entries])
            logits.append(self.head @ hidden)
            entries.append(self.entry(draft, hidden, len(tokens) - 1 + k, False))
        return torch.stack(logits)


def naive_of(model, verifier):
    weights = {name: w for name, w in model.state_dict().items() if name.startswith("mtp_layers.")}
    parts = {
        "embed": verifier.get_input_embeddings().weight,
        "head": verifier.get_output_embeddings().weight,
        "norm": verifier.model.norm.weight,
    }
    nested = model.config.transformer_layer_config
    is_mimo = nested.model_type == "qwen2"
    return NaiveMTP(weights, parts, nested, zero_first=is_mimo, raw_states=is_mimo)
