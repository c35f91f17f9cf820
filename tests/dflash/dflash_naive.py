"""DFlash's training forward in Python loops, from the formulas alone: one query, one head, one key at a time.

Shares no code with the library. Reads weights by their names on disk. Everything in float64.
"""

import math

import torch
from naive_layers import attend, rms_norm, rotate


class NaiveDFlash:
    def __init__(self, weights, nested, *, block_size, mask_token, from_anchor=False, causal=None):
        """`causal[layer]`: slots do not see later slots."""
        self.w = {
            name: w.double().detach().requires_grad_() if w.is_floating_point() else w for name, w in weights.items()
        }
        self.nested, self.eps = nested, nested.rms_norm_eps
        self.theta = nested.rope_parameters["rope_theta"]
        self.size, self.mask_token, self.from_anchor = block_size, mask_token, from_anchor
        self.causal = causal or [False] * nested.num_hidden_layers

    def norm(self, name, x):
        return rms_norm(x, self.w[name + ".weight"], self.eps)

    def project(self, layer, kind, x):
        out = self.w[f"layers.{layer}.self_attn.{kind}_proj.weight"] @ x
        bias = f"layers.{layer}.self_attn.{kind}_proj.bias"
        return out + self.w[bias] if bias in self.w else out

    def heads(self, layer, kind, x, position):
        heads = list(self.project(layer, kind, x).split(self.nested.head_dim))
        if kind == "v":
            return heads
        return [
            rotate(self.norm(f"layers.{layer}.self_attn.{kind}_norm", head), position, self.theta) for head in heads
        ]

    def mlp(self, layer, x):
        prefix = f"layers.{layer}.mlp."
        gate, up = self.w[prefix + "gate_proj.weight"] @ x, self.w[prefix + "up_proj.weight"] @ x
        return self.w[prefix + "down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def window(self, layer):
        kinds = getattr(self.nested, "layer_types", None)
        return self.nested.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

    def context(self, batch):
        """c[t] of every column."""
        return [self.norm("hidden_norm", self.w["fc.weight"] @ g) for g in batch["hidden_states"][0].double()]

    def block(self, context, batch, p):
        """h[k]: what the head reads at slot k of the block anchored at column p."""
        documents, positions = batch["document_ids"][0].tolist(), batch["position_ids"][0].tolist()
        tokens = [int(batch["input_ids"][0, p])] + [self.mask_token] * (self.size - 1)
        hidden = [self.w["embed_tokens.weight"][token] for token in tokens]
        for layer in range(self.nested.num_hidden_layers):
            window = self.window(layer)
            inputs = [self.norm(f"layers.{layer}.input_layernorm", z) for z in hidden]
            place = [positions[p] + k for k in range(self.size)]
            slots = [
                (self.heads(layer, "k", u, place[k]), self.heads(layer, "v", u, place[k])) for k, u in enumerate(inputs)
            ]
            columns = {
                t: (self.heads(layer, "k", context[t], positions[t]), self.heads(layer, "v", context[t], positions[t]))
                for t in range(p)
                if documents[t] == documents[p]
            }
            after = []
            for k, u in enumerate(inputs):
                visible = [kv for t, kv in columns.items() if window is None or positions[t] > place[k] - window]
                visible += [
                    slots[j]
                    for j in range(self.size)
                    if (j <= k or not self.causal[layer]) and (window is None or abs(j - k) < window)
                ]
                a = hidden[k] + self.project(
                    layer, "o", attend(self.heads(layer, "q", u, place[k]), visible, self.nested.num_key_value_heads)
                )
                after.append(a + self.mlp(layer, self.norm(f"layers.{layer}.post_attention_layernorm", a)))
            hidden = after
        return [self.norm("norm", z) for z in hidden]

    def drafting_slots(self, batch, p):
        """(slot, column of the target state) of the slots of block p that count."""
        documents, mask = batch["document_ids"][0].tolist(), batch["loss_mask"][0].tolist()
        for k in range(0 if self.from_anchor else 1, self.size):
            drafted = p + k + (1 if self.from_anchor else 0)
            if mask[p + k] and drafted < len(mask) and documents[p + k] == documents[drafted] == documents[p]:
                yield k, drafted - 1

    def anchors(self, batch):
        documents, mask = batch["document_ids"][0].tolist(), batch["loss_mask"][0].tolist()
        return [p for p in range(len(mask) - self.size) if mask[p] and documents[p] != -1]

    def target(self, batch, column):
        last = batch["verifier_last_hidden_states"][0, column].double()
        return self.w["verifier_lm_head.weight"] @ self.norm("verifier_norm", last)

    outside_head = None
    """Rows of the verifier's head outside the draft vocabulary."""

    def can_be_drafted(self, batch, column):
        """Whether the verifier's token is in the draft vocabulary."""
        if self.outside_head is None:
            return True
        return bool(self.others(batch, column).max() < self.target(batch, column).max())

    def others(self, batch, column):
        last = batch["verifier_last_hidden_states"][0, column].double()
        return self.outside_head.double() @ self.norm("verifier_norm", last)

    def blocks(self, batch):
        """{p: {k: (draft logits, target logits)}} of everything that counts."""
        context = self.context(batch)
        found = {}
        for p in self.anchors(batch):
            hidden = self.block(context, batch, p)
            found[p] = {
                k: (self.w["lm_head.weight"] @ hidden[k], self.target(batch, column))
                for k, column in self.drafting_slots(batch, p)
            }
        return found

    def fixed_decay(self, gamma):
        first = 0 if self.from_anchor else 1
        return lambda losses: {k: math.exp(-(k - first) / gamma) for k in losses}

    def dpace(self, alpha):
        """Weights of one block from its losses {k: loss}; a slot that does not count never fails."""

        def weights(losses):
            success = [
                (1 - alpha) * math.exp(-losses[k].item()) + alpha if k in losses else 1.0 for k in range(self.size)
            ]
            reach = {j: math.prod(success[: j + 1]) for j in losses}
            return {k: sum(reach[j] for j in losses if j >= k) for k in losses}

        return weights

    def loss(self, batch, row_loss, weights_of):
        """(loss, blocks): sum over slots of weight * loss / slots that count."""
        found = self.blocks(batch)
        total, count = 0.0, 0
        for slots in found.values():
            losses = {k: row_loss(draft, target) for k, (draft, target) in slots.items()}
            weights = weights_of(losses)
            total = total + sum(weights[k] * losses[k] for k in losses)
            count += len(losses)
        return total / (count + 1e-5), found


def ce(draft, target):
    return -(draft - draft.logsumexp(0))[target.argmax()]
