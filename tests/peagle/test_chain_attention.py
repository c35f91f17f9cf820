"""Every route of chain attention against the predicate written as a loop."""

import math
from functools import partial

import pytest
import torch

from speculators.models.peagle.network import (
    ChainLayout,
    DenseChainAttention,
    FlexChainAttention,
    GroupedChainAttention,
    SdpaChainAttention,
)
from speculators.nn.routes import attend

DOCUMENTS = [0, 0, 0, 0, 0, 1, 1, 1, -1]
SLOTS = [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2), (5, 1), (6, 1)]
"""(anchor, depth)"""

KINDS = [DenseChainAttention, SdpaChainAttention, GroupedChainAttention, partial(FlexChainAttention, kernel=attend)]


def looped(query, key, value, window):
    """One element, one head at a time: [E, N, d]."""
    elements = [(a, 0) for a in range(len(DOCUMENTS))] + SLOTS
    out = torch.zeros_like(query)
    for i, (a, d) in enumerate(elements):
        seen = [
            j
            for j, (b, e) in enumerate(elements)
            if i == j
            or (
                DOCUMENTS[a] == DOCUMENTS[b] != -1
                and ((e == 0 and b <= a) or (a == b and e <= d))
                and (window is None or a + d - b - e < window)
            )
        ]
        for n in range(query.shape[1]):
            group = n // (query.shape[1] // key.shape[1])
            scores = torch.stack([query[i, n] @ key[j, group] for j in seen]) / math.sqrt(query.shape[-1])
            out[i, n] = sum(p * value[j, group] for p, j in zip(scores.softmax(0), seen, strict=True))
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("last_layer", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
def test_every_route_sees_what_the_rule_says(kind, last_layer, window):
    generator = torch.Generator().manual_seed(0)
    anchors, depths = (torch.tensor(part) for part in zip(*SLOTS, strict=True))
    columns = torch.tensor([0, 2, 3, 6])
    layout = ChainLayout(torch.tensor(DOCUMENTS), anchors, depths, columns)
    num_elements = len(DOCUMENTS) + len(SLOTS)
    query, key, value = (torch.randn(1, num_elements, heads, 16, generator=generator) for heads in (4, 2, 2))
    expected = looped(query[0], key[0], value[0], window)
    out = kind(layout, window, last_layer=last_layer)(query, key, value)
    if last_layer:
        answered = torch.cat((columns, torch.arange(len(DOCUMENTS), num_elements)))
        torch.testing.assert_close(out[0], expected[answered], atol=1e-5, rtol=1e-5)
    else:
        real = torch.tensor(DOCUMENTS + [0] * len(SLOTS)) != -1
        torch.testing.assert_close(out[0, real], expected[real], atol=1e-5, rtol=1e-5)
