"""The routes of block attention against each other, and the reference's mask against a picture."""

from functools import partial

import pytest
import torch

from speculators.models.dflash.block_attention import (
    BlockLayout,
    ContextKV,
    DenseBlockAttention,
    FlexBlockAttention,
    GroupedBlockAttention,
    LayerMask,
    SdpaBlockAttention,
)
from speculators.nn.attention import Group
from speculators.nn.packed_row import document_starts
from speculators.nn.routes import FLEX, attend

LAYER_MASKS = [LayerMask(None, False), LayerMask(None, True), LayerMask(3, True), LayerMask(6, False)]


def picture(mask):
    return ["".join("x" if cell else "." for cell in row) for row in mask.int().tolist()]


def test_what_slots_see():
    """Documents a a b b b b b, blocks of 2 at columns 1 and 5: context columns, then the slots of both blocks."""
    documents = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    anchors = torch.tensor([1, 5])
    layout = BlockLayout(anchors, document_starts(documents)[anchors], 2)
    everything = Group(0, 4, 0, 7)
    assert picture(layout.visible(everything, LayerMask(None, False))) == [
        "x......" + "xx..",
        "x......" + "xx..",
        "..xxx.." + "..xx",
        "..xxx.." + "..xx",
    ]
    assert picture(layout.visible(everything, LayerMask(3, True))) == [
        "x......" + "x...",
        "x......" + "xx..",
        "...xx.." + "..x.",
        "....x.." + "..xx",
    ]


def tensors(num_columns, anchors, block_size, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    documents = (torch.arange(num_columns) >= num_columns // 3).long()
    anchors = torch.tensor(anchors)
    layout = BlockLayout(anchors.to(device), document_starts(documents)[anchors].to(device), block_size)
    P, S = len(anchors), block_size
    shapes = [(P, S, 4, 16), (P, S, 2, 16), (P, S, 2, 16), (num_columns, 2, 16), (num_columns, 2, 16)]
    made = [torch.randn(*shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    return layout, made


def run(attend_class, layer_mask, layout, made):
    """(out, gradients) for a fixed incoming gradient."""
    query, key, value, context_key, context_value = made
    out = attend_class(layout, layer_mask, ContextKV(context_key, context_value))(query, key, value)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), made)


@pytest.mark.parametrize("layer_mask", LAYER_MASKS)
@pytest.mark.parametrize("attend_class", [GroupedBlockAttention, SdpaBlockAttention])
def test_fast_routes_equal_the_dense_reference(attend_class, layer_mask):
    layout, made = tensors(40, [0, 3, 4, 9, 14, 20, 21, 33, 39], 5)
    expected, expected_grads = run(DenseBlockAttention, layer_mask, layout, made)
    out, grads = run(attend_class, layer_mask, layout, made)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layer_mask", LAYER_MASKS)
def test_the_flex_mask_is_the_dense_mask(layer_mask):
    """Forward only: flex attention has no backward on a CPU."""
    layout, made = tensors(40, [0, 3, 4, 9, 14, 20, 21, 33, 39], 5)
    query, key, value, *context = (x.detach() for x in made)
    with torch.no_grad():
        out = FlexBlockAttention(layout, layer_mask, ContextKV(*context), kernel=attend)(query, key, value)
        expected = DenseBlockAttention(layout, layer_mask, ContextKV(*context))(query, key, value)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layer_mask", LAYER_MASKS)
def test_compiled_flex_equals_the_dense_reference_on_a_gpu(layer_mask):
    layout, made = tensors(300, list(range(0, 290, 7)), 16, device="cuda")
    expected, expected_grads = run(DenseBlockAttention, layer_mask, layout, made)
    out, grads = run(partial(FlexBlockAttention, kernel=FLEX.kernel), layer_mask, layout, made)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, atol=5e-3, rtol=5e-3)
