"""The training forward against loops written from the formulas, and against what it must do at document ends."""

import pytest
import torch
from dflash_naive import NaiveDFlash, ce
from dflash_toys import MASK_TOKEN, MIXED, SLIDING, one_document, packed_batch
from naive_layers import kl, mixed

from speculators.models.dflash.training import choose_blocks
from speculators.nn.packed_row import pack_row


def packed(batch):
    columns = {key: batch[key] for key in ("document_ids", "loss_mask", "position_ids")}
    states = {"aux": batch["hidden_states"], "last_hidden": batch["verifier_last_hidden_states"]}
    return pack_row(batch["input_ids"], **states, **columns, first_position=0)


FULL = {"layer_types": ["full_attention"]}
CASES = {
    "reduced vocabulary, dpace": ({}, "dpace", [False]),
    "all tokens, fixed decay": ({"draft_vocab_size": 40, "loss": kl}, "fixed", [False]),
    "sampled from the anchor": ({"sample_from_anchor": True}, "dpace", [False]),
    "sampled from the anchor, fixed decay": ({"sample_from_anchor": True, "loss": mixed}, "fixed", [False]),
    "biases": ({"nested": {"attention_bias": True}}, "fixed", [False]),
    "sliding, hence causal": (SLIDING, "dpace", [True, True]),
    "sliding, not causal": ({**SLIDING, "sliding_window_non_causal": True}, "fixed", [False, False]),
    "sliding and full, all causal": (MIXED, "dpace", [True, True]),
    "sliding and full, none causal": ({**MIXED, "sliding_window_non_causal": True}, "fixed", [False, False]),
}
LOSS_FN = {ce: "ce", kl: "kl_div", mixed: {"ce": 0.3, "tv": 0.7}}
ROUTES = ["eager", "sdpa"]
"""The dense reference and, on a CPU, the grouped flash route."""


def naive_of(model, causal):
    config = model.config
    return NaiveDFlash(
        model.state_dict(),
        config.transformer_layer_config,
        block_size=config.block_size,
        mask_token=MASK_TOKEN,
        from_anchor=config.sample_from_anchor,
        causal=causal,
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_equal_loops_over_the_formulas(drafter, case):
    arguments, weighting, causal = CASES[case]
    row_loss = arguments.get("loss", ce)
    model = drafter(**{key: value for key, value in arguments.items() if key != "loss"})
    batch = packed_batch([6, 9, 3, 5], seed=1, padding=3)
    naive = naive_of(model, causal)
    outside = model.outside_head()
    naive.outside_head = None if outside is None else outside.weight_OH
    weights_of = naive.dpace(0.4) if weighting == "dpace" else naive.fixed_decay(3.0)
    expected, found = naive.loss(batch, row_loss, weights_of)
    expected.backward()

    for route in ROUTES:
        model.config.transformer_layer_config._attn_implementation = route
        model.zero_grad()
        _, loss, metrics = model(
            **batch,
            loss_fn=LOSS_FN[row_loss],
            gamma=3.0,
            dpace_alpha=0.4,
            max_anchors=100,
            per_position_loss_weight="dpace" if weighting == "dpace" else "fixed-exp-decay",
        )
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) >= 14
        for name, grad in trained.items():
            torch.testing.assert_close(grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=f"{route} {name}")
        check_metrics(metrics, found, naive, batch)


def check_metrics(metrics, found, naive, batch):
    columns = {p: dict(naive.drafting_slots(batch, p)) for p in found}
    correct = {
        p: {k: d.argmax() == t.argmax() and naive.can_be_drafted(batch, columns[p][k]) for k, (d, t) in slots.items()}
        for p, slots in found.items()
        if slots
    }
    first = 0 if naive.from_anchor else 1
    lengths = []
    for slots in correct.values():
        run = 0
        while slots.get(first + run, False):
            run += 1
        lengths.append(1 + run)
    assert metrics["eal_sum"] == sum(lengths) and metrics["eal_total"] == len(lengths)
    for k in range(first, naive.size):
        judged = [slots[k] for slots in correct.values() if k in slots]
        assert metrics[f"position_{k}_acc_sum"] == sum(judged) and metrics[f"position_{k}_acc_total"] == len(judged)
    assert "position_0_acc_sum" in metrics or first == 1
    assert metrics["full_acc_total"] == sum(len(slots) for slots in correct.values())
    assert metrics["loss"] == metrics["loss_sum"] and metrics["loss_total"] == 1


