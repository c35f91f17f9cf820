"""Drafters at fixed shapes, which a GPU records as graphs: the drafts and the texts of shapes as they come, token for
token, from few recorded shapes."""

import copy
from dataclasses import replace

import pytest
import torch
from device_toys import DRAFTERS, make_drafter
from drafter_toys import VOCAB, save_llama
from graph_toys import Recorder
from transformers import LlamaForCausalLM

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.proposers.draft_model import DraftModelProposer, first_layers
from speculators.model import SpeculatorModel
from speculators.nn.draft_tokens import own_probs_of
from speculators.nn.graphs import CudaGraphs, FixedShapes, launch_by_launch

K, ROWS = 3, 4
LAST_STATE = {"medusa": {"num_heads": 2}, "mlp": {}}
METHODS = [*DRAFTERS, *LAST_STATE, "draft_model"]
LENGTHS = (1, 3, 40, 7, 2, 243, 12)
"""Of prompts; more than rows. One is longer than 256 slots before it ends."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = save_llama(tmp_path_factory.mktemp("verifier"), num_layers=6, head_dim=16)
    model = LlamaForCausalLM.from_pretrained(path).eval().requires_grad_(False)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def proposer_of(method, model):
    if method == "draft_model":
        return DraftModelProposer(first_layers(model, 2), max_batch_size=ROWS)
    torch.manual_seed(0)
    path = model.name_or_path
    if method in DRAFTERS:
        drafter = make_drafter(method, path)
    else:
        keys = {"verifier_name_or_path": path, **LAST_STATE[method]}
        drafter = SpeculatorModel.get_class(method).from_training_args(None, **keys)
    return drafter.make_proposer(model, max_batch_size=ROWS, max_length=256)


def engine_of(method, model, record=None):
    """An engine, and the drafts of its rounds, with their chances where they are drawn."""
    proposer, drafts = proposer_of(method, model), []
    propose = proposer.propose

    def kept(*args):
        proposal = propose(*args)
        drafts.append((proposal.token_ids_BK.tolist(), proposal.probs_BKV, own_probs_of(args[2])))
        return proposal

    proposer.propose = kept
    engine = Engine(model, proposer, num_speculative_tokens=K, max_batch_size=ROWS, max_length=256)
    if record is not None:
        engine.verifier.use_graphs(record)
        proposer.use_graphs(record)
    return engine, drafts


def requests(is_sampled):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    sampled = {"temperature": 0.8, "top_k": 20, "logprobs": 1}
    settings = [sampled if is_sampled and i % 3 else {} for i in range(len(prompts))]
    return prompts, [SamplingParams(max_tokens=4 + i, ignore_eos=True, seed=i, **own) for i, own in enumerate(settings)]


@pytest.mark.parametrize(
    ("method", "is_sampled"), [("eagle3", False), ("dflash", False), *((method, True) for method in METHODS)]
)
def test_recorded_rounds_have_the_drafts_and_the_text_of_shapes_as_they_come(method, is_sampled, model):
    """Requests join and leave; `Recorder` repeats the recorded calls alone."""
    expected_engine, expected_drafts = engine_of(method, model)
    expected = expected_engine.generate(*requests(is_sampled))
    record = Recorder()
    engine, drafts = engine_of(method, model, record)
    found = engine.generate(*requests(is_sampled))
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert [tokens for tokens, *_ in drafts] == [tokens for tokens, *_ in expected_drafts]
    for (_, *probs), (_, *expected_probs) in zip(drafts, expected_drafts, strict=True):
        torch.testing.assert_close(probs, expected_probs, atol=1e-5, rtol=1e-4)
    assert any(own is not None for *_, own in drafts) == is_sampled
    assert record.num_replayed > 2 * record.num_recorded
    # rows 1, 2, 4; 256 or 512 slots; drafts drawn or not, with own probabilities or not; of a model, 1 to K + 1 columns
    drafter_shapes = 3 * 2 * (K + 1) if method == "draft_model" else 3 * 2 * 3
    assert record.num_recorded <= 3 * 2 + drafter_shapes


def decode_with_two_methods(model, graphs):
    """Requests choose their method and how much it drafts; a row that drafts nothing now may draft later."""
    proposers = {method: proposer_of(method, model) for method in ("eagle3", "dflash")}
    first, second = proposers.values()
    engine = Engine(
        model,
        first,
        num_speculative_tokens=K,
        other_methods={"second": second},
        max_batch_size=ROWS,
        max_length=256,
        graphs=graphs,
    )
    assert [proposer.shapes is not None for proposer in proposers.values()] == [graphs == "static"] * 2
    prompts, sampling = requests(is_sampled=True)
    chosen = [
        replace(params, method=[None, "second"][i % 2], num_speculative_tokens=[None, 1, 0, 2][i % 4], max_tokens=9)
        for i, params in enumerate(sampling)
    ]
    outputs = engine.generate(prompts, chosen)
    return [(output.token_ids, output.stats.rounds) for output in outputs]


def test_two_methods_and_numbers_of_drafts_at_fixed_shapes(model):
    assert decode_with_two_methods(model, "static") == decode_with_two_methods(model, "off")


def test_a_shape_is_recorded_once_however_many_requests_join_and_leave(model):
    record = Recorder()
    engine, _ = engine_of("eagle3", model, record)
    short = [prompt for prompt in requests(False)[0] if len(prompt) < 100]
    counts = []
    for num_prompts in (5, 2, 1, 4, 3):
        engine.generate(short[:num_prompts], SamplingParams(max_tokens=3 + num_prompts, ignore_eos=True))
        counts.append(record.num_recorded)
    assert counts[-1] == counts[2] <= 2 * 3  # verifier and drafter at 1, 2 and 4 rows


def test_what_was_recorded_is_dropped_with_the_memory_that_it_reads():
    shapes, cache, record = FixedShapes(recorder := Recorder()), torch.zeros(3), 1.0
    for memory, expected in ((cache, 1), (cache, 1), (torch.ones(3), 2), (cache, 3)):
        out = shapes.run("shape", (torch.tensor(record),), lambda x, memory=memory: (x + memory, None), (memory,))
        assert out[0].tolist() == (record + memory).tolist() and out[1] is None
        assert recorder.num_recorded == expected
        record += 1


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_recorded_graphs_have_the_drafts_and_the_text_of_their_slow_twin(method, model):
    on_device = copy.deepcopy(model).cuda()
    found = []
    for record in (CudaGraphs(), launch_by_launch):
        engine, drafts = engine_of(method, on_device, record)
        outputs = engine.generate(*requests(is_sampled=True))
        found.append(([output.token_ids for output in outputs], [tokens for tokens, *_ in drafts]))
    assert found[0] == found[1]
