"""The training forward against loops over the formulas; the sampled slots; what happens at document ends."""

import pytest
import torch
from naive_layers import kl, mixed
from naive_peagle import NaivePEagle
from peagle_toys import packed_batch

from speculators.losses.metrics import as_pairs, expected_acceptance_length, normalize_counted_metrics
from speculators.model_training import LossArgs
from speculators.models.peagle.config import PEagleTrainingArgs
from speculators.models.peagle.training import accuracy, sample_chains
from speculators.nn.packed_row import pack_row

CASES = {
    "qwen3, reduced vocabulary": {},
    "llama, all tokens": {"arch": "llama", "draft_vocab_size": 40},
    "norm_before_residual and norm_before_fc": {"norm_before_residual": True, "norm_before_fc": True},
    "fc_norm, ignored norm_output": {"fc_norm": True, "norm_output": True},
    "two layers": {"num_layers": 2},
    "sliding window": {"nested": {"layer_types": ["sliding_attention"], "sliding_window": 4}},
    "narrow window, two layers": {
        "num_layers": 2,
        "nested": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2},
    },
}
ROUTES = ["eager", "simple_flex_attention"]
EVERY_SLOT = {"down_sample_ratio": 1.0, "down_sample_ratio_min": 1.0}


def slots_of(batch, num_depths=4, ratio=0.7, ratio_min=0.2, max_anchors=None, seed=0):
    own = PEagleTrainingArgs(num_depths=num_depths, down_sample_ratio=ratio, down_sample_ratio_min=ratio_min)
    args = LossArgs(own, {}, None, max_anchors, torch.Generator().manual_seed(seed))
    columns = {key: batch[key] for key in ("document_ids", "loss_mask", "position_ids")}
    row = pack_row(batch["input_ids"], aux=None, last_hidden=None, first_position=1, **columns)
    chains = sample_chains(row, args)
    return list(zip(*(part.tolist() for part in chains), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_accuracy_equal_loops_over_the_formulas(make_drafter, case):
    model = make_drafter(**CASES[case])
    batch = packed_batch([6, 5, 4], seed=1, padding=3)
    slots = slots_of(batch)
    assert {depth for _, depth in slots} == {1, 2, 3}
    row_loss, loss_fn = (mixed, {"ce": 0.3, "tv": 0.7}) if "fc_norm," in case else (kl, "kl_div")
    naive = NaivePEagle(model.state_dict(), model.config)
    expected, correct = naive.loss(batch, slots, row_loss)
    expected.backward()
    for route in ROUTES:
        model.config.transformer_layer_config._attn_implementation = route
        model.zero_grad()
        generator = torch.Generator().manual_seed(0)
        _, loss, metrics = model(**batch, num_depths=4, loss_fn=loss_fn, generator=generator)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert {"mask_hidden", "embed_tokens.weight", "fc.weight"} <= trained.keys()
        for name, grad in trained.items():
            torch.testing.assert_close(grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=f"{route} {name}")
        for depth in range(4):
            judged = [right for (_, d), right in correct.items() if d == depth]
            assert metrics[f"position_{depth}_acc_sum"] == sum(judged)
            assert metrics[f"position_{depth}_acc_total"] == len(judged)
            whole = [a for a, d in correct if d == depth and (a, 0) in correct]
            right = [all(correct[a, d] for d in range(depth + 1)) for a in whole]
            assert metrics[f"full_acc_{depth}_total"] == len(whole)
            assert metrics[f"full_acc_{depth}_sum"] == sum(right)
        assert metrics["full_acc_total"] == len(correct) and metrics["full_acc_sum"] == sum(correct.values())


def test_chains_count_as_far_as_all_of_them_is_right():
    """Four anchors. The third's column is not supervised: its slot says nothing of a round's accepted drafts."""
    judged_DT = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    correct_DT = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    metrics = as_pairs(accuracy(correct_DT.float(), judged_DT.float()))
    pairs = [(metrics[f"full_acc_{d}_sum"].item(), metrics[f"full_acc_{d}_total"].item()) for d in range(3)]
    assert pairs == [(2, 3), (1, 2), (1, 1)]
    assert (metrics["position_1_acc_sum"], metrics["position_1_acc_total"]) == (3, 3)
    assert expected_acceptance_length(normalize_counted_metrics(metrics)) == pytest.approx(1 + 2 / 3 + 1 / 2 + 1)


def test_slots_follow_the_counts_the_chains_and_the_documents():
    """Every rule of the sampling, on many rows: sizes by the formula, no gaps, supervised, within one document."""
    for seed in range(30):
        batch = packed_batch([9, 1, 14, 2, 11], seed=seed, padding=4, supervised=0.85)
        mask, documents = batch["loss_mask"][0].tolist(), batch["document_ids"][0].tolist()
        slots = slots_of(batch, num_depths=6, ratio=0.8, ratio_min=0.3, seed=seed)
        assert slots == sorted(set(slots))
        for a, d in slots:
            assert a >= 0 and d >= 1
            assert d == 1 or (a, d - 1) in slots
            assert all(mask[a + j] and documents[a + j] == documents[a] != -1 for j in range(1, d + 1))
        for depth in range(1, 6):
            before = [a + d for a, d in slots if d == depth - 1] if depth > 1 else [o for o, m in enumerate(mask) if m]
            step = 1 if depth > 1 else 0
            reachable = [o + step for o in before if o + step < len(mask) and mask[o + step] and o + step > 0]
            reachable = [o for o in reachable if documents[o] == documents[o - 1]]
            most = int(max(0, sum(mask) - depth) * max(0.8**depth, 0.3))
            assert len([1 for _, d in slots if d == depth]) == min(most, len(reachable))


def test_every_slot_of_a_small_row_by_hand():
    """Documents [0 0 0 0] and [1 1]; columns 1, 2, 3 and 4, 5 supervised, column 0 not. A chain may begin on an
    unsupervised column; column 4 begins a document, so no chain reaches it."""
    batch = packed_batch([4, 2], supervised=2.0)
    batch["loss_mask"][0, 0] = 0
    assert slots_of(batch, num_depths=4, ratio=1.0) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1), (4, 1)]