@pytest.mark.parametrize("layers", [{}, SLIDING, MIXED], ids=["full", "sliding", "mixed"])
@pytest.mark.parametrize("from_anchor", [False, True])
def test_the_fast_route_equals_the_dense_one(drafter, layers, from_anchor):
    """Enough blocks for several groups, forward and backward; fp32 flash against fp32 dense."""
    model = drafter(**layers, sample_from_anchor=from_anchor, block_size=5)
    batch = packed_batch([70, 45, 90, 3], seed=2, padding=9)
    results = []
    for route in ROUTES:
        model.config.transformer_layer_config._attn_implementation = route
        model.zero_grad()
        _, loss, _ = model(**batch, loss_fn="kl_div", max_anchors=200)
        loss.backward()
        results.append((loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)))
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("from_anchor", [False, True])
def test_packed_documents_equal_separate_documents(drafter, from_anchor):
    """The same slots count, with the same losses and right answers: nothing leaks over a document's end."""
    model = drafter(**MIXED, sample_from_anchor=from_anchor)
    lengths = [9, 6, 8]
    batch = packed_batch(lengths, seed=2, padding=4, supervised=0.9)
    _, loss, packed = model(**batch, max_anchors=100)
    sums = dict.fromkeys(packed, 0.0)
    total_loss, start = 0.0, 0
    for length in lengths:
        _, alone_loss, alone = model(**one_document(batch, start, length, padding=4), max_anchors=100)
        total_loss += alone_loss * (alone["full_acc_total"] + 1e-5)
        for key in sums:
            sums[key] += alone[key]
        start += length
    for key in packed:
        if key.removesuffix("_sum").removesuffix("_total") not in ("loss",):
            assert packed[key] == sums[key], key
    torch.testing.assert_close(loss * (packed["full_acc_total"] + 1e-5), total_loss, atol=1e-4, rtol=1e-5)


def test_slots_past_a_document_do_not_count():
    """Hand-worked: documents a a a a | b b b b b b, all supervised, blocks of 3."""
    batch = packed_batch([4, 6], padding=3, supervised=2.0)
    row = packed(batch)
    blocks = choose_blocks(row, 3, first_slot=1, max_anchors=99, generator=None)
    counts = dict(zip(blocks.anchors_P.tolist(), blocks.supervised_PS.int().tolist(), strict=True))
    # column 3 (the last of a) and 9 (the last of b) have no slot inside their document, so they are no anchors
    assert counts == {
        0: [0, 1, 1],
        1: [0, 1, 1],
        2: [0, 1, 0],
        4: [0, 1, 1],
        5: [0, 1, 1],
        6: [0, 1, 1],
        7: [0, 1, 1],
        8: [0, 1, 0],
    }
    assert blocks.target_index_PS[0].tolist()[1:] == [0, 1]  # x[1] is predicted by state 0

    blocks = choose_blocks(row, 3, first_slot=0, max_anchors=99, generator=None)
    counts = dict(zip(blocks.anchors_P.tolist(), blocks.supervised_PS.int().tolist(), strict=True))
    assert counts[0] == [1, 1, 1] and counts[1] == [1, 1, 0] and counts[2] == [1, 0, 0] and 3 not in counts
    assert blocks.target_index_PS[0].tolist() == [0, 1, 2]


