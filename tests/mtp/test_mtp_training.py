"""The training forward against loops written from the formulas, and against what it must do at document ends."""

import pytest
import torch
from drafter_toys import HIDDEN, VOCAB
from mtp_naive import naive_of
from mtp_toys import packed_batch
from naive_layers import kl

from speculators.models.mtp import MTPDraftModel, compute_step_weights, shift_batch_mtp

ARCHS = ["llama", "qwen3", "qwen2"]
ROUTES = ["eager", "simple_flex_attention"]
"""The dense reference and, on a CPU, flash attention document by document."""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("loss_fn", ["ce", "kl_div"])
def test_loss_gradients_and_metrics_equal_loops_over_the_formulas(drafter, verifier, arch, loss_fn):
    model = drafter(arch)
    naive = naive_of(model, verifier(arch))
    batch = packed_batch([6, 9, 2, 5], seed=1, padding=3)
    train, _ = MTPDraftModel.get_trainer_kwargs(num_speculative_steps=3, step_weight_beta=0.6, loss_fn=loss_fn)
    expected, expected_steps, correct = naive.loss(
        batch, 3, train["step_weights"], row_loss=None if loss_fn == "ce" else kl
    )
    expected.backward()
    for route in ROUTES:
        model.config.transformer_layer_config._attn_implementation = route
        model.zero_grad()
        logits, loss, metrics = model(**batch, **train)
        loss.backward()
        assert logits == []
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained.keys() == naive.w.keys()
        for name, grad in trained.items():
            torch.testing.assert_close(grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=f"{route} {name}")
        for k in range(3):
            torch.testing.assert_close(metrics[f"loss_step_{k}"].double(), expected_steps[k], atol=1e-5, rtol=1e-5)
            counted = [column for step, column in correct if step == k]
            chain = [t for t in counted if all(correct.get((j, t), False) for j in range(k + 1))]
            before = [t for t in counted if all(correct.get((j, t), False) for j in range(k))]
            assert metrics[f"full_acc_{k}_sum"] == len(chain) and metrics[f"full_acc_{k}_total"] == len(counted)
            assert metrics[f"cond_acc_{k}_total"] == len(before)


def test_logits_are_given_to_those_who_ask_and_belong_to_the_loss(drafter):
    """A document of its own with everything supervised: cross entropy of the returned logits is the loss."""
    model, batch = drafter(), packed_batch([11], supervised=2.0)
    logits, loss, metrics = model(batch["input_ids"], batch["hidden_states"])
    assert [x.shape for x in logits] == [(1, 7, VOCAB)] * 3  # L = 11 - 3 - 1
    weights = compute_step_weights()
    steps = [
        weights[k] * torch.nn.functional.cross_entropy(x[0], batch["input_ids"][0, k + 2 : k + 9])
        for k, x in enumerate(logits)
    ]
    torch.testing.assert_close(loss, sum(steps))
    torch.testing.assert_close(metrics["loss_step_1"], steps[1].detach())


def test_rows_of_a_batch_equal_rows_alone(drafter):
    """Two rows of two documents each; a shorter row is padded by its attention mask."""
    model = drafter("qwen2")
    first, second = packed_batch([6, 8], seed=1, padding=5), packed_batch([9, 4], seed=2, padding=6)
    both = {key: torch.cat((first[key], second[key])) for key in first}
    alone = [model(**row)[0] for row in (first, second)]
    logits, loss, metrics = model(**both)
    for k in range(3):
        for b in range(2):
            torch.testing.assert_close(logits[k][b, :9], alone[b][k][0, :9])
    sums = [sum(float(model(**row)[2][f"full_acc_{k}_total"]) for row in (first, second)) for k in range(3)]
    assert [float(metrics[f"full_acc_{k}_total"]) for k in range(3)] == sums
    masked = {**both, "attention_mask": (both.pop("document_ids") != -1).long()}
    torch.testing.assert_close(model(**masked)[1], loss)  # documents found by where positions start again


def test_packed_documents_equal_separate_documents(drafter):
    """The same steps count, with the same losses and right answers: nothing leaks over a document's end."""
    model, lengths = drafter("qwen2"), [9, 6, 3, 8]
    batch = packed_batch(lengths, seed=2, padding=4, supervised=0.9)
    _, _, packed = model(**batch)
    sums = dict.fromkeys([key for key in packed if "acc" in key], 0.0)
    losses, start = [0.0] * 3, 0
    for length in lengths:
        part = {key: value[:, start : start + length] for key, value in batch.items()}
        part = {
            key: torch.cat((v, v.new_full((1, 4, *v.shape[2:]), -1 if key == "document_ids" else 0)), 1)
            for key, v in part.items()
        }
        _, _, alone = model(**part)
        for key in sums:
            sums[key] += alone[key]
        for k in range(3):
            losses[k] += alone[f"loss_step_{k}"] * alone[f"full_acc_{k}_total"]
        start += length
    for key, value in sums.items():
        assert packed[key] == value, key
    for k in range(3):
        torch.testing.assert_close(packed[f"loss_step_{k}"] * packed[f"full_acc_{k}_total"], losses[k])


