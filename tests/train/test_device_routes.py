"""Every route of attention that any device takes, chosen by argument on a CPU: the same loss and gradients as the dense
reference, and nothing compiled anew because a row has another shape."""

import functools
import random

import pytest
import torch
from device_toys import DRAFTERS, flex_route, make_drafter, row_of, written_out
from drafter_toys import save_llama

from speculators.nn import routes
from speculators.nn.routes import DENSE, FLASH, FLEX, ROUTES, SDPA, choose_route
from speculators.train.config import TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.events import ignore
from speculators.train.run import build

EAGER_FLEX = "ignore:flex_attention called without torch.compile"


@pytest.fixture(scope="module")
def wide_verifier(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("verifier"), num_layers=6, head_dim=16)


def run(model, batch, route, **keywords):
    """(loss, gradients by name)"""
    model.zero_grad()
    torch.manual_seed(0)
    _, loss, _ = model(**batch, attention_route=route, generator=torch.Generator().manual_seed(0), **keywords)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: grad.clone() for name, grad in grads.items()}


@pytest.mark.parametrize("algorithm", DRAFTERS)
def test_every_route_has_the_loss_and_gradients_of_the_reference(algorithm, wide_verifier):
    """Short rows and one that fills blocks of the kernel wholly; float32."""
    model = make_drafter(algorithm, wide_verifier)
    table = {route.name: route for by_device in ROUTES.values() for route in by_device.values()}
    others = {name: flex_route(written_out) if route is FLEX else route for name, route in table.items()}
    assert others.pop("dense") is DENSE and others  # every route that any pair of the table takes
    for lengths, padding in (([9, 1, 14, 2, 11], 4), ([290, 80], 0), ([2], 0)):
        batch = row_of(algorithm, lengths, seed=1, padding=padding)
        expected, expected_grads = run(model, batch, DENSE)
        for name, route in others.items():
            loss, grads = run(model, batch, route)
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5, msg=f"{name} {lengths}")
            assert grads.keys() == expected_grads.keys()
            for parameter, grad in grads.items():
                what = f"{name} {lengths} {parameter}"
                torch.testing.assert_close(grad, expected_grads[parameter], atol=2e-5, rtol=1e-3, msg=what)


@pytest.mark.filterwarnings(EAGER_FLEX)
@pytest.mark.parametrize("algorithm", DRAFTERS)
def test_flex_attention_itself_has_the_loss_of_the_reference(algorithm, wide_verifier):
    """Forward, uncompiled: all that torch's flex attention does on a CPU."""
    model = make_drafter(algorithm, wide_verifier)
    batch = row_of(algorithm, [150, 1, 60], seed=2, padding=5)
    with torch.no_grad():
        losses = []
        for route in (DENSE, flex_route(routes.attend)):
            torch.manual_seed(0)
            losses.append(model(**batch, attention_route=route, generator=torch.Generator().manual_seed(0))[1])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)


def shapes(num_rows):
    """(lengths of documents, share supervised, max_anchors, padding): rows of nothing and of one token first, then
    anything, so that what varies has been seen by the tenth row."""
    draw = random.Random(0)
    yield from [([], 0.0, 1, 8), ([1], 1.0, 1, 0), ([2], 1.0, 2, 3), ([90, 7], 0.0, 4, 0), ([64, 64], 1.0, 64, 0)]
    for _ in range(num_rows - 5):
        lengths = [draw.choice([1, 2, draw.randint(3, 40), draw.randint(40, 90)]) for _ in range(draw.randint(1, 4))]
        yield lengths, draw.choice([0.0, 0.02, 0.5, 1.0]), draw.choice([1, 2, 7, 40, 200]), draw.choice([0, 1, 30])


def compilations_by_row(algorithm, verifier_path, route, num_rows, **options):
    """Compilations up to each of differently shaped rows, by a backend that counts graphs and compiles none."""
    compilations = []

    def count(graph, examples):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if route.kernel is not None:
        compile_it = routes.compiled if not options else functools.partial(torch.compile, routes.attend, **options)
        route = flex_route(compile_it(backend=count))
    model, seen = make_drafter(algorithm, verifier_path), []
    with torch.no_grad():
        for i, (lengths, supervised, max_anchors, padding) in enumerate(shapes(num_rows)):
            batch = row_of(algorithm, lengths, seed=i, padding=padding, supervised=supervised)
            model(**batch, max_anchors=max_anchors, attention_route=route, return_logits=False)
            seen.append(len(compilations))
    return seen


@pytest.fixture
def small_blocks(monkeypatch):
    """So that small rows have many numbers of them."""
    monkeypatch.setattr(routes, "BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", ROUTES)
