"""The draft cache by hand: which columns are queries, what they see, and attention over ragged rows row by row."""

import pytest
import torch

from speculators.nn.attention import dense_attention
from speculators.nn.cache import DraftCache, Span, TreeSpan

CPU = torch.device("cpu")


def picture(visible):
    return ["".join("x" if cell else "." for cell in row) for row in visible.int().tolist()]


def seen(mask):
    return picture(mask == 0)


def test_even_rows_query_their_final_columns():
    span = Span(slice(0, 2), 5, end=9, start=4, num_queries=2)
    assert span.positions(CPU).tolist() == [[4, 5, 6, 7, 8]]
    assert span.query_columns(CPU).tolist() == [[3, 4]]
    assert span.query_positions(CPU).tolist() == [[7, 8]]
    hidden = torch.arange(10.0).view(2, 5, 1)
    assert span.select_queries(hidden).squeeze(-1).tolist() == [[3, 4], [8, 9]]


def test_ragged_rows_query_from_their_last_entry_on():
    """Row 0 appends one entry at 6, row 1 three at 2; two slots follow each last entry, padding comes behind them."""
    span = Span(slice(0, 2), 5, end=11, starts_B=torch.tensor([6, 2]), num_queries=3)
    span.first_query_B = torch.tensor([0, 2])
    assert span.query_columns(CPU).tolist() == [[0, 1, 2], [2, 3, 4]]
    assert span.query_positions(CPU).tolist() == [[6, 7, 8], [4, 5, 6]]
    hidden = torch.arange(10.0).view(2, 5, 1)
    assert span.select_queries(hidden).squeeze(-1).tolist() == [[0, 1, 2], [7, 8, 9]]
    mask = span.mask(None, True, torch.zeros(1))
    assert seen(mask[0]) == ["xxxxxxx....", "xxxxxxxx...", "xxxxxxxxx.."]
    assert seen(mask[1]) == ["xxxxx......", "xxxxxx.....", "xxxxxxx...."]
    sliding = span.mask(3, True, torch.zeros(1))
    assert seen(sliding[1]) == ["..xxx......", "...xxx.....", "....xxx...."]


@pytest.mark.parametrize(("window", "by_hand"), [(None, ["xxxx.x.", "xxx.x.x"]), (3, ["..xx.x.", "..x.x.x"])])
def test_nodes_of_a_tree_see_the_prefix_and_their_ancestors(window, by_hand):
    """Three entries; nodes a b at depth 1 (slots 3 4, position 3), aa ba at depth 2 (slots 5 6, position 4)."""
    visible = torch.tensor([[[1, 0, 1, 0], [0, 1, 0, 1]]], dtype=torch.bool)
    span = TreeSpan(
        slice(0, 1),
        2,
        end=7,
        starts_B=torch.tensor([5]),
        num_queries=2,
        lengths_B=torch.tensor([3]),
        visible_BFN=visible,
    )
    assert seen(span.mask(window, True, torch.zeros(1))[0]) == by_hand


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_queries", [1, 2])
def test_ragged_attention_equals_dense_attention_of_each_row(window, num_queries):
    generator = torch.Generator().manual_seed(0)

    def draw(length, heads):
        return torch.randn(2, length, heads, 6, generator=generator)

    cache = DraftCache(1, 2, 2, 6, dtype=torch.float32, device=CPU)
    (attention,) = cache.layer_attention([window])
    before = draw(7, 4), draw(7, 2), draw(7, 2)
    cache.span = Span(slice(0, 2), 7, end=7, start=0)
    attention(*before)
    starts, counts = [7, 3], [2, 4]  # row 1 overwrites what was drafted from position 3 on
    query, key, value = draw(5, 4), draw(5, 2), draw(5, 2)
    cache.span = Span(slice(0, 2), 5, end=12, starts_B=torch.tensor(starts), num_queries=num_queries)
    cache.span.first_query_B = torch.tensor(counts) - num_queries
    out = attention(query, key, value)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        pairs = (before[1], key), (before[2], value)
        keys, values = (torch.cat((old[row, :start], new[row, :count]))[None] for old, new in pairs)
        position = torch.arange(start + count - num_queries, start + count)[:, None]
        entry = torch.arange(start + count)
        visible = (entry <= position) & (entry > position - (window or 99))
        expected = dense_attention(query[row : row + 1, count - num_queries : count], keys, values, visible)
        torch.testing.assert_close(out[row : row + 1], expected, atol=1e-5, rtol=1e-5)
