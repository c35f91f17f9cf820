"""A training step does not wait for its device: it runs through on `meta`, a device other than the host, without
values, where `.item()`, `bool(tensor)`, `nonzero` and a sum of tensors of two devices are errors.

That a copy from the host does not wait either (`non_blocking`) is not seen here.
"""

import contextlib

import pytest
import torch
from device_toys import flex_route, make_drafter, row_of
from drafter_toys import save_llama

from speculators.losses import chunked
from speculators.losses.chunks import OutsideHead

WAITS = {"eagle3": 0, "eagle": 0, "peagle": 0, "dflash": 0, "dspark": 1}
"""How often a step waits: DSpark asks in its backward pass whether losses arrive with the weights that were expected.
These numbers only go down."""


@pytest.fixture(scope="module")
def wide_verifier(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("verifier"), num_layers=6, head_dim=16)


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """torch knows no autocast on `meta`; nothing here runs under it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


def shaped_like_flex(query, key, value, ranges, blocks):
    """Depends on all that a kernel reads."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
    low, high, own_low, own_high = (part[:, None] for part in ranges)
    keys = torch.arange(key.shape[2], device=key.device)
    visible = ((keys >= low) & (keys < high)) | ((keys >= own_low) & (keys < own_high))
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ value.repeat_interleave(query.shape[1] // key.shape[1], 1), scores.logsumexp(-1)


def step_on_meta(algorithm, verifier_path):
    model = make_drafter(algorithm, verifier_path)
    if algorithm != "eagle":  # the rest of the verifier's head is read once in a run
        outside = OutsideHead(*(part.to("meta") for part in model.outside_head()))
        model.outside_head = lambda: outside
    model.to("meta").train()
    batch = row_of(algorithm, [9, 1, 14], seed=1, padding=3)
    moved = {key: value if key in model.columns_on_host else value.to("meta") for key, value in batch.items()}
    _, loss, _ = model(**moved, attention_route=flex_route(shaped_like_flex), return_logits=False)
    loss.backward()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("algorithm", WAITS)
def test_a_step_waits_for_its_device_no_more_than_this(algorithm, wide_verifier, monkeypatch):
    waits = []

    def answered(values_N, of_N):
        waits.append("common_factor")
        return values_N.sum() / of_N.sum()

    monkeypatch.setattr(chunked, "common_factor", answered)
    trained = step_on_meta(algorithm, wide_verifier)
    assert trained and all(parameter.grad is not None for parameter in trained)
    assert len(waits) == WAITS[algorithm]