def test_max_anchors_bounds_the_slots_but_not_the_columns(make_drafter):
    batch = packed_batch([20], supervised=2.0)
    model = make_drafter()
    _, _, metrics = model(**batch, max_anchors=5, **EVERY_SLOT)
    assert metrics["position_0_acc_total"] == 20
    assert [metrics[f"position_{d}_acc_total"].item() <= 5 - d for d in (1, 2, 3)] == [True] * 3
    assert metrics["position_1_acc_total"] >= 3


def test_a_slot_is_taught_the_target_of_its_own_column(make_drafter):
    """Two columns of one document, the second supervised: elements (1, 0) and (0, 1) share target row 1."""
    model = make_drafter(num_depths=2)
    batch = packed_batch([2])
    batch["loss_mask"] = torch.tensor([[0, 1]])
    loss = model(**batch, loss_fn="ce")[1]
    batch["verifier_last_hidden_states"][0, 0] *= -3.0
    assert torch.equal(model(**batch, loss_fn="ce")[1], loss)
    with torch.no_grad():
        wanted = torch.full_like(batch["verifier_last_hidden_states"][0, 1], 1.0)
        wanted[0] = -9.0
        batch["verifier_last_hidden_states"][0, 1] = wanted
    assert abs(model(**batch, loss_fn="kl_div")[1] - loss) > 1e-3


@pytest.mark.parametrize("route", ROUTES)
def test_packed_documents_equal_separate_documents(make_drafter, route):
    """With every slot trained nothing is random: sums over the documents are those of the packed row."""
    model = make_drafter(num_layers=2)
    model.config.transformer_layer_config._attn_implementation = route
    batch = packed_batch([6, 5, 7], seed=2, padding=4, supervised=2.0)
    packed = model(**batch, **EVERY_SLOT)
    loss_sum = num_elements = right = 0.0
    for start, length in ((0, 6), (6, 5), (11, 7)):
        alone = {key: value[:, start : start + length] for key, value in batch.items()}
        _, loss, metrics = model(**{**alone, "document_ids": torch.zeros(1, length, dtype=torch.int64)}, **EVERY_SLOT)
        loss_sum += loss * (metrics["full_acc_total"] + 1e-5)
        num_elements += metrics["full_acc_total"]
        right += metrics["full_acc_sum"]
    assert packed[2]["full_acc_total"] == num_elements and packed[2]["full_acc_sum"] == right
    torch.testing.assert_close(packed[1], loss_sum / (num_elements + 1e-5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_supervised_gives_loss_zero(make_drafter, route):
    model = make_drafter()
    model.config.transformer_layer_config._attn_implementation = route
    for batch in (packed_batch([5, 4], padding=2), packed_batch([], padding=8)):
        batch["loss_mask"].zero_()
        model.zero_grad()
        _, loss, metrics = model(**batch, loss_fn='{"ce": 1.0, "tv": 1.0}')
        loss.backward()
        assert loss == 0.0
        assert all(torch.isfinite(value).all() for value in metrics.values())
        assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_padding_changes_nothing(make_drafter):
    model = make_drafter()
    batch = packed_batch([6, 5], seed=4)
    padded = {key: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, 5)) for key, value in batch.items()}
    padded["document_ids"][0, 11:] = -1
    padded["loss_mask"][0, 11:] = 1  # even if someone supervises padding
    torch.testing.assert_close(model(**padded, **EVERY_SLOT)[1], model(**batch, **EVERY_SLOT)[1])


def test_training_draws_anew_and_validation_does_not(make_drafter):
    model, batch = make_drafter(), packed_batch([20, 15])
    model.train()
    assert len({model(**batch, down_sample_ratio=0.4)[1].item() for _ in range(4)}) > 1
    model.eval()
    assert len({model(**batch, down_sample_ratio=0.4)[1].item() for _ in range(4)}) == 1


def test_targets_are_required(make_drafter):
    batch = packed_batch([5])
    batch.pop("verifier_last_hidden_states")
    with pytest.raises(ValueError, match="verifier_last_hidden_states"):
        make_drafter()(**batch)


def test_long_rows_are_cut_into_groups_and_stay_the_same(make_drafter):
    """More slots than a group holds, chains of several lengths, both kinds of layer."""
    model = make_drafter(
        num_layers=2, nested={"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
    )
    batch = packed_batch([150, 90], seed=3, padding=5)
    results = []
    for route in ROUTES:
        model.config.transformer_layer_config._attn_implementation = route
        model.zero_grad()
        loss = model(**batch, num_depths=6, generator=torch.Generator().manual_seed(1))[1]
        loss.backward()
        results.append((loss, model.fc.weight.grad.clone(), model.mask_hidden.grad.clone()))
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(slow, fast, atol=1e-5, rtol=1e-4)


def test_bf16_autocast_stays_close_to_fp32(make_drafter):
    """bf16 has 8 bits: 2 % of a loss near 1 is a few roundings."""
    model = make_drafter(num_layers=2)
    batch = packed_batch([9, 8], seed=5)
    exact = model(**batch, **EVERY_SLOT)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch, **EVERY_SLOT)[1]
    rounded.backward()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
