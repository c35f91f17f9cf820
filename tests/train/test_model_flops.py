"""Model FLOPs of a row, as each drafter counts them, against what torch's counter sees of the products that ran; and
their share of a card's peak, as a run reports it."""

from types import SimpleNamespace

import pytest
import torch
from device_toys import DRAFTERS, make_drafter, row_of
from drafter_toys import HIDDEN, VOCAB, randomise, save_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig

from speculators.losses import chunks
from speculators.model import SpeculatorModel
from speculators.models import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.models.dflash.block_attention import DenseBlockAttention
from speculators.models.eagle3.training import model_flop
from speculators.models.mtp.decoder_modules import Experts
from speculators.models.peagle.network import DenseChainAttention
from speculators.models.supervision import StepPairs
from speculators.nn.attention import dense_attention
from speculators.nn.flops import modules_flop
from speculators.nn.packed_row import pack_row
from speculators.nn.routes import DENSE, FLASH
from speculators.nn.unrolled import DenseUnrolledAttention
from speculators.train.distributed import Ranks
from speculators.train.flops import peak_flop_per_s
from speculators.train.records import StepReports, TrainerConfig

HEADS = {"medusa": {"num_heads": 3, "num_layers": 2}, "mlp": {"n_predict": 3}}
"""Drafters that do not attend, and their own keys."""


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("verifier"), num_layers=6, head_dim=16)


def drafter(algorithm, verifier):
    if algorithm in DRAFTERS:
        return make_drafter(algorithm, verifier)
    keys = {"verifier_name_or_path": str(verifier), **HEADS[algorithm]}
    model = SpeculatorModel.get_class(algorithm).from_training_args(AutoConfig.from_pretrained(verifier), **keys)
    randomise(model)
    return model


def row(algorithm, lengths, supervised):
    batch = row_of(algorithm if algorithm in DRAFTERS else "mtp", lengths, seed=1, supervised=supervised)
    return {key: value for key, value in batch.items() if algorithm in DRAFTERS or key != "position_ids"}


def run(model, batch, route):
    """(products with weights, products of attention) in FLOPs, by torch's counter; forward and backward."""
    keywords, _ = model.get_trainer_kwargs(**DRAFTERS.get(model.config.speculators_model_type, {}))
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch, **keywords, attention_route=route, generator=torch.Generator().manual_seed(0))[1]
        loss.backward()
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    assert counts.keys() <= {"aten.mm", "aten.addmm", "aten.bmm"}, "another operation has FLOPs: say where it belongs"
    return counts["aten.mm"] + counts.get("aten.addmm", 0), counts.get("aten.bmm", 0)


def repeated_targets_flop(algorithm, batch):
    """Each head computes the verifier's distribution of its columns: what is counted once runs up to three times. Head
    k is taught at column t by the state of t + 1 + k, so the first head's columns are all there are."""
    num_columns = batch["input_ids"].shape[1]
    later_heads = sum(num_columns - 2 - k for k in (1, 2)) if algorithm in HEADS else 0
    return later_heads * 2 * VOCAB * HIDDEN


@pytest.mark.parametrize("algorithm", [*DRAFTERS, *HEADS])
def test_model_flops_are_those_of_the_products_that_run(algorithm, verifier, monkeypatch):
    """All of a document supervised, so that every column asks: exactly, attention by the pairs of the dense mask."""
    monkeypatch.setattr(chunks, "MIN_FILL", 2.0)  # no row of a chunk is repeated
    pairs = []

    def counting(query_BTNd, key, value, visible):
        assert visible.shape == (query_BTNd.shape[1], key.shape[1])
        pairs.append(int(visible.sum()) * query_BTNd.shape[2] * query_BTNd.shape[3])
        return dense_attention(query_BTNd, key, value, visible)

    for dense in (DenseUnrolledAttention, DenseChainAttention, DenseBlockAttention):
        monkeypatch.setattr(dense, "attention", staticmethod(counting))
    model, batch = drafter(algorithm, verifier), row(algorithm, [24], supervised=1.0)
    monkeypatch.setattr(type(model), "outside_head", lambda self: None, raising=False)  # it teaches nothing
    products, all_pairs = run(model, batch, DENSE)
    attention = 3 * 2 * 2 * sum(pairs)
    assert model.row_flop == products - repeated_targets_flop(algorithm, batch) + attention
    assert attention <= all_pairs and (attention > 0) == (algorithm in DRAFTERS)


