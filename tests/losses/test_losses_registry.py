"""Names, mixes, reductions and position weights of the contract (section 11), by hand."""

import math
from functools import partial

import pytest
import torch

from speculators import losses
from speculators.losses.metrics import as_pairs, normalize_counted_metrics, ratio
from speculators.losses.registry import choose_loss_config


def test_names_resolve_to_the_exported_functions():
    assert losses.resolve_loss_config("kl_div") == {"kl_div": (losses.kl_div_loss, 1.0)}
    assert losses.resolve_loss_config("kl_div")["kl_div"][0] is losses.kl_div_loss
    assert losses.resolve_loss_config("kl_div", "eager")["kl_div"][0] is losses.eager.kl_div_loss
    assert losses.resolve_loss_fn("nla") is losses.neg_log_acceptance_loss
    mixed = {"ce": (losses.ce_loss, 0.1), "tv": (losses.tv_loss, 0.9)}
    assert losses.resolve_loss_config('{"ce": 0.1, "tv": 0.9}') == mixed
    assert losses.resolve_loss_config({"ce": 0.1, "tv": 0.9}) == mixed
    assert losses.resolve_loss_config(mixed) == mixed
    assert losses.resolve_loss_config(losses.tv_loss) == {"tv": (losses.tv_loss, 1.0)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kl", "'kl' is unknown.*kl_div"),
        ("{}", "non-empty object"),
        ('["ce"]', "non-empty object"),
        ('{"ce": ', "neither a loss name nor JSON"),
        ('{"ce": 1.0, "huber": 1.0}', "'huber' is unknown"),
        ('{"ce": "much"}', "'much'; it must be a number"),
        ('{"ce": true}', "must be a number"),
    ],
)
def test_bad_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        losses.resolve_loss_config(spec)


def test_unknown_names_elsewhere_are_named():
    with pytest.raises(ValueError, match="loss_implementation='triton'"):
        losses.resolve_loss_config("ce", "triton")
    with pytest.raises(ValueError, match="'mse' is unknown"):
        losses.resolve_loss_fn("mse")


def test_loss_config_wins_over_loss_fn():
    config = losses.resolve_loss_config("tv")
    assert choose_loss_config(config, losses.ce_loss, "kl_div") == config
    assert choose_loss_config(None, losses.ce_loss, "kl_div") == {"ce": (losses.ce_loss, 1.0)}
    assert choose_loss_config(None, None, "kl_div") == {"kl_div": (losses.kl_div_loss, 1.0)}


def test_the_denominator_counts_supervised_positions_without_their_decay():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    targets = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 5.0]]])
    mask, slots = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 2]])
    ce = [-math.log(math.exp(2) / (math.exp(2) + 1)), -math.log(1 / (1 + math.e))]
    plain = losses.loss_function(logits, targets, mask, slots, losses.ce_loss)
    assert plain.item() == pytest.approx((ce[0] + ce[1]) / 2.00001)
    decayed = losses.loss_function(
        logits, targets, mask, slots, losses.ce_loss, partial(losses.exp_loss_decay, gamma=0.5)
    )
    assert decayed.item() == pytest.approx((ce[0] + 0.5 * ce[1]) / 2.00001)


def test_nothing_supervised_is_zero_not_nan():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = losses.loss_function(logits, torch.randn(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3))
    loss.backward()
    assert loss == 0.0 and (logits.grad == 0).all()


def test_mixes_add_weighted_terms_and_name_them():
    logits, targets = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    mask, slots = torch.ones(1, 5), torch.arange(5)[None]
    config = losses.resolve_loss_config({"ce": 0.5, "tv": 2.0})
    total, terms = losses.compound_loss(logits, targets, mask, slots, config)
    assert terms.keys() == {"ce_loss", "tv_loss"}
    torch.testing.assert_close(total, 0.5 * terms["ce_loss"] + 2.0 * terms["tv_loss"])
    assert losses.compound_loss(logits, targets, mask, slots, losses.resolve_loss_config("ce"))[1] == {}


def test_fixed_decays_by_hand():
    slots = torch.tensor([0, 1, 2])
    expected = torch.tensor([0.0, 1.0, math.exp(-1 / 4)])
    torch.testing.assert_close(losses.dflash_loss_decay(slots, 4.0), expected)
    expected = torch.tensor([1.0, math.exp(-1 / 4), math.exp(-2 / 4)])
    torch.testing.assert_close(losses.dflash_loss_decay(slots, 4.0, sample_from_anchor=True), expected)
    torch.testing.assert_close(losses.exp_loss_decay(slots, 0.8), torch.tensor([1.0, 0.8, 0.64]))


def test_dpace_weighs_a_slot_by_the_chain_it_carries():
    """Loops over the formula: block of 3, the middle slot masked in the second block."""
    ce, mask, alpha = [0.1, 0.7, 2.0, 0.3, 9.9, 0.5], [1, 1, 1, 1, 0, 1], 0.5
    expected = []
    for start in (0, 3):
        reach, product = [], 1.0
        for k in range(start, start + 3):
            product *= (1 - alpha) * math.exp(-ce[k]) + alpha if mask[k] else 1.0
            reach.append(product * mask[k])
        expected += [mask[start + k] * sum(reach[k:]) for k in range(3)]
    elementwise = torch.tensor([ce], requires_grad=True)
    weights = losses.dpace_loss_decay(torch.arange(6)[None], torch.tensor([mask]), 3, alpha, elementwise)
    torch.testing.assert_close(weights, torch.tensor([expected]))
    assert not weights.requires_grad
    with pytest.raises(ValueError, match="block_size=4"):
        losses.dpace_loss_decay(torch.arange(6), torch.ones(6), 4, alpha, torch.ones(6))


def test_loss_function_hands_dpace_the_losses_it_needs():
    logits, targets, mask = torch.randn(1, 4, 5), torch.randn(1, 4, 5), torch.tensor([[1, 1, 0, 1]])
    decay = partial(losses.dpace_loss_decay, loss_mask=mask, block_size=2, dpace_alpha=0.3)
    loss = losses.loss_function(logits, targets, mask, torch.arange(4)[None], losses.ce_loss, decay)
    ce = losses.ce_loss(logits, targets) * mask
    expected = (ce * losses.dpace_loss_decay(None, mask, 2, 0.3, ce)).sum() / 3.00001
    torch.testing.assert_close(loss, expected)


def test_metrics_are_divided_last():
    pairs = as_pairs({"acc": ratio(torch.tensor(3), torch.tensor(4)), "none": ratio(0, 0)})
    metrics = pairs | {"lr": 0.5, "lonely_total": 9}
    assert metrics["acc_sum"] == 3.0 and metrics["acc_total"].dtype == torch.float32
    assert normalize_counted_metrics(metrics, world_size=2) == {"acc": 0.75, "none": 0.0, "lr": 0.25}