def test_what_counts_hand_worked(drafter):
    """Documents a a a a | b b b b b b and padding, the last two tokens of a and the last three of b supervised:
    step 0 is taught x2 x3 (columns 0 1) and x7 x8 x9; step 1 x3 (column 0) and x7 x8 x9; step 2 x7?  columns t + 4."""
    batch = packed_batch([4, 6], padding=6, supervised=2.0)
    batch["loss_mask"][0] = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    _, _, metrics = drafter()(**batch)
    # step k at column t is taught column t + 2 + k: a 4..: {0->2, 1->3}, {0->3}, {}; b: {5..7}, {4..6}, {4, 5}
    assert [int(metrics[f"full_acc_{k}_total"]) for k in range(3)] == [5, 4, 2]


def test_the_verifiers_final_norm_is_applied_to_the_states(drafter, verifier):
    """The layer reads what engines feed, the state after the norm: a mere change of scale before it changes nothing,
    a change of the norm's weight does."""
    model, batch = drafter(), packed_batch([12])
    assert torch.equal(model.verifier_norm.weight, verifier().model.norm.weight)
    loss = model(**batch)[1]
    torch.testing.assert_close(model(**{**batch, "hidden_states": 50 * batch["hidden_states"]})[1], loss)
    model.verifier_norm.weight.data[:8] *= 3.0
    assert abs(model(**batch)[1] - loss) > 1e-3


def test_rows_too_short_for_a_step_have_loss_zero(drafter):
    model = drafter()
    for length in (1, 2):
        logits, loss, metrics = model(**packed_batch([length], supervised=2.0))
        loss.backward()
        assert logits == [] and loss == 0 and (metrics["loss_sum"], metrics["loss_total"]) == (0, 1)
    assert len(model(**packed_batch([3], supervised=2.0))[0]) == 1


def test_a_row_without_supervision_has_loss_zero_and_gradients(drafter):
    model, batch = drafter(), packed_batch([9], padding=3)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    _, loss, metrics = model(**batch)
    loss.backward()
    assert loss == 0 and metrics["full_acc_0_total"] == 0
    assert all(bool(p.grad.eq(0).all()) for p in model.parameters() if p.requires_grad)
    padding = {key: torch.full_like(value, -1 if key == "document_ids" else 0) for key, value in batch.items()}
    assert model(**padding)[1] == 0
    assert model(**{**padding, "hidden_states": torch.zeros(1, 12, 0)})[1] == 0  # a batch of missing samples


def test_only_the_mtp_layer_is_trained(drafter):
    model = drafter("qwen2")
    model(**packed_batch([12]))[1].backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"embed_tokens.weight", "lm_head.weight", "verifier_norm.weight"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_step_weights():
    """0.6: 1, 0.6, 0.36 over 1.96."""
    assert compute_step_weights() == pytest.approx([0.5102, 0.3061, 0.1837], abs=1e-4)
    assert compute_step_weights(beta=1.0, num_steps=4) == [0.25] * 4
    train, val = MTPDraftModel.get_trainer_kwargs(num_speculative_steps=2, lr=1.0)
    assert train == val and train is not val and train["step_weights"] == pytest.approx([0.625, 0.375])
    assert MTPDraftModel.get_trainer_kwargs(step_weights=[0.5, 0.5])[0]["step_weights"] == [0.5, 0.5]
    with pytest.raises(ValueError, match="num_speculative_steps is needed"):
        MTPDraftModel.get_trainer_kwargs()


def test_what_does_not_fit_is_refused(drafter):
    model, batch = drafter(), packed_batch([9])
    with pytest.raises(ValueError, match="2 entries for num_speculative_steps=3"):
        model(**batch, step_weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="one position per token"):
        model(**{**batch, "position_ids": batch["position_ids"].expand(3, 1, 9)})


def test_align_puts_the_last_states_where_the_layer_reads_and_shifts_nothing():
    column = torch.arange(4)
    sample = {
        "input_ids": column,
        "hidden_states": torch.zeros(4, 0),
        "loss_mask": column,
        "lengths": torch.tensor([4]),
        "verifier_last_hidden_states": column[:, None].float(),
        "position_ids": column,
    }
    aligned = shift_batch_mtp(sample)
    assert set(aligned) == {"input_ids", "loss_mask", "lengths", "position_ids", "hidden_states"}
    assert aligned["hidden_states"] is sample["verifier_last_hidden_states"] and aligned["input_ids"] is column
    assert MTPDraftModel.align is shift_batch_mtp


def test_bf16_autocast_stays_close_to_fp32(drafter):
    """bf16 has 8 bits: 2 % of a loss near 1 is a few roundings."""
    model, batch = drafter("qwen2"), packed_batch([20, 30], seed=5)
    exact = model(**batch)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch)[1]
    rounded.backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)


def test_hidden_size_of_states_is_the_verifiers(drafter):
    assert drafter().network.layer.input_proj.weight.shape == (HIDDEN, 2 * HIDDEN)
