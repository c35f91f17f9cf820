"""Two ranks train as one does: every drafter, by DistributedDataParallel and by FSDP2, on two gloo processes."""

from __future__ import annotations

import json

import pytest
import ranked_runs
import torch
from drafter_toys import HIDDEN, VOCAB, save_llama
from training_toys import run_on_two_ranks

from speculators.interfaces import VerifierStates
from speculators.model import SpeculatorModel
from speculators.train.checkpoint_files import SHARDS, masters
from speculators.train.distributed import Ranks

PAIRS = [(kind, algorithm) for kind in ("ddp", "fsdp") for algorithm in ranked_runs.ALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both ways of two ranks (`ranks.json`), then one rank with two rows per step (`one`)."""
    folder = tmp_path_factory.mktemp("ranks")
    save_llama(folder / "verifier", num_layers=6, head_dim=16)
    save_llama(folder / "wide", num_layers=1, vocab_size=20_000, head_dim=16)  # heads larger than a bucket
    run_on_two_ranks(ranked_runs.__file__, folder, folder=folder, timeout_s=500)
    found = json.loads((folder / "ranks.json").read_text())
    found["one"] = ranked_runs.curves(folder, "one", Ranks())
    (folder / "ranks.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "ranks.json").read_text())


@pytest.mark.parametrize(("kind", "algorithm"), PAIRS)
def test_two_ranks_have_the_losses_of_one_that_takes_two_rows_per_step(found, kind, algorithm):
    two, one = found[kind][algorithm], found["one"][algorithm]
    assert len(two) == len(one) == 3 and one[0] != one[2]
    assert max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(two, one, strict=True)) < 1e-5


@pytest.mark.parametrize(("kind", "algorithm"), PAIRS)
def test_the_checkpoint_of_two_ranks_loads_in_one_process_and_drafts_the_same_tokens(folder, kind, algorithm):
    assert (folder / kind / algorithm / "0" / SHARDS).is_dir() == (kind == "fsdp")
    logits = []
    for run in (kind, "one"):
        model = SpeculatorModel.from_pretrained(folder / run / algorithm / "0", dtype=torch.float32).eval()
        aux_layers = model.capture.aux_layer_ids
        generator = torch.Generator().manual_seed(7)
        states = VerifierStates(
            torch.randint(0, VOCAB, (20,), generator=generator),
            torch.randn(20, len(aux_layers) * HIDDEN, generator=generator) if aux_layers else None,
            torch.randn(20, HIDDEN, generator=generator),
        )
        with torch.no_grad():
            logits.append(model.draft_logits(states, 2))
    assert logits[0].argmax(-1).tolist() == logits[1].argmax(-1).tolist()


def test_a_sharded_checkpoint_continues_in_one_process(folder):
    """From the parts of two ranks: the weights are those of the run on one, and so is the optimizer's state."""
    trainers = []
    for kind in ("fsdp", "one"):
        settings = {"resume_from_checkpoint": True, "num_epochs": 2}
        trainers.append(
            ranked_runs.trainer_of("eagle3", folder / "verifier", folder / kind / "eagle3", Ranks(), [], **settings)
        )
    from_two, from_one = trainers
    assert from_two.position == from_one.position and from_two.position.epoch == 1
    weights = [masters(trainer.model) for trainer in trainers]
    assert all((tensor.float() - weights[1][name].float()).abs().max() < 1e-5 for name, tensor in weights[0].items())
    momenta = [trainer.optimizers.state_dict()["AdamW"]["state"] for trainer in trainers]
    assert momenta[0].keys() == momenta[1].keys() and len(momenta[0]) == len(from_two.params)
    assert all((of["exp_avg"] - momenta[1][index]["exp_avg"]).abs().max() < 1e-5 for index, of in momenta[0].items())


def test_rows_before_the_last_of_a_step_reduce_nothing_and_buckets_overlap_with_the_backward_pass(found):
    before, last = found["collectives"]["ddp"]
    assert [name for name in before if name.startswith("c10d::")] == []
    first = last.index("c10d::allreduce_")
    assert last.count("c10d::allreduce_") > 1 and "gradient" in last[first:]
    before, last = found["collectives"]["fsdp"]
    assert {name for name in before if name.startswith("c10d::")} == {"c10d::_allgather_base_"}
    assert {name for name in last if name.startswith("c10d::")} == {"c10d::_reduce_scatter_base_"}
