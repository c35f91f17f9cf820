"""Memory of one training step of each drafter, in bf16 autocast as a run trains: counted bytes of live tensors against
an arithmetic bound of the shapes. What a step keeps between forward and backward is worked out row by row; a copy in
fp32 that is kept, or the logits of a second chunk, are above the bound. And the command line of the benchmark.

Sizes: H hidden, W = query heads * head size, G = key heads * head size, INNER of the MLP, V vocabulary.
"""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from speculators.interfaces import CaptureSpec
from speculators.losses import chunks
from speculators.nn.attention import Attention
from speculators.nn.decoder import MLP
from speculators.utils.util import LiveBytes

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
SHAPE = ["--length", "256", "--vocab", "512", "--hidden", "64", "--head-dim", "16", "--anchors", "24"]
T, V, H, W, G, INNER, D = 256, 512, 64, 64, 64, 176, 16
NUM_AUX, STEPS = 3, 3
CHUNK_ROWS = 32
SLACK = 1.03
ROTATION = 8 * D
"""cos and sin of a column in bf16, for queries and for keys."""


@pytest.fixture(scope="module")
def train_step():
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- what a step may keep: bytes of a column that is a key, of a row that asks, and the rest ---------------------------


def eagle3_bytes(columns, rows):
    key = 4 * H + 2 * (2 * H) + 2 * 2 * G + ROTATION  # embedding, both inputs of the projections, key and value
    asks = (
        2 * W + 2 * W + 8 * 4 + 2 * H * 5 + 2 * 2 * INNER
    )  # query, output; a, normed, layer, head input, its gradient
    once = T * (2 * NUM_AUX * H + 2 * H + 2 * H)  # input of fc, its output, targets
    return key * sum(columns) + asks * sum(rows) + once


