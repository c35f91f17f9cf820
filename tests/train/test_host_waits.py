"""A training step of any drafter does not wait for its device: it runs through on `meta`, a device other than the host,
without values, where `.item()`, `bool(tensor)`, `nonzero` and a sum of tensors of two devices are errors; and no copy
from the host waits (`non_blocking`).
"""

import contextlib

import pytest
import torch
from device_toys import DRAFTERS, flex_route, make_drafter, row_of
from drafter_toys import save_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from speculators.losses.chunks import OutsideHead
from speculators.losses.metrics import RecentSteps
from speculators.model import SpeculatorModel
from speculators.nn.routes import FLEX
from speculators.train.distributed import Ranks

ALL = [*DRAFTERS, "medusa", "mlp"]


@pytest.fixture(scope="module")
def wide_verifier(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("verifier"), num_layers=6, head_dim=16)


@pytest.fixture
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


class BlockingCopies(TorchDispatchMode):
    """Lists copies from the host that wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            to = torch.device(kwargs.get("device") or args[0].device)
            if args[0].device.type == "cpu" and to.type != "cpu":
                self.found.append(tuple(args[0].shape))
        return function(*args, **kwargs)


def made(algorithm, verifier_path, device):
    if algorithm in DRAFTERS:
        model = make_drafter(algorithm, verifier_path)
    else:
        torch.manual_seed(0)
        config, keys = AutoConfig.from_pretrained(verifier_path), {"verifier_name_or_path": str(verifier_path)}
        model = SpeculatorModel.get_class(algorithm).from_training_args(config, **keys)
    outside = getattr(model, "outside_head", lambda: None)()
    if outside is not None:  # the rest of the verifier's head is read once in a run
        outside = OutsideHead(*(part.to(device) for part in outside))
        model.outside_head = lambda: outside
    return model.to(device).train()


def row(algorithm, supervised):
    columns = {"medusa": "mtp", "mlp": "mtp"}.get(algorithm, algorithm)
    return row_of(columns, [9, 1, 14], seed=1, padding=3, supervised=supervised)


def step(model, batch, route):
    """A step as the trainer takes it, counted: the sums that are reported."""
    recent = RecentSteps()
    moved = Ranks(device=model.device).moved(batch, left_out=(), on_host=model.columns_on_host)
    _, loss, metrics = model(**moved, attention_route=route, return_logits=False)
    loss.backward()
    recent.add(metrics, num_tokens=24)
    return recent.sums.sums


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("supervised", [0.7, 0.0])
@pytest.mark.parametrize("algorithm", ALL)
def test_a_step_waits_for_no_device(algorithm, supervised, wide_verifier):
    model, batch = made(algorithm, wide_verifier, "meta"), row(algorithm, supervised)
    with BlockingCopies() as copies:
        sums = step(model, batch, flex_route(shaped_like_flex))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
    assert "loss" in sums and sums["loss"].device.type == "meta"
    assert copies.found == []


def test_a_copy_that_waits_is_seen():
    with BlockingCopies() as copies:
        torch.zeros(3).to("meta")
        torch.zeros(4).to("meta", non_blocking=True)
    assert copies.found == [(3,)]


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ALL)
def test_a_step_on_a_gpu_waits_for_it_nowhere(algorithm, wide_verifier):
    """The slow twin on the device itself: torch raises where the host would wait, after two steps that compile."""
    model, batch = made(algorithm, wide_verifier, "cuda"), row(algorithm, 0.7)
    batch = {name: values.pin_memory() for name, values in batch.items()}
    for _ in range(2):
        step(model, batch, FLEX)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = step(model, batch, FLEX)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(sums["loss"])
