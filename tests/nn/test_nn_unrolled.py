"""Masks by hand, the rectangles that cover them, and the tail attention against dense attention over every key."""

import pytest
import torch

from speculators.nn.packed_row import PackedRow, document_mask, unrolled_mask
from speculators.nn.routes import DENSE, FLASH, FLEX, SDPA, attend
from speculators.nn.unrolled import (
    DenseUnrolledAttention,
    FlexUnrolledAttention,
    SdpaUnrolledAttention,
    TailUnrolledAttention,
    unrolled_attention,
)

DOCUMENTS = {"one": [0] * 9, "two": [0] * 5 + [1] * 4, "three and padding": [0] * 3 + [1] + [2] * 4 + [-1] * 2}
WINDOWS = [None, 3, 1]


def visible(mask):
    return mask.int().tolist()


def test_document_mask_by_hand():
    assert visible(document_mask(torch.tensor([0, 0, 1, -1]))) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 0],
    ]
    assert visible(document_mask(torch.tensor([0, 0, 0]), window=2)) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_unrolled_mask_by_hand():
    """Step 2: step-0 keys of the document, then the query's own column of steps 1 and 2; padding sees itself."""
    assert visible(unrolled_mask(torch.tensor([0, 0, -1]), step=2)) == [
        [1, 0, 0, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 0, 0, 1],
    ]


def test_window_moves_with_the_query():
    """Window 2 at step 1: query q stands at q + 1 and sees positions q and q + 1."""
    assert visible(unrolled_mask(torch.tensor([0, 0, 0]), step=1, window=2)) == [
        [1, 0, 0, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_rectangles_cover_exactly_what_is_visible(documents, window, shift):
    document_ids = torch.tensor(DOCUMENTS[documents])
    mask = document_mask(document_ids, window, shift)
    real = (document_ids != -1).nonzero().flatten()
    for rows in (real, real[::2], real[torch.tensor([0, 1, -2, -1])].unique()):
        covered = torch.zeros(len(rows), len(document_ids), dtype=torch.int64)
        for cover in PackedRow(document_ids, rows).blocks(window, shift):
            for block in cover:
                seen = block.visible_QK
                if seen is None:
                    seen = torch.ones(block.query_end - block.query_start, block.key_end - block.key_start).bool()
                    seen = seen.tril() if block.causal else seen
                covered[block.query_start : block.query_end, block.key_start : block.key_end] += seen
        assert torch.equal(covered, mask[rows].long())


def unroll(attention, rows, num_steps, dtype=torch.float64, heads=(4, 2), head_dim=6, backward=True):
    """Output of the asked rows at each step and the gradients, of queries, keys and values drawn for every column."""
    generator = torch.Generator().manual_seed(0)
    num_columns, device = attention.packed.document_ids_T.shape[0], attention.packed.document_ids_T.device

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    leaves = [
        [draw(1, num_columns, n, head_dim).requires_grad_(backward) for n in (heads[0], heads[1], heads[1])]
        for _ in range(num_steps)
    ]
    dense = isinstance(attention, DenseUnrolledAttention)
    outputs = []
    for s, (query, key, value) in enumerate(leaves):
        if s > 0 and not dense:
            query, key, value = (x[:, rows] for x in (query, key, value))
        out = attention(query, key, value)
        outputs.append(out[:, rows] if dense else out)
    mix = torch.stack(outputs)
    if backward:
        (mix * draw(*mix.shape)).sum().backward()
    return mix.detach(), [x.grad for step in leaves for x in step]


def grads_or_zeros(grads, like):
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, like, strict=True)]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("every", [1, 2])
def test_tail_attention_equals_dense_attention_forward_and_backward(documents, window, every):
    """float64: 1e-12 leaves no room for an approximation."""
    document_ids = torch.tensor(DOCUMENTS[documents])
    rows = (document_ids != -1).nonzero().flatten()[::every]
    expected, expected_grads = unroll(DenseUnrolledAttention(PackedRow(document_ids), window), rows, 3)
    out, grads = unroll(TailUnrolledAttention(PackedRow(document_ids, rows), window, last_layer=True), rows, 3)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grads_or_zeros(grads, expected_grads), expected_grads, atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_with_a_tail_equals_dense_attention(window):
    """Forward, uncompiled: all that flex attention does on a CPU."""
    document_ids = torch.tensor(DOCUMENTS["three and padding"])
    rows = (document_ids != -1).nonzero().flatten()[::2]
    expected, _ = unroll(DenseUnrolledAttention(PackedRow(document_ids), window), rows, 3, backward=False)
    attention = FlexUnrolledAttention(PackedRow(document_ids, rows), window, last_layer=True, kernel=attend)
    out, _ = unroll(attention, rows, 3, backward=False)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_compiled_flex_attention_equals_dense_attention_on_a_gpu(window):
    document_ids = torch.tensor([0] * 300 + [1] * 200 + [-1] * 12, device="cuda")
    rows = torch.arange(0, 500, 3, device="cuda")
    sizes = {"dtype": torch.float32, "head_dim": 64}
    expected, expected_grads = unroll(DenseUnrolledAttention(PackedRow(document_ids), window), rows, 3, **sizes)
    attention = FlexUnrolledAttention(PackedRow(document_ids, rows), window, last_layer=True, kernel=FLEX.kernel)
    out, grads = unroll(attention, rows, 3, **sizes)
    # flex attention multiplies in tf32 or better: ten bits
    torch.testing.assert_close(out, expected, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(grads_or_zeros(grads, expected_grads), expected_grads, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [None, 3])
def test_sdpa_route_equals_dense_attention(window):
    document_ids = torch.tensor(DOCUMENTS["three and padding"])
    rows = torch.arange(8)
    expected, expected_grads = unroll(DenseUnrolledAttention(PackedRow(document_ids), window), rows, 3)
    out, grads = unroll(SdpaUnrolledAttention(PackedRow(document_ids), window), rows, 3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_long_sliding_rows_are_cut_into_blocks():
    """Longer than a block of queries, so that blocks meet: still exact."""
    document_ids = torch.tensor([0] * 600 + [1] * 20)
    rows = torch.arange(620)
    expected, expected_grads = unroll(DenseUnrolledAttention(PackedRow(document_ids), 50), rows, 2, heads=(2, 1))
    out, grads = unroll(
        TailUnrolledAttention(PackedRow(document_ids, rows), 50, last_layer=True), rows, 2, heads=(2, 1)
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grads, expected_grads, atol=1e-12, rtol=1e-12)


def test_bf16_is_as_close_to_the_truth_as_the_reference():
    document_ids = torch.tensor(DOCUMENTS["two"])
    rows = torch.arange(9)
    truth, _ = unroll(DenseUnrolledAttention(PackedRow(document_ids), None), rows, 3)
    out, _ = unroll(
        TailUnrolledAttention(PackedRow(document_ids, rows), None, last_layer=True), rows, 3, dtype=torch.bfloat16
    )
    torch.testing.assert_close(out.double(), truth, atol=0.03, rtol=0.03)


def test_each_route_has_its_attention():
    packed = PackedRow(torch.zeros(4, dtype=torch.int64))
    classes = {
        DENSE: DenseUnrolledAttention,
        SDPA: SdpaUnrolledAttention,
        FLASH: TailUnrolledAttention,
        FLEX: FlexUnrolledAttention,
    }
    for route, kind in classes.items():
        assert type(unrolled_attention(route, packed, [None])[0]) is kind
    for route in (FLASH, FLEX):
        first, last = unrolled_attention(route, packed, [None, 5])
        assert (first.last_layer, last.last_layer, last.window) == (False, True, 5)