def mtp_bytes(columns, rows):
    """Every column of a step asks. The masked embedding is fp32."""
    key = 4 * H + 2 * (2 * H) + 2 * H + 2 * H + 2 * 2 * G + ROTATION  # embedding, both inputs, their product, normed
    asks = 2 * W + 2 * W + 3 * 4 * (H // D) + 2 * H * 4 + 2 * 2 * INNER
    return key * sum(columns) + asks * sum(rows) + T * 2 * H + STEPS * T // 2 * 2 * H


def dflash_bytes(columns, rows):
    """Context columns of all layers, then the slots. The stream of slots is fp32."""
    context, slots = columns[: len(rows)], columns[len(rows) :]
    key = 2 * (2 * G + G) + ROTATION // 2  # key before and after its norm, value
    slot = 2 * H + 2 * (W + 3 * G) + 2 * 2 * W + ROTATION  # input; with queries before and after their norm, output
    asks = 2 * 4 * H + 2 * H + 2 * 2 * INNER + 2 * 4 * (H // D)  # the stream twice, input of the MLP, its products
    once = T * 3 * 2 * H + slots[0] * (4 * H + 2 * H)  # features, normed, targets; embedding, gradient
    return key * sum(context) + slot * sum(slots) + asks * sum(rows) + once


def dspark_bytes(columns, rows):
    """Beside that, features of rank K for each slot: fp32, cast, and in the gradient; and the gradient of the head."""
    K = 256
    return dflash_bytes(columns, rows) + 4 * V * K + rows[0] * (4 * K + 2 * K)


def peagle_bytes(columns, rows):
    key = 4 * H + 2 * (2 * H) + 2 * H + 2 * 2 * G + 2 * W + ROTATION
    asks = 3 * 2 * W + 2 * H * 5 + 2 * 2 * INNER  # queries of the true tokens are gathered, outputs put together
    return key * sum(columns) + asks * sum(rows) + T * 2 * H


def eagle_bytes(columns, rows):
    key = 4 * H + 2 * (2 * H) + 2 * H + 2 * 2 * G + ROTATION
    asks = 2 * W + 2 * W + 8 * 4 + 2 * H * 4 + 2 * 2 * INNER
    return key * sum(columns) + asks * sum(rows) + T * 2 * H * 4


def heads_bytes(columns, rows):
    """Trained heads: the gradient of each, states of half the columns."""
    return STEPS * (4 * V * H + T // 2 * 4 * 2 * H) + T * 2 * H


def mlp_bytes(columns, rows):
    """Beside that, its norm and activation in fp32."""
    return heads_bytes(columns, rows) + STEPS * T // 2 * 2 * 4 * H


def counted_step(module, drafter):
    """(bytes kept between forward and backward, peak, columns of each projection of keys, rows of each MLP, model)"""
    sys_argv, sys.argv = sys.argv, [str(SCRIPT), *SHAPE]
    try:
        options = module.arguments()
    finally:
        sys.argv = sys_argv
    route = module.ROUTES["fast"]
    torch.manual_seed(0)
    model, keywords = module.DRAFTERS[drafter][0](options, route)
    kwargs, _ = model.get_trainer_kwargs(**keywords, loss_implementation=route["loss"])
    batch, columns, rows = module.packed_row(options, model), [], []
    for part in model.modules():
        if isinstance(part, Attention):
            part.v_proj.register_forward_pre_hook(lambda _, x: columns.append(x[0].shape[:-1].numel()))
        elif isinstance(part, MLP):
            part.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[:-1].numel()))
    torch.manual_seed(1)
    there = [*model.parameters(), *model.buffers(), *batch.values()]
    if drafter == "eagle":  # what it reads of the verifier is not registered
        there += [model.embed_tokens.weight, model.lm_head.weight]
    with LiveBytes(there) as counted:
        with torch.autocast("cpu", torch.bfloat16):
            _, loss, _ = model(**batch, **kwargs)
        kept = counted.live
        loss.backward()
    return kept, counted.peak, columns, rows, model


KEPT = {
    "eagle3": eagle3_bytes,
    "peagle": peagle_bytes,
    "dflash": dflash_bytes,
    "dspark": dspark_bytes,
    "mtp": mtp_bytes,
    "eagle": eagle_bytes,
    "medusa": heads_bytes,
    "mlp": mlp_bytes,
}
LOSS = 2 * 2 * V * H + 6 * 4 * CHUNK_ROWS * V
"""Casts of both heads, and logits, probabilities and gradient of one chunk."""
AT_PEAK = {
    "eagle3": LOSS,
    "peagle": LOSS,
    "dflash": LOSS,
    "mtp": LOSS,
    "eagle": LOSS + STEPS * T // 2 * 2 * 4 * H,  # its features and their targets
}
"""Bytes beside what is kept. Not for trained heads, whose gradients are most of it."""


@pytest.mark.parametrize("drafter", KEPT)
def test_a_step_keeps_what_its_shapes_need(drafter, train_step, monkeypatch):
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", CHUNK_ROWS * V)
    kept, peak, columns, rows, model = counted_step(train_step, drafter)
    bound = KEPT[drafter](columns, rows) + sum(2 * p.numel() for p in cast_weights(model))
    assert 0.85 * bound < kept < SLACK * bound
    assert peak < SLACK * (kept + AT_PEAK.get(drafter, peak))


def cast_weights(model):
    """Of what products autocast keeps a copy: the trained matrices. Those that are computed again are cast again."""
    again = [part.down_proj for part in model.modules() if isinstance(part, MLP)]
    linears = [part for part in model.modules() if isinstance(part, nn.Linear) and part not in again]
    return [linear.weight for linear in linears if linear.weight.requires_grad and len(linear.weight) != V]


def test_a_worker_understands_the_options_that_it_is_started_with(train_step, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SHAPE, "--dtype", "float32", "--kv-heads", "2"])
    options = train_step.arguments()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *train_step.command_words(options), "--one", "mtp", "fast"])
    worker = vars(train_step.arguments())
    assert worker == vars(options) | {"one": ["mtp", "fast"]}
    batch = train_step.packed_row(options, SimpleNamespace(target_layer_ids=[1], capture=CaptureSpec((1,))))
    assert batch["hidden_states"].dtype == torch.float32  # without autocast a product of two dtypes fails


def test_upstream_is_not_this_package(train_step, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SHAPE, "--algorithms", "eagle3", "--upstream", sys.executable])
    options = train_step.arguments()
    with pytest.raises(SystemExit, match="imports this package, not the published one"):
        train_step.serve_steps(options, "eagle3", "upstream sdpa")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--upstream", sys.executable])
    with pytest.raises(SystemExit):  # mtp among the drafters
        train_step.arguments()