@pytest.mark.parametrize("algorithm", DRAFTERS)
def test_no_row_compiles_anew_because_of_its_shape(algorithm, implementation, wide_verifier):
    """Of the routes that a GPU takes: at most 4 compilations in the first 10 of 60 rows, none in the last 50."""
    route = choose_route(implementation, "cuda", head_size=16)
    seen = compilations_by_row(algorithm, wide_verifier, route, 60)
    assert seen[9] <= 4 and seen[59] == seen[9], seen
    assert (seen[9] > 0) == (route.kernel is not None)


@pytest.mark.usefixtures("small_blocks")
def test_a_kernel_that_is_compiled_for_each_size_is_seen(wide_verifier, monkeypatch):
    """As drafters trained before: the count above says so."""
    monkeypatch.setattr(routes, "mark", lambda tensor, *dims: None)
    seen = compilations_by_row("dflash", wide_verifier, FLEX, 8, dynamic=False)
    assert seen[-1] > 4, seen


@pytest.mark.parametrize("algorithm", DRAFTERS)
def test_a_mask_is_made_once_per_row(algorithm, wide_verifier, monkeypatch):
    """However many layers and steps: one for each window and set of queries (and step, where the window moves)."""
    made = []
    original = routes.FlexMask.of.__func__

    def of(cls, ranges, num_keys):
        made.append((ranges.low_2R.tolist(), ranges.high_2R.tolist()))
        return original(cls, ranges, num_keys)

    monkeypatch.setattr(routes.FlexMask, "of", classmethod(of))
    model = make_drafter(algorithm, wide_verifier)
    model(**row_of(algorithm, [9, 8], seed=1), attention_route=flex_route(written_out), return_logits=False)
    most = {"eagle3": 4, "peagle": 2, "dflash": 2, "dspark": 2, "eagle": 2, "mtp": 1}
    assert 0 < len(made) <= most[algorithm]
    assert all(made.count(mask) == 1 for mask in made)


def test_the_table_of_routes():
    names = ("eager", "sdpa", "simple_flex_attention", None)
    assert [choose_route(name, "cpu", 6) for name in names] == [DENSE, FLASH, FLASH, FLASH]
    assert [choose_route(name, "cuda", 64) for name in names] == [DENSE, SDPA, FLEX, FLEX]
    assert [choose_route(name, "mps", 64) for name in names] == [DENSE, SDPA, SDPA, SDPA]
    assert [route.computes_chosen_queries for route in (DENSE, SDPA, FLASH, FLEX)] == [False, False, True, True]


def test_a_pair_that_cannot_run_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"draft_attn_impl='flash_attention_2'.*--draft-attn-impl.*'sdpa'"):
        choose_route("flash_attention_2", "cuda", 64)
    with pytest.raises(ValueError, match=r"on cuda takes heads of 16 numbers or more.*have 8.*--draft-attn-impl sdpa"):
        choose_route("simple_flex_attention", "cuda", 8)
    assert choose_route("sdpa", "cuda", 8) is SDPA


def test_a_run_is_refused_before_it_reads_states(verifier_path, data_path, tmp_path):
    """The verifier's heads, which the drafter takes over, have 8 numbers. No GPU is asked."""
    values = {"verifier_name_or_path": str(verifier_path), "data_path": str(data_path), "save_path": str(tmp_path)}
    config = TrainConfig.from_flat(
        {**values, "speculator_type": "eagle3", "total_seq_len": 64, "target_layer_ids": [1, 2]}
    )
    with pytest.raises(ValueError, match=r"on cuda takes heads of 16 numbers or more, the drafter's have 8"):
        build(config, Ranks(device=torch.device("cuda")), ignore)


def test_an_empty_row_of_queries_and_whole_blocks_have_the_blocks_they_need():
    """By hand: 300 causal queries take blocks (0,0) (1,0) (1,1) (2,0..2), of which those left of the diagonal are full;
    the padded queries of the last block see key 0, so that no block of that row is."""
    index = torch.arange(300)
    nothing = torch.zeros_like(index)
    ranges = routes.KeyRanges(torch.stack((nothing, nothing)), torch.stack((index + 1, nothing)))
    mask = routes.FlexMask.of(ranges, 300)
    assert mask.blocks.kv_num_blocks.tolist() == [[[1, 1, 3]]]
    assert mask.blocks.full_kv_num_blocks.tolist() == [[[0, 1, 0]]]
    assert mask.blocks.kv_indices[0, 0, 1, 0] == 1 and mask.blocks.full_kv_indices[0, 0, 1, 0] == 0
    empty = routes.FlexMask.of(routes.KeyRanges(nothing[None, :0].expand(2, -1), nothing[None, :0].expand(2, -1)), 300)
    assert empty.blocks.kv_num_blocks.tolist() == [[[1, 1]]]
