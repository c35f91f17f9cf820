"""The chunked route against the reference over one list of cases, forward and backward, in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from speculators.losses import chunks, resolve_loss_config
from speculators.losses.chunked import row_losses
from speculators.losses.chunks import HeadTargets, OutsideHead, TokenTargets
from speculators.models.supervision import step_accuracy

V, H, R = 13, 6, 11
SPECS = ["kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid", '{"ce": 0.3, "tv": 0.7}', '{"kl_div": 2.0, "tv": 0.0}']
PAIRINGS = {
    "one to one": list(range(R)),
    "three steps of shared targets": [i + s for s in range(3) for i in range(R - s)],
    "some targets, any order": [3, 3, 9, 0, 3, 7],
    "one": [5],
    "none": [],
}


def case(pairing, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor(PAIRINGS[pairing], dtype=torch.int64)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    hidden, head = draw(len(index), H).requires_grad_(), draw(V, H)
    return hidden, head, HeadTargets(draw(R, H), draw(V, H)), index, draw(len(index)).abs()


def compare(hidden, head, targets, index, weight, spec, leaves, chunk_elements):
    losses = [
        row_losses(
            hidden, head, targets, index, resolve_loss_config(spec, implementation), chunk_elements=chunk_elements
        )
        for implementation in ("fused", "eager")
    ]
    for field in ("loss_N", "draft_ids_N", "target_ids_N", "correct_N"):
        torch.testing.assert_close(getattr(losses[0], field), getattr(losses[1], field), atol=1e-12, rtol=1e-10)
    assert losses[0].terms.keys() == losses[1].terms.keys()
    for name, term in losses[1].terms.items():
        torch.testing.assert_close(losses[0].terms[name], term, atol=1e-12, rtol=1e-10)
    grads = [torch.autograd.grad((x.loss_N * weight).sum(), leaves) for x in losses]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_chunked_equals_reference(spec, pairing):
    hidden, head, targets, index, weight = case(pairing)
    for chunk_elements in (16 * V, 1 << 20):
        compare(hidden, head, targets, index, weight, spec, (hidden,), chunk_elements)


@pytest.mark.parametrize("spec", ["kl_div", '{"ce": 0.3, "tv": 0.7}'])
def test_many_chunks_equal_one(spec):
    """Chunks of 16 target rows over 80: groups that are full, padded and gathered all occur."""
    generator = torch.Generator().manual_seed(1)
    index = torch.cat([torch.arange(80), torch.arange(3, 40), torch.randint(0, 80, (9,), generator=generator)])
    hidden = torch.randn(len(index), H, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    targets = HeadTargets(torch.randn(80, H, generator=generator, dtype=torch.float64), head + 0.5)
    weight = torch.rand(len(index), generator=generator, dtype=torch.float64)
    compare(hidden, head, targets, index, weight, spec, (hidden,), chunk_elements=1)


@pytest.mark.parametrize("pairing", ["three steps of shared targets", "some targets, any order"])
def test_a_trained_head_gets_its_gradient(pairing):
    hidden, head, targets, index, weight = case(pairing)
    head.requires_grad_()
    compare(hidden, head, targets, index, weight, "jsd", (hidden, head), 16 * V)


class CountedTargets(HeadTargets):
    """Counts how often rows are asked for."""

    calls = 0

    def at(self, rows_C, dtype):
        type(self).calls += 1
        return super().at(rows_C, dtype)


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_head_needs_one_walk_where_weights_are_known_and_a_second_where_it_is_trained_without(is_known, is_trained):
    """One target row is used once and three of them thrice; rows that only fill up a group must count nothing."""
    hidden, head, targets, index, weight = case("some targets, any order")
    leaves = (hidden, head.requires_grad_()) if is_trained else (hidden,)
    counted = CountedTargets(targets.hidden_TH, targets.weight_VH)
    CountedTargets.calls = 0
    losses = row_losses(
        hidden, head, counted, index, resolve_loss_config("kl_div"), weight_N=weight if is_known else None
    )
    total = losses.total if is_known else (losses.loss_N * weight).sum()
    grads = torch.autograd.grad(3.0 * total, leaves)
    assert CountedTargets.calls == (1 if is_known or not is_trained else 2)
    reference = row_losses(hidden, head, targets, index, resolve_loss_config("kl_div", "eager"), weight_N=weight)
    expected_grads = torch.autograd.grad((reference.loss_N * 3.0 * weight).sum(), leaves, retain_graph=True)
    torch.testing.assert_close(grads, expected_grads, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(3.0 * reference.total, leaves), grads, atol=1e-12, rtol=1e-10)


def test_where_weights_are_known_no_others_can_be_differentiated_by_mistake():
    hidden, head, targets, index, weight = case("one to one")
    losses = row_losses(hidden, head, targets, index, resolve_loss_config("kl_div"), weight_N=weight)
    assert losses.total.requires_grad and not losses.loss_N.requires_grad


def test_token_targets_are_cross_entropy():
    hidden, head, _, index, weight = case("three steps of shared targets")
    tokens = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(4))
    losses = row_losses(hidden, head, TokenTargets(tokens), index, resolve_loss_config("ce"))
    expected = F.cross_entropy(hidden @ head.T, tokens[index], reduction="none")
    torch.testing.assert_close(losses.loss_N, expected)
    grads = [torch.autograd.grad((x * weight).sum(), hidden, retain_graph=True)[0] for x in (losses.loss_N, expected)]
    torch.testing.assert_close(grads[0], grads[1])
    assert torch.equal(losses.target_ids_N, tokens[index])
    custom = resolve_loss_config(lambda logits, targets: (logits - targets).sum(-1))
    with pytest.raises(ValueError, match="needs target distributions"):
        row_losses(hidden, head, TokenTargets(tokens), index, custom)


def test_what_the_verifier_does_to_its_logits_is_done_to_the_targets():
    hidden, head, targets, index, _ = case("one to one")
    capped = HeadTargets(targets.hidden_TH, targets.weight_VH, scale=0.25, softcap=2.0)
    losses = row_losses(hidden, head, capped, index, resolve_loss_config("kl_div"))
    target_logits = 2.0 * torch.tanh(0.25 * targets.hidden_TH @ targets.weight_VH.T / 2.0)
    p, q = target_logits.softmax(-1), (hidden @ head.T).log_softmax(-1)
    torch.testing.assert_close(losses.loss_N, (p * (p.log() - q)).sum(-1))


def test_a_loss_of_ones_own_is_differentiated_chunk_by_chunk():
    """Any function of the two distributions: here the squared distance of probabilities."""

    def squared(logits, targets):
        return ((logits.softmax(-1) - targets.softmax(-1)) ** 2).sum(-1)

    hidden, head, targets, index, weight = case("three steps of shared targets")
    losses = row_losses(hidden, head, targets, index, resolve_loss_config(squared), chunk_elements=16 * V)
    expected = squared(hidden @ head.T, targets.hidden_TH[index] @ targets.weight_VH.T)
    torch.testing.assert_close(losses.loss_N, expected)
    grads = [torch.autograd.grad((x * weight).sum(), hidden, retain_graph=True)[0] for x in (losses.loss_N, expected)]
    torch.testing.assert_close(grads[0], grads[1])


def test_bf16_autocast_keeps_sums_in_fp32():
    hidden, head, targets, index, _ = case("three steps of shared targets", dtype=torch.float32)
    exact = row_losses(hidden, head, targets, index, resolve_loss_config("kl_div"))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = row_losses(hidden, head, targets, index, resolve_loss_config("kl_div"))
    assert rounded.loss_N.dtype == torch.float32
    torch.testing.assert_close(rounded.loss_N, exact.loss_N, atol=0.1, rtol=0.05)
    grads = [torch.autograd.grad(x.loss_N.sum(), hidden, retain_graph=True)[0] for x in (rounded, exact)]
    assert grads[0].dtype == torch.float32
    torch.testing.assert_close(grads[0], grads[1], atol=0.1, rtol=0.1)


def test_no_tensor_of_all_rows_by_vocabulary_is_kept():
    """What survives forward for backward is one gradient a hidden row: N * H, not N * V."""
    hidden, head, targets, index, _ = case("three steps of shared targets")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        row_losses(hidden, head, targets, index, resolve_loss_config("kl_div"))
    assert saved == [hidden.shape]


KEPT = torch.tensor([1, 4, 6])
"""Verifier ids of a draft vocabulary of 3 out of 8."""


def reduced_case(rows_T8, drafts_N3):
    """Targets whose logits over the whole vocabulary are the given rows, and drafts with the given logits."""
    eye = torch.eye(8, dtype=torch.float64)
    is_kept = torch.zeros(8, dtype=torch.bool).index_fill(0, KEPT, True)
    outside = OutsideHead(eye[~is_kept], (~is_kept).nonzero().flatten(), KEPT)
    targets = HeadTargets(torch.tensor(rows_T8, dtype=torch.float64), eye[KEPT], outside_head=outside)
    return torch.tensor(drafts_N3, dtype=torch.float64).requires_grad_(), targets


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_a_target_outside_the_draft_vocabulary_is_a_miss(implementation):
    """Rows: best token kept; best outside, the drafter says the best kept one; a tie of 4 with 3 (outside, the smaller
    id: the verifier says 3); a tie of 4 with 5 (the verifier says 4)."""
    rows = [[0, 0, 0, 0, 9, 0, 0, 0], [9, 0, 0, 0, 5, 0, 0, 0], [0, 0, 0, 7, 7, 0, 0, 0], [0, 0, 0, 0, 7, 7, 0, 0]]
    hidden, targets = reduced_case(rows, [[0, 1, 0]] * 4)
    config = resolve_loss_config("kl_div", implementation)
    losses = row_losses(hidden, torch.eye(3, dtype=torch.float64), targets, torch.arange(4), config)
    assert losses.correct_N.tolist() == [True, False, False, True]
    assert losses.agrees_N.tolist() == [True] * 4


def test_a_chain_is_broken_by_a_target_outside():
    """Step 0 of column 1 and step 1 of column 0 are outside: column 0 ends after step 0, column 1 before it."""
    inside, outside = [0, 0, 0, 0, 9, 0, 0, 0], [9, 0, 0, 0, 5, 0, 0, 0]
    hidden, targets = reduced_case([inside, outside, inside], [[0, 1, 0]] * 5)
    step_N, row_N = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1])
    config = resolve_loss_config("kl_div")
    losses = row_losses(hidden, torch.eye(3, dtype=torch.float64), targets, row_N + step_N, config)
    supervised, correct = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    correct[step_N, row_N] = losses.correct_N
    shares = {name: float(r.numerator / r.denominator) for name, r in step_accuracy(supervised, correct).items()}
    assert shares == pytest.approx({"full_acc_0": 2 / 3, "cond_acc_0": 2 / 3, "full_acc_1": 0.0, "cond_acc_1": 0.0})


@pytest.mark.parametrize("spec", ["kl_div", "ce"])
def test_the_loss_does_not_read_what_is_outside(spec, monkeypatch):
    """Same bits, whatever is outside; pieces of 16 rows find what one piece finds; a whole vocabulary asks nothing."""
    generator = torch.Generator().manual_seed(5)
    rows, drafts = (torch.randn(n, 3 if n == 90 else 8, generator=generator).tolist() for n in (70, 90))
    hidden, targets = reduced_case(rows, drafts)
    index = torch.randint(0, 70, (90,), generator=generator)
    eye, config = torch.eye(3, dtype=torch.float64), resolve_loss_config(spec)
    found = []
    for given in (targets, dataclasses.replace(targets, outside_head=None), targets):
        losses = row_losses(hidden, eye, given, index, config)
        found.append((losses, *torch.autograd.grad(losses.loss_N.sum(), hidden)))
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    for (losses, grad), (plain, plain_grad) in ((found[0], found[1]), (found[2], found[1])):
        torch.testing.assert_close(losses.loss_N, plain.loss_N, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(grad, plain_grad, atol=1e-12, rtol=1e-12)
        assert torch.equal(losses.agrees_N, plain.correct_N) and not plain.outside_N.any()
    best = torch.tensor(rows, dtype=torch.float64).argmax(-1)[index]
    expected = best == KEPT[hidden.argmax(-1)]
    assert torch.equal(found[0][0].correct_N, expected) and torch.equal(found[2][0].correct_N, expected)
    assert 0 < expected.sum() < found[1][0].correct_N.sum()