def test_anchors_are_drawn_reproducibly_from_the_supervised_columns():
    batch = packed_batch([60, 60], seed=4, padding=5, supervised=0.5)
    row = packed(batch)

    def drawn(seed):
        return choose_blocks(row, 4, 1, 10, torch.Generator().manual_seed(seed)).anchors_P

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(0), drawn(0).unique())
    assert bool(row.supervised_T[drawn(0)].all())
    everywhere = torch.cat([drawn(seed) for seed in range(200)]).bincount(minlength=125)
    eligible = choose_blocks(row, 4, 1, 999, None).anchors_P
    assert set(everywhere.nonzero().flatten().tolist()) == set(eligible.tolist())
    assert everywhere.max() < 4 * everywhere[eligible].float().mean()  # no column is favoured


def test_validation_sees_the_same_anchors_every_time_and_training_follows_the_global_seed(drafter):
    model, batch = drafter(), packed_batch([60], seed=4)

    def loss(seed):
        torch.manual_seed(seed)
        return model(**batch, max_anchors=6)[1].item()

    model.train()
    assert loss(0) == loss(0) != loss(1)
    model.eval()
    assert loss(0) == loss(1)


def test_a_row_without_supervision_has_loss_zero_and_gradients(drafter):
    model, batch = drafter(), packed_batch([9], padding=2)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    for weighting in ("dpace", "fixed-exp-decay"):
        model.zero_grad()
        _, loss, metrics = model(**batch, per_position_loss_weight=weighting)
        loss.backward()
        assert loss == 0 and metrics["full_acc_total"] == 0
        assert all(bool(p.grad.eq(0).all()) for p in model.parameters() if p.requires_grad)
    padding = {key: torch.full_like(value, -1 if key == "document_ids" else 0) for key, value in batch.items()}
    assert model(**padding)[1] == 0


def test_max_anchors_of_the_config_counts_when_the_call_says_nothing(drafter):
    model, batch = drafter(), packed_batch([60], seed=4, supervised=2.0)
    model.config.max_anchors = 5
    assert model(**batch)[2]["eal_total"] == 5
    assert model(**batch, max_anchors=7)[2]["eal_total"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_position_loss_weight": "dpace", "loss_fn": "kl_div"}, "only ce is"),
        ({"per_position_loss_weight": "no"}, "per_position_loss_weight='no'.*'dpace'"),
        ({"per_position_loss_weight": "dpace", "dpace_alpha": 0.0}, "dpace_alpha=0.0"),
        ({"verifier_last_hidden_states": None}, "verifier_last_hidden_states is None"),
    ],
)
def test_what_cannot_be_trained_is_refused(drafter, arguments, message):
    with pytest.raises(ValueError, match=message):
        drafter()(**{**packed_batch([9]), **arguments})


def test_exactly_one_anchor_is_trained_as_the_formulas_say(drafter):
    """Columns 5 and 6 are supervised: the block at 5 has one slot to teach, the one at 6 none."""
    model, batch = drafter(), packed_batch([12], seed=3)
    batch["loss_mask"].zero_()
    batch["loss_mask"][0, 5:7] = 1
    naive = naive_of(model, [False])
    expected, found = naive.loss(batch, kl, naive.fixed_decay(3.0))
    assert [p for p, slots in found.items() if slots] == [5] and expected > 0
    _, loss, metrics = model(**batch, loss_fn="kl_div", gamma=3.0, per_position_loss_weight="fixed-exp-decay")
    torch.testing.assert_close(loss.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    assert metrics["position_1_acc_total"] == 1 and metrics["position_2_acc_total"] == 0


def test_batches_of_several_rows_are_refused(drafter):
    batch = {key: value.expand(2, *value.shape[1:]) for key, value in packed_batch([5]).items()}
    with pytest.raises(ValueError, match="packed into one row"):
        drafter()(**batch)


def test_only_the_draft_layers_are_trained(drafter):
    model = drafter()
    model(**packed_batch([12]))[1].backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_bf16_autocast_stays_close_to_fp32(drafter):
    """bf16 has 8 bits: 2 % of a loss near 1 is a few roundings."""
    model, batch = drafter(num_layers=2), packed_batch([20, 30], seed=5)
    exact = model(**batch, max_anchors=99)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch, max_anchors=99)[1]
    rounded.backward()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
