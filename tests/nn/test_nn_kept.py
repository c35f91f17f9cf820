"""What training keeps of a layer: its inputs and products; the cheap parts between them are computed again."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from speculators.nn.decoder import MLP
from speculators.nn.norms import LayerNorm, RMSNorm, RMSNormPlusOne, cast_once
from speculators.utils.util import LiveBytes

ROWS, SIZE = 24, 64


def results_of(run, module, dtype):
    """Output, gradients of the input and of the parameters, and the bytes kept in between. The input is also a residual
    stream, as in a layer."""
    x = (torch.randn(1, ROWS, SIZE, generator=torch.Generator().manual_seed(1)) * 3).to(dtype).requires_grad_()
    module.zero_grad()
    scaled = x * 1.25
    with LiveBytes([scaled, *module.parameters()]) as counted:
        out = run(scaled)
        kept = counted.live - out.nbytes
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())], kept


def plain(norm, x):
    wide = x.float()
    if isinstance(norm, LayerNorm):
        out = F.layer_norm(wide, norm.weight.shape, norm.weight, norm.bias, norm.variance_epsilon)
    else:
        gain = 1.0 + norm.weight if isinstance(norm, RMSNormPlusOne) else norm.weight
        out = F.rms_norm(wide, gain.shape, gain, norm.variance_epsilon)
    return x + out.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [RMSNorm, RMSNormPlusOne, LayerNorm])
def test_a_norm_keeps_its_input_alone_and_its_gradients_are_those_of_autograd_to_the_last_bit(kind, dtype):
    norm = LayerNorm(SIZE, has_bias=True) if kind is LayerNorm else kind(SIZE)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    found, kept = results_of(lambda x: x + norm(x), norm, dtype)
    expected, kept_of_all = results_of(lambda x: plain(norm, x), norm, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kept == 0 < kept_of_all


@pytest.mark.parametrize("low_precision", [True, False])
def test_an_mlp_keeps_its_input_and_two_products_with_the_same_gradients(low_precision):
    mlp = MLP(LlamaConfig(hidden_size=SIZE, intermediate_size=176))

    def plain_mlp(x):
        return mlp.down_proj(mlp.act(mlp.gate_proj(x)) * mlp.up_proj(x))

    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        found, kept = results_of(mlp, mlp, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        expected, _ = results_of(plain_mlp, mlp, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if low_precision:  # casts of the weights and one of the input
        assert kept == 2 * (sum(p.numel() for p in mlp.parameters()) + ROWS * (SIZE + 2 * 176))
    else:
        assert kept == 4 * ROWS * 2 * 176


def test_without_gradients_the_input_is_still_cast_once():
    x = torch.randn(2, SIZE)
    assert [y is x for y in cast_once(x, 3)] == [True] * 3
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        first, second = cast_once(x, 2)
    assert first.dtype == torch.bfloat16 and first.data_ptr() == second.data_ptr()


class Products(TorchDispatchMode):
    """Counts matrix products."""

    num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += function.overloadpacket is torch.ops.aten.mm
        return function(*args, **(kwargs or {}))


def test_no_product_is_computed_a_second_time():
    """Three forward, and two for each of them backward; a recomputing one has two more, as the last is not needed."""
    mlp = MLP(LlamaConfig(hidden_size=SIZE, intermediate_size=176))
    counts = []
    for mlp.recomputes in (False, True):
        with Products() as products:
            mlp(torch.randn(ROWS, SIZE, requires_grad=True)).sum().backward()
        counts.append(products.num)
    assert counts == [9, 11]