@pytest.mark.parametrize("algorithm", [*DRAFTERS, *HEADS])
def test_the_route_does_not_change_the_count(algorithm, verifier):
    """Documents of which a part is supervised. Torch's counter knows no flash kernels: it sees the products alone, with
    repeated rows of chunks and what is measured outside the draft vocabulary."""
    model, batch = drafter(algorithm, verifier), row(algorithm, [9, 14, 1, 12], supervised=0.6)
    products, _ = run(model, batch, FLASH)
    counted = model.row_flop
    assert 0.8 * counted < products < 1.2 * counted
    keywords, _ = model.get_trainer_kwargs(**DRAFTERS.get(algorithm, {}))
    with torch.no_grad():
        model(**batch, **keywords, attention_route=DENSE, generator=torch.Generator().manual_seed(0))
    assert model.row_flop == counted


def test_those_of_an_8b_verifier_are_the_sum_worked_out_by_hand():
    """EAGLE-3, 8,192 columns of which the first 4,549 ask, 3 steps: 32.6 TFLOP with the backward pass."""
    layers = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layers,
        draft_vocab_size=32000,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        norm_before_fc=True,
    )
    with torch.device("meta"):
        model = Eagle3DraftModel(config)
    H, T, R, S = 4096, 8192, 4549, 3
    row = {"aux": None, "last_hidden": None, "position_ids": None, "first_position": 1}
    supervised = (torch.arange(T) < R).long()[None]
    batch = pack_row(torch.zeros(1, T), document_ids=None, loss_mask=supervised, **row)
    pairs = StepPairs.of(batch, S, FLASH)
    fc = 3 * 2 * 3 * H * H * T
    queries = 3 * 2 * (2 * H * H + H * H + 3 * H * 14336) * R * S
    keys = 3 * 2 * (2 * H * 2 * 1024) * (T + 2 * R)
    attention = 3 * 2 * 2 * H * (S * R * (R + 1) // 2 + R * (0 + 1 + 2))
    head = 2 * 2 * 32000 * H * (R + (R - 1) + (R - 2))
    targets = 2 * 32000 * H * R
    found = model_flop(model.network, batch, model.verifier_head, pairs, S)
    assert found == fc + queries + keys + attention + head + targets
    assert round(found / 1e12, 1) == 32.6


def test_experts_count_for_the_tokens_that_visit_them():
    """Two of eight; 3 rows, each product forward and twice backward."""
    sizes = {"hidden_size": 4, "moe_intermediate_size": 5, "num_experts_per_tok": 2, "hidden_act": "silu"}
    experts = Experts(SimpleNamespace(**sizes), 8)
    assert modules_flop(experts, 3) == 3 * 2 * 3 * 2 * (4 * 10 + 5 * 4)


def test_the_peak_is_that_of_a_known_card_or_what_was_said(monkeypatch):
    card, bf16 = torch.device("cuda"), torch.bfloat16
    names = iter(["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert peak_flop_per_s(card, bf16) == 989.4e12
    assert peak_flop_per_s(card, bf16) is None  # a part of a card
    assert peak_flop_per_s(card, torch.float32) is None and peak_flop_per_s(torch.device("cpu"), bf16) is None
    assert peak_flop_per_s(card, torch.float32, 67.0) == 67e12


@pytest.mark.parametrize(("peak_tflops", "shares"), [(4.0, [0.5, 0.25, 0.5]), (None, [None, None, None])])
def test_a_run_reports_the_share_of_the_peak(peak_tflops, shares, monkeypatch):
    """Of this rank alone; the first report, in which kernels are compiled, is not in the run's."""
    events, times = [], iter([1.0, 2.0, 1.0])
    config = TrainerConfig(lr=1.0, num_epochs=1, save_path="unused", peak_tflops=peak_tflops)
    reports = StepReports(config, 3, Ranks(), events.append)
    for step in (1, 2, 3):
        reports.add({"loss": torch.tensor(1.0)}, num_tokens=1, model_flop=2 * 10**12)
        took_s = next(times)
        monkeypatch.setattr(StepReports, "time_s", took_s)
        reports.step_done(step, 0, 1.0)
    assert [event.model_tflop_per_s for event in events] == [2.0, 1.0, 2.0]
    assert [event.mfu for event in events] == shares
    of_run = reports.of_run()
    assert of_run["model_tflop_per_s"] == pytest.approx(4 / 3)
    assert of_run["mfu"] == (None if peak_tflops is None else pytest.approx(1 / 3))
    assert StepReports(config, 3, Ranks(), events.append).of_run()["model_tflop_per_s"] is None


def test_an_algorithm_that_counts_none_reports_none():
    events = []
    reports = StepReports(TrainerConfig(1.0, 1, "unused", peak_tflops=4.0), 1, Ranks(), events.append)
    reports.add({"loss": torch.tensor(1.0)}, num_tokens=1)
    reports.step_done(1, 0, 1.0)
    assert (events[0].model_tflop_per_s, events[0].mfu, reports.of_run()["mfu"]) == (None, None, None)
