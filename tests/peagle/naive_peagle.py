"""P-EAGLE's training loss in Python loops, from the formulas alone: one element, one head, one key at a time.

Shares no code with the library. Reads weights by their names on disk. Everything in float64. Slots are given.
"""

import torch
from naive_layers import attend, rms_norm, rotate


class NaivePEagle:
    def __init__(self, weights, config):
        self.w = {
            name: w.double().detach().requires_grad_() if w.is_floating_point() else w for name, w in weights.items()
        }
        self.config, self.nested = config, config.transformer_layer_config
        self.eps, self.theta = self.nested.rms_norm_eps, self.nested.rope_parameters["rope_theta"]

    def norm(self, name, x):
        return rms_norm(x, self.w[name + ".weight"], self.eps)

    def features(self, g):
        if self.config.norm_before_fc:
            g = self.norm("input_norm", g)
        if self.config.fc_norm:
            size = self.nested.hidden_size
            chunks = [g[i * size : (i + 1) * size] for i in range(len(g) // size)]
            g = torch.cat([self.norm(f"fc_norm.{j}", chunk) for j, chunk in enumerate(chunks)])
        return self.w["fc.weight"] @ g

    def heads(self, layer, kind, x, position):
        heads = list((self.w[f"layers.{layer}.self_attn.{kind}_proj.weight"] @ x).split(self.nested.head_dim))
        if kind == "v":
            return heads
        if f"layers.{layer}.self_attn.{kind}_norm.weight" in self.w:
            heads = [self.norm(f"layers.{layer}.self_attn.{kind}_norm", head) for head in heads]
        return [rotate(head, position, self.theta) for head in heads]

    def mlp(self, layer, x):
        prefix = f"layers.{layer}.mlp."
        gate, up = self.w[prefix + "gate_proj.weight"] @ x, self.w[prefix + "up_proj.weight"] @ x
        return self.w[prefix + "down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def window(self, layer):
        kinds = getattr(self.nested, "layer_types", None)
        return self.nested.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

    def sees(self, query, key, documents, window):
        (a_q, d_q), (a_k, d_k) = query, key
        if query == key:
            return True
        if documents[a_q] != documents[a_k] or documents[a_q] == -1:
            return False
        if window is not None and (a_q + d_q) - (a_k + d_k) >= window:
            return False
        return (d_k == 0 and a_k <= a_q) or (a_k == a_q and d_k <= d_q)

    def run(self, batch, slots):
        """{(anchor, depth): what the head reads} of every column and of the given slots."""
        tokens, documents = batch["input_ids"][0].tolist(), batch["document_ids"][0].tolist()
        elements = [(a, 0) for a in range(len(tokens))] + list(slots)
        hidden, embeds = {}, {}
        for a, d in elements:
            g = batch["hidden_states"][0, a].double() if d == 0 else self.w["mask_hidden"].flatten()
            hidden[a, d] = self.features(g)
            embeds[a, d] = self.w["embed_tokens.weight"][tokens[a] if d == 0 else self.config.mask_token_id]
        for layer in range(self.nested.num_hidden_layers):
            prefix, memory, queries, residuals = f"layers.{layer}.", {}, {}, {}
            for element in elements:
                h = hidden[element]
                if layer == 0:
                    state = self.norm(prefix + "hidden_norm", h)
                    residuals[element] = state if self.config.norm_before_residual else h
                    x = torch.cat([self.norm(prefix + "input_layernorm", embeds[element]), state])
                else:
                    residuals[element], x = h, self.norm(prefix + "input_layernorm", h)
                place = sum(element)  # the packed column: rope is relative, so its origin does not matter
                queries[element] = self.heads(layer, "q", x, place)
                memory[element] = self.heads(layer, "k", x, place), self.heads(layer, "v", x, place)
            for element in elements:
                window = self.window(layer)
                visible = [memory[key] for key in elements if self.sees(element, key, documents, window)]
                attended = attend(queries[element], visible, self.nested.num_key_value_heads)
                a = residuals[element] + self.w[prefix + "self_attn.o_proj.weight"] @ attended
                hidden[element] = a + self.mlp(layer, self.norm(prefix + "post_attention_layernorm", a))
        return {element: self.norm("norm", h) for element, h in hidden.items()}

    def logits(self, batch, slots):
        return {element: self.w["lm_head.weight"] @ h for element, h in self.run(batch, slots).items()}

    def loss(self, batch, slots, row_loss):
        """Mean of row_loss(draft logits, target logits) over supervised columns and slots; who was right."""
        mask, last = batch["loss_mask"][0].tolist(), batch["verifier_last_hidden_states"][0].double()
        documents = batch["document_ids"][0].tolist()
        losses, correct = [], {}
        for (a, d), draft in self.logits(batch, slots).items():
            if mask[a + d] and documents[a + d] != -1:
                target = self.w["verifier_lm_head.weight"] @ self.norm("verifier_norm", last[a + d])
                losses.append(row_loss(draft, target))
                correct[a, d] = bool(draft.argmax() == target.argmax())
        return sum(losses) / (len(losses) + 1e-5), correct
