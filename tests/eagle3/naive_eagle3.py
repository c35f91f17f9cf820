"""EAGLE-3's training forward in Python loops, from the formulas alone: one query, one head, one key at a time.

Shares no code with the library. Reads weights by their names on disk. Everything in float64.
"""

import torch
from naive_layers import attend, rms_norm, rotate


class NaiveEagle3:
    def __init__(self, weights, nested, *, norm_before_residual, norm_before_fc, fc_norm, norm_output):
        self.w = {
            name: w.double().detach().requires_grad_() if w.is_floating_point() else w for name, w in weights.items()
        }
        self.nested, self.eps = nested, nested.rms_norm_eps
        self.theta = nested.rope_parameters["rope_theta"]
        self.norm_before_residual, self.norm_before_fc = norm_before_residual, norm_before_fc
        self.fc_norm, self.norm_output = fc_norm, norm_output

    def norm(self, name, x):
        return rms_norm(x, self.w[name + ".weight"], self.eps)

    def features(self, g):
        if self.norm_before_fc:
            g = self.norm("input_norm", g)
        if self.fc_norm:
            size = self.nested.hidden_size
            chunks = [g[i * size : (i + 1) * size] for i in range(len(g) // size)]
            g = torch.cat([self.norm(f"fc_norm.{j}", chunk) for j, chunk in enumerate(chunks)])
        return self.w["fc.weight"] @ g

    def heads(self, layer, kind, x, position):
        projected = self.w[f"layers.{layer}.self_attn.{kind}_proj.weight"] @ x
        if f"layers.{layer}.self_attn.{kind}_proj.bias" in self.w:
            projected = projected + self.w[f"layers.{layer}.self_attn.{kind}_proj.bias"]
        heads = list(projected.split(self.nested.head_dim))
        if kind == "v":
            return heads
        if f"layers.{layer}.self_attn.{kind}_norm.weight" in self.w:
            heads = [self.norm(f"layers.{layer}.self_attn.{kind}_norm", head) for head in heads]
        return [rotate(head, position, self.theta) for head in heads]

    def mlp(self, layer, x):
        prefix = f"layers.{layer}.mlp."
        gate, up = self.linear(prefix + "gate_proj", x), self.linear(prefix + "up_proj", x)
        return self.linear(prefix + "down_proj", gate * torch.sigmoid(gate) * up)

    def linear(self, name, x):
        return self.w[f"{name}.weight"] @ x + self.w.get(f"{name}.bias", 0)

    def unroll(self, batch, num_steps):
        """normed[s][i]: what the head reads at step s of column i."""
        tokens, documents = batch["input_ids"][0].tolist(), batch["document_ids"][0].tolist()
        positions = batch["position_ids"][0].tolist()
        length = len(tokens)
        hidden = [self.features(g) for g in batch["hidden_states"][0].double()]
        num_layers = self.nested.num_hidden_layers
        memory = [[[None] * length for _ in range(num_steps)] for _ in range(num_layers)]  # [layer][step][column]
        normed = []
        for s in range(num_steps):
            for layer in range(num_layers):
                inputs, residuals, queries = [], [], []
                for i in range(length):
                    if layer == 0:
                        token = tokens[i + s] if i + s < length else 0
                        embed = self.norm("layers.0.input_layernorm", self.w["embed_tokens.weight"][token])
                        state = self.norm("layers.0.hidden_norm", hidden[i])
                        residuals.append(state if self.norm_before_residual else hidden[i])
                        inputs.append(torch.cat([embed, state]))
                    else:
                        residuals.append(hidden[i])
                        inputs.append(self.norm(f"layers.{layer}.input_layernorm", hidden[i]))
                    place = positions[i] + s
                    queries.append(self.heads(layer, "q", inputs[i], place))
                    memory[layer][s][i] = (
                        self.heads(layer, "k", inputs[i], place),
                        self.heads(layer, "v", inputs[i], place),
                    )
                for i in range(length):
                    window = self.window(layer)
                    visible = [
                        memory[layer][0][c]
                        for c in range(i + 1)
                        if (documents[c] == documents[i] != -1 and (window is None or c > i + s - window)) or c == i
                    ]
                    visible += [memory[layer][m][i] for m in range(1, s + 1)]
                    attended = self.w[f"layers.{layer}.self_attn.o_proj.weight"] @ attend(
                        queries[i], visible, self.nested.num_key_value_heads
                    )
                    if f"layers.{layer}.self_attn.o_proj.bias" in self.w:
                        attended = attended + self.w[f"layers.{layer}.self_attn.o_proj.bias"]
                    a = residuals[i] + attended
                    hidden[i] = a + self.mlp(layer, self.norm(f"layers.{layer}.post_attention_layernorm", a))
            normed.append([self.norm("norm", h) for h in hidden])
            if self.norm_output:
                hidden = list(normed[-1])
        return normed

    def window(self, layer):
        kinds = getattr(self.nested, "layer_types", None)
        return self.nested.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

    def loss(self, batch, num_steps, decay, row_loss):
        """Sum over steps of decay^s * mean over supervised columns of row_loss(draft logits, target logits)."""
        documents, mask = batch["document_ids"][0].tolist(), batch["loss_mask"][0].tolist()
        last = batch["verifier_last_hidden_states"][0].double()
        normed = self.unroll(batch, num_steps)
        total, correct = 0.0, {}
        for s in range(num_steps):
            losses = []
            for i in range(len(documents)):
                j = i + s
                if j < len(documents) and documents[j] == documents[i] != -1 and mask[j]:
                    target = self.w["verifier_lm_head.weight"] @ self.norm("verifier_norm", last[j])
                    draft = self.w["lm_head.weight"] @ normed[s][i]
                    losses.append(row_loss(draft, target))
                    correct[s, i] = bool(draft.argmax() == target.argmax())
            total = total + decay**s * sum(losses) / (len(losses) + 1e-5)
        return total, correct
