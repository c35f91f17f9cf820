"""How often a round of decoding makes the host wait for its device, by a device that counts (`second_device`)."""

import contextlib
import dataclasses

import pytest
import torch
from device_toys import DRAFTERS, make_drafter
from drafter_toys import VOCAB, save_llama
from second_device import DEVICE, SecondDevice
from transformers import LlamaForCausalLM

from speculators.decoding import Engine, HFVerifier, SamplingParams
from speculators.decoding.proposers.draft_model import DraftModelProposer, first_layers
from speculators.decoding.trees.dynamic_tree import DynamicTreeProposer, DynamicTreeShape
from speculators.decoding.trees.static_tree import StaticTreeProposer, TreeDraftModelProposer
from speculators.decoding.trees.token_tree import TokenTree
from speculators.model import SpeculatorModel

K = 4
TREE = TokenTree.of([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
CONFIGS = {
    "plain": None,
    "ngram": {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_min": 1, "prompt_lookup_max": 2},
    "suffix": {"method": "suffix", "num_speculative_tokens": K},
}
LAST_STATE = {"medusa": {"num_heads": K}, "mlp": {}}
SAMPLED = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.8, top_k=20, top_p=0.95, seed=3)
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def verifier_path(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("verifier"), num_layers=6, head_dim=16)


def prompts(num_rows):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (num_rows,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def drafter_of(method, path):
    """A trained drafter with random weights; None for methods that have none."""
    algorithm = method.split()[0]
    torch.manual_seed(0)
    if algorithm in DRAFTERS:
        return make_drafter(algorithm, path)
    if algorithm in LAST_STATE:
        keys = {"verifier_name_or_path": str(path), **LAST_STATE[algorithm]}
        return SpeculatorModel.get_class(algorithm).from_training_args(None, **keys)
    return None


def drafting(method, model, drafter, num_rows):
    """What the engine is told to draft with."""
    sizes = {"max_batch_size": num_rows, "max_length": 128}
    if drafter is None:
        if method in CONFIGS:
            return CONFIGS[method]
        proposer = DraftModelProposer(first_layers(model, 2), max_batch_size=num_rows)
        return TreeDraftModelProposer(proposer, TREE) if method.endswith("tree") else proposer
    if method.endswith(" tree"):
        return StaticTreeProposer(drafter.make_tree_drafter(model, **sizes), TREE)
    if method.endswith(" dynamic"):
        return DynamicTreeProposer(drafter.make_tree_drafter(model, **sizes), DynamicTreeShape(8, 2, 3))
    return drafter.make_proposer(model, **sizes)


def one_launch(device):
    """Records what is one launch when it is replayed: it may not read, nor copy from the host."""

    def record(run):
        run()  # makes what is made once

        def replay():
            with device.as_one_launch():
                return run()

        return replay

    return record


def decode(method, path, num_rows, sampling, device=None, record=None):
    """(texts, [(counts, where the host waited) of each round]); `device` None: the host."""
    model = LlamaForCausalLM.from_pretrained(path).eval().requires_grad_(False)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    drafter, rounds = drafter_of(method, path), []
    with contextlib.nullcontext() if device is None else device:
        if device is not None:
            model = model.to(DEVICE)
        proposer = drafting(method, model, drafter, num_rows)
        is_ready = proposer is not None and not isinstance(proposer, dict)
        verifier = HFVerifier(model, num_rows, proposer.capture if is_ready else None)
        assert verifier.is_lean
        sizes = {"max_batch_size": num_rows, "max_length": 128}
        engine = Engine(verifier, proposer, num_speculative_tokens=K if is_ready else None, **sizes)
        if record is not None:
            verifier.use_graphs(record)
            proposer.use_graphs(record)
        keep = verifier.keep

        def counted(*args):
            if device is not None:
                rounds.append((dict(device.counts), dict(device.where)))
                device.start_counting()
            return keep(*args)

        verifier.keep = counted
        outputs = engine.generate(prompts(num_rows), sampling)
    return [output.token_ids for output in outputs], rounds


MOST_LAUNCHES = {
    "plain": (215, 385),
    "ngram": (260, 430),
    "draft_model": (600, 900),
    "draft_model tree": (670, 1150),
    "eagle3": (820, 1140),
    "eagle3 tree": (850, 1340),
    "eagle3 dynamic": (880, 1080),
    "peagle": (430, 650),
    "dflash": (430, 660),
    "dspark": (480, 720),
    "medusa": (310, 600),
    "medusa tree": (380, 860),
    "mlp": (320, 600),
}
"""Launches of the costliest round, (greedy, sampled), of eight rows and six layers. These numbers only go down."""
READS = {"eagle3 dynamic": 2}
"""Else one: a tree's shape, which depends on what the drafter found, must be known before it is scored."""


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", MOST_LAUNCHES)
def test_a_round_waits_for_the_device_once(method, sampling, verifier_path):
    """And the text is that of the host, whose routes differ."""
    expected, _ = decode(method, verifier_path, 8, sampling)
    texts, rounds = decode(method, verifier_path, 8, sampling, SecondDevice())
    assert texts == expected
    steady = rounds[len(rounds) // 2 : -1]  # all rows take part, and nothing is made for the first time
    for counts, where in steady:
        assert counts["reads"] == READS.get(method, 1), where
        assert counts.get("waits", 0) == 0, where
    assert len(steady) > 1
    assert max(counts["launches"] for counts, _ in steady) <= MOST_LAUNCHES[method][sampling is SAMPLED]


def most_of(method, path, num_rows, sampling, device, record=None):
    """(launches, reads) of the costliest round in which all rows take part."""
    _, rounds = decode(method, path, num_rows, sampling, device, record)
    steady = [counts for counts, _ in rounds[len(rounds) // 2 : -1]]
    assert len(steady) > 1 and all(counts.get("waits", 0) == 0 for counts in steady)
    return max(counts["launches"] for counts in steady), max(counts["reads"] for counts in steady)


ENDED = 12
"""More launches of a round in which some row has ended, or some tree's path moves."""


@pytest.mark.parametrize("method", ["plain", "draft_model tree"])
def test_launches_and_reads_do_not_grow_with_the_batch(method, verifier_path):
    """Also those of log-probabilities, which are read beside the tokens, and of a tree's path that moves."""
    sampling = dataclasses.replace(SAMPLED, logprobs=2)
    few, many = (most_of(method, verifier_path, num_rows, sampling, SecondDevice()) for num_rows in (2, 8))
    assert few[1] == many[1] == 2
    assert many[0] <= few[0] + ENDED


LAUNCHES_OF_TWO_ROWS = {
    "eagle3": 256,
    "peagle": 244,
    "dflash": 244,
    "dspark": 262,
    "medusa": 272,
    "mlp": 268,
    "draft_model": 421,
}
"""In a round of sampled rows whose verifier and drafter are recorded. These numbers only go down."""


@pytest.mark.parametrize("method", LAUNCHES_OF_TWO_ROWS)
def test_a_recorded_round_is_one_wait_and_as_many_launches_as_of_two_rows(method, verifier_path):
    device = SecondDevice()
    launches, reads = most_of(method, verifier_path, 8, SAMPLED, device, one_launch(device))
    assert reads == 1
    assert launches <= LAUNCHES_OF_TWO_ROWS[method] + ENDED
