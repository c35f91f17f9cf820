"""A decoder layer in Python loops, from the formulas alone: one query, one head, one key at a time, in float64.

What the naive drafters of several folders are made of. Shares no code with the library.
"""

import math

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rotate(vector, position, theta):
    half = len(vector) // 2
    out = [None] * len(vector)
    for j in range(half):
        angle = position * theta ** (-2.0 * j / len(vector))
        first, second = vector[j], vector[j + half]
        out[j] = first * math.cos(angle) - second * math.sin(angle)
        out[j + half] = second * math.cos(angle) + first * math.sin(angle)
    return torch.stack(out)


def attend(queries, visible, num_key_value_heads):
    """`visible`: (keys by kv head, values by kv head) of each column in sight."""
    out = []
    per_group = len(queries) // num_key_value_heads
    for head, query in enumerate(queries):
        group = head // per_group
        scores = torch.stack([query @ keys[group] / math.sqrt(len(query)) for keys, _ in visible])
        probs = scores.exp() / scores.exp().sum()
        out.append(sum(p * values[group] for p, (_, values) in zip(probs, visible, strict=True)))
    return torch.cat(out)


def kl(draft, target):
    p, q = target.exp() / target.exp().sum(), draft.exp() / draft.exp().sum()
    return sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p)))


def mixed(draft, target):
    """0.3 ce + 0.7 tv"""
    p, q = target.exp() / target.exp().sum(), draft.exp() / draft.exp().sum()
    return -0.3 * q[target.argmax()].log() + 0.7 * (1 - torch.minimum(p, q).sum())
