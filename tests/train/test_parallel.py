"""What a drafter says about its weights holds, and what happens where it does not: by the ways in which ranks train."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from device_toys import DRAFTERS, make_drafter, row_of
from drafter_toys import save_llama
from ranked_runs import ALL, make
from torch import nn
from torch.distributed.tensor import DTensor

from speculators.model import SpeculatorModel
from speculators.train.distributed import KEPT_GROUPS, Ranks, whole_tensor
from speculators.train.parallel import Alone, Replicated, Sharded

ROWS = {
    "several documents": ([9, 1, 14], {"supervised": 0.5}),
    "one document of a token": ([1], {"supervised": 1.0}),
    "nothing supervised": ([9, 4], {"supervised": 0.0}),
}


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("parallel"), num_layers=6, head_dim=16)


@pytest.fixture
def process_group():
    """Of this process alone: what DistributedDataParallel and FSDP2 do with gradients is the same on one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    KEPT_GROUPS.append(dist.group.WORLD)
    yield
    dist.destroy_process_group()


def backward(parallel: Alone, algorithm: str, row: dict) -> dict[str, torch.Tensor | None]:
    """The gradients of one row, whole. DistributedDataParallel keeps them in buckets, which the next row fills."""
    keywords, _ = type(parallel.model).get_trainer_kwargs(**DRAFTERS.get(algorithm, {}))
    parallel.model.zero_grad()
    torch.manual_seed(3)
    with parallel.row(is_last=True):
        _, loss, _ = parallel.module(**row, **keywords)
        loss.backward()
    named = {name: param.grad for name, param in parallel.model.named_parameters() if param.requires_grad}
    return {name: None if grad is None else whole_tensor(grad).clone() for name, grad in named.items()}


# -- uses_every_weight -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALL)
def test_every_weight_has_a_gradient_whatever_the_row_as_each_drafter_says(verifier, algorithm):
    alone = Alone(make(algorithm, verifier), Ranks())
    assert alone.model.uses_every_weight
    kind = algorithm if algorithm in DRAFTERS else "eagle"
    for row, (lengths, options) in ROWS.items():
        grads = backward(alone, algorithm, row_of(kind, lengths, seed=1, padding=2, **options))
        assert [name for name, grad in grads.items() if grad is None] == [], row
        assert len(grads) >= 3


def test_weights_that_some_rows_leave_out_train_by_ranks_where_the_drafter_does_not_deny_it(
    verifier, process_group, monkeypatch
):
    """Medusa with a layer that only rows of several documents use: without the search for weights that have no gradient
    DistributedDataParallel waits for them, and refuses the next row."""
    rows = [row_of("eagle", lengths, seed=1, supervised=0.5) for lengths in ([9], [9, 4], [9])]
    medusa = SpeculatorModel.get_class("medusa")
    forward = medusa.forward

    def with_rare(self, *args, **row):
        output, loss, metrics = forward(self, *args, **row)
        return output, loss + self.rare.weight.sum() if int(row["document_ids"].max()) else loss, metrics

    monkeypatch.setattr(medusa, "forward", with_rare)
    replicated = {}
    for says in (False, True):
        monkeypatch.setattr(medusa, "uses_every_weight", says)
        model = make("medusa", verifier)
        model.rare = nn.Linear(1, 1)
        replicated[says] = Replicated(model, Ranks())
    given = [backward(replicated[False], "medusa", row)["rare.weight"] for row in rows]
    assert [0.0 if grad is None else float(grad.sum()) for grad in given] == [0.0, 1.0, 0.0]
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        [backward(replicated[True], "medusa", row) for row in rows]


# -- layer_methods -----------------------------------------------------------------------------------------------------


def test_a_method_of_a_layer_that_sharding_does_not_know_is_refused_by_name(verifier, process_group, monkeypatch):
    """DFlash's layers project the context outside of their forward: a class that does not say so cannot be split, or
    would not train what that needs where the weights are there all the same."""
    row = row_of("dflash", [9, 1, 14], seed=1, padding=2, supervised=0.5)
    alone = backward(Alone(make_drafter("dflash", verifier), Ranks()), "dflash", row)
    said = Sharded(make_drafter("dflash", verifier), Ranks(), torch.float32)
    grads = backward(said, "dflash", row)
    assert all(isinstance(param, DTensor) for param in said.model.parameters() if param.requires_grad)
    assert grads.keys() == alone.keys()
    assert all((grads[name] - alone[name]).abs().max() < 1e-5 for name in alone if alone[name] is not None)

    model = make_drafter("dflash", verifier)
    monkeypatch.setattr(type(model), "layer_methods", ())
    unsaid = Sharded(model, Ranks(), torch.float32)
    told = r"--fsdp-shard: {}.* used outside of its layer's forward.*`layer_methods` of DFlashDraftModel,"
    with pytest.raises(ValueError, match=told.format(r"layers\.0\.project_context needs weights that are split")):
        backward(unsaid, "dflash", row)
    for shard in unsaid.shards:
        shard.unshard()
    with pytest.raises(ValueError, match=told.format(r"the gradient of layers\.\d\.\S+ would be lost")):
        backward(unsaid, "dflash", row)
