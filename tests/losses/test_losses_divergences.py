"""Losses against sums written out, their closed-form gradients against autograd and finite differences (float64)."""

import inspect
import math
import pickle

import pytest
import torch

from speculators import losses
from speculators.losses import eager
from speculators.losses.closed_form import first_argmax
from speculators.losses.registry import EAGER, FUSED, KERNELS

NAMES = list(FUSED)


def by_hand(name, p, q):
    """One position; p and q are lists of probabilities."""
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    accepted = sum(min(a, b) for a, b in zip(p, q, strict=True))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    share = math.exp(-3.0 * accepted)
    return {
        "kl_div": kl,
        "rkl": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
        "jsd": sum(0.5 * a * math.log(a / m) + 0.5 * b * math.log(b / m) for a, b, m in zip(p, q, middle, strict=True)),
        "ce": -math.log(q[max(range(len(p)), key=p.__getitem__)]),
        "tv": 1 - accepted,
        "nla": -math.log(max(accepted, 1e-5)),
        "lk_hybrid": share * kl + (1 - share) * (1 - accepted),
    }[name]


def logits(seed=0, rows=6, vocab=9, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(1, rows, vocab, generator=generator, dtype=torch.float64) * scale for _ in range(2)]
    return draw[0].requires_grad_(), draw[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("functions", [FUSED, EAGER], ids=["closed form", "eager"])
def test_values_equal_sums_written_out(name, functions):
    draft, target = logits()
    values = functions[name](draft, target)
    assert values.shape == (1, 6)
    for i in range(6):
        expected = by_hand(name, target[0, i].softmax(-1).tolist(), draft[0, i].softmax(-1).tolist())
        assert values[0, i].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_closed_form_gradients_equal_autograd(name):
    draft, target = logits(1)
    mix = torch.rand(1, 6, dtype=torch.float64)
    grads = [
        torch.autograd.grad((function(draft, target) * mix).sum(), draft)[0] for function in (FUSED[name], EAGER[name])
    ]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lk_hybrid"])
def test_closed_form_gradients_equal_finite_differences(name):
    draft, target = logits(2, rows=2, vocab=5)
    torch.autograd.gradcheck(lambda x: FUSED[name](x, target), (draft,))


def test_lk_hybrid_does_not_differentiate_its_share():
    """share is a stopped gradient: with it frozen at its value, finite differences agree."""
    draft, target = logits(3, rows=1, vocab=4)
    share = torch.exp(-3.0 * torch.minimum(draft.softmax(-1), target.softmax(-1)).sum(-1)).detach()

    def frozen(x):
        return share * losses.kl_div_loss(x, target) + (1 - share) * losses.tv_loss(x, target)

    torch.autograd.gradcheck(frozen, (draft,))
    expected = torch.autograd.grad(frozen(draft).sum(), draft)[0]
    torch.testing.assert_close(torch.autograd.grad(losses.lk_hybrid_loss(draft, target).sum(), draft)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_draft_has_the_smallest_loss_and_no_gradient(name):
    draft, _ = logits(4)
    value = FUSED[name](draft, draft.detach())
    (grad,) = torch.autograd.grad(value.sum(), draft)
    if name == "ce":
        torch.testing.assert_close(value, -draft.detach().log_softmax(-1).amax(-1))
        return
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_and_fp32_logits_give_fp32_losses_and_gradients_in_kind(name):
    for dtype in (torch.bfloat16, torch.float32):
        draft, target = (x.detach().to(dtype) for x in logits(5))
        draft.requires_grad_()
        value = FUSED[name](draft, target)
        value.sum().backward()
        assert value.dtype == torch.float32 and draft.grad.dtype == dtype
        torch.testing.assert_close(value, EAGER[name](draft, target), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_far_apart_distributions_stay_finite(name):
    draft = torch.tensor([[[60.0, -60.0, 0.0]]], requires_grad=True)
    target = torch.tensor([[[-60.0, 60.0, 0.0]]])
    value = FUSED[name](draft, target)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(draft.grad).all()


def test_nla_is_floored_where_nothing_overlaps():
    value = losses.neg_log_acceptance_loss(torch.tensor([[40.0, -40.0]]), torch.tensor([[-40.0, 40.0]]))
    assert value.item() == pytest.approx(-math.log(1e-5))


def test_ce_takes_the_first_of_equal_maxima():
    value = losses.ce_loss(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[3.0, 3.0, 0.0]]))
    assert value.item() == pytest.approx(-torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)[0].item())


@pytest.mark.parametrize("vocab", [5, 512, 600, 1024])
def test_blockwise_argmax_is_argmax_with_ties_to_the_first(vocab):
    values = torch.randint(0, 9, (200, vocab), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(first_argmax(values), torch.tensor([row.tolist().index(row.max()) for row in values]))


def test_js_divergence_is_at_most_ln_2():
    value = losses.js_div_loss(torch.tensor([[80.0, 0.0]]), torch.tensor([[0.0, 80.0]]))
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)


def test_every_exported_loss_has_its_slow_twin():
    assert set(KERNELS) == set(FUSED.values())
    for function in FUSED.values():
        assert getattr(eager, function.__name__) is not function
        assert getattr(losses, function.__name__) is function


@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_lk_hybrid_takes_eta_by_position_and_by_name(eta):
    draft, target = logits(6)
    expected = eager.lk_hybrid_loss(draft, target, eta=eta)
    torch.testing.assert_close(losses.lk_hybrid_loss(draft, target, eta), expected)
    torch.testing.assert_close(losses.lk_hybrid_loss(draft, target, eta=eta), expected)


def test_exported_losses_survive_pickling_and_carry_their_reference_s_signature():
    for function in FUSED.values():
        assert pickle.loads(pickle.dumps(function)) is function
        assert inspect.signature(function) == inspect.signature(getattr(eager, function.__name__))
