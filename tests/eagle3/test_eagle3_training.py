"""The training forward against loops written from the formulas, and against what it must do at document ends."""

import pytest
import torch
from drafter_toys import DRAFT_VOCAB, VOCAB
from eagle3_toys import packed_batch
from naive_eagle3 import NaiveEagle3
from naive_layers import kl, mixed

CASES = {
    "llama, reduced vocabulary": {},
    "qwen3, all tokens": {"arch": "qwen3", "draft_vocab_size": 40},
    "original eagle3": {"norm_before_residual": False},
    "norm_before_fc and norm_output": {"norm_before_fc": True, "norm_output": True},
    "fc_norm": {"fc_norm": True, "norm_output": True, "norm_before_residual": False},
    "two layers": {"num_layers": 2},
    "biases": {"nested": {"attention_bias": True}},
    "sliding window": {"nested": {"layer_types": ["sliding_attention"], "sliding_window": 4}},
    "two layers of two kinds": {
        "num_layers": 2,
        "nested": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
    },
}
ROUTES = ["eager", "simple_flex_attention"]


def flags(config):
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_accuracy_equal_loops_over_the_formulas(make_drafter, case):
    model = make_drafter(**CASES[case])
    batch = packed_batch([5, 4, 6], seed=1, padding=3)
    row_loss, loss_fn = (mixed, {"ce": 0.3, "tv": 0.7}) if case == "fc_norm" else (kl, "kl_div")
    nested = model.config.transformer_layer_config
    naive = NaiveEagle3(model.state_dict(), nested, **flags(model.config))
    expected, correct = naive.loss(batch, 3, 0.8, row_loss)
    expected.backward()

    for route in ROUTES:
        nested._attn_implementation = route
        model.zero_grad()
        _, loss, metrics = model(**batch, ttt_steps=3, ttt_step_loss_decay=0.8, loss_fn=loss_fn)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        for name, grad in trained.items():
            torch.testing.assert_close(grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=f"{route} {name}")
        for s in range(3):
            # right at this step and all before, over the columns that count at this step
            right = [i for (step, i) in correct if step == s and all(correct.get((m, i)) for m in range(s + 1))]
            judged = [step for (step, _) in correct if step == s]
            assert metrics[f"full_acc_{s}_sum"] == len(right)
            assert metrics[f"full_acc_{s}_total"] == len(judged)


@pytest.mark.parametrize("route", ROUTES)
def test_packed_documents_equal_separate_documents_at_every_step(make_drafter, route):
    """The same supervised columns, and the same loss and drafts on each: nothing leaks over a document's end."""
    model = make_drafter(num_layers=2)
    model.config.transformer_layer_config._attn_implementation = route
    batch = packed_batch([6, 5, 7], seed=2, padding=4)
    packed_drafts, packed_loss, packed = model(**batch, loss_fn="kl_div")
    starts = [0, 6, 11]
    sums = {f"loss_{s}": 0.0 for s in range(3)} | {f"full_acc_{s}": 0.0 for s in range(3)}
    totals = dict.fromkeys(sums, 0.0)
    for start, length in zip(starts, [6, 5, 7], strict=True):
        alone = {key: value[:, start : start + length] for key, value in batch.items()}
        alone["document_ids"] = torch.zeros(1, length, dtype=torch.int64)
        drafts, _, metrics = model(**alone, loss_fn="kl_div")
        for s in range(3):
            assert torch.equal(drafts[s][0], packed_drafts[s][0, start : start + length])
            count = metrics[f"full_acc_{s}_total"]
            sums[f"loss_{s}"] += metrics[f"loss_{s}_sum"] * (count + 1e-5)
            totals[f"loss_{s}"] += count
            sums[f"full_acc_{s}"] += metrics[f"full_acc_{s}_sum"]
            totals[f"full_acc_{s}"] += count
    for s in range(3):
        assert packed[f"full_acc_{s}_total"] == totals[f"full_acc_{s}"]
        assert packed[f"full_acc_{s}_sum"] == sums[f"full_acc_{s}"]
        expected = sums[f"loss_{s}"] / (totals[f"loss_{s}"] + 1e-5)
        torch.testing.assert_close(packed[f"loss_{s}_sum"], expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(packed_loss)


def test_the_last_columns_of_a_document_count_for_fewer_steps(make_drafter):
    """Hand-worked: documents of 4 and 2 columns, all supervised: step s loses s columns of each document."""
    batch = packed_batch([4, 2], supervised=2.0)
    _, _, metrics = make_drafter()(**batch, ttt_steps=3)
    assert [metrics[f"full_acc_{s}_total"].item() for s in range(3)] == [6.0, 4.0, 2.0]


def test_loss_mask_is_that_of_the_input_token(make_drafter):
    """One supervised token at column 3: step s counts at the column s before it, and its target is state 3."""
    model = make_drafter()
    batch = packed_batch([6])
    batch["loss_mask"] = torch.tensor([[0, 0, 0, 1, 0, 0]])
    drafts, loss, _ = model(**batch, ttt_steps=3)
    assert [(row[0] >= 0).nonzero().flatten().tolist() for row in drafts] == [[3], [2], [1]]
    batch["verifier_last_hidden_states"][0, [0, 1, 2, 4, 5]] += 1.0
    torch.testing.assert_close(model(**batch, ttt_steps=3)[1], loss)
    batch["verifier_last_hidden_states"][0, 3] += 1.0
    batch["verifier_last_hidden_states"][0, 3, 0] -= 3.0
    assert abs(model(**batch, ttt_steps=3)[1] - loss) > 1e-3


@pytest.mark.parametrize("route", ROUTES)
def test_a_row_without_supervised_tokens_has_loss_zero_and_zero_gradients(make_drafter, route):
    model = make_drafter()
    model.config.transformer_layer_config._attn_implementation = route
    batch = packed_batch([5, 4], padding=2)
    batch["loss_mask"].zero_()
    _, loss, metrics = model(**batch, loss_fn='{"ce": 1.0, "tv": 1.0}')
    loss.backward()
    assert loss == 0.0
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_a_row_of_padding_alone_has_loss_zero(make_drafter):
    batch = packed_batch([], padding=8)
    _, loss, _ = make_drafter()(**batch)
    loss.backward()
    assert loss == 0.0


def test_padding_changes_nothing(make_drafter):
    model = make_drafter()
    batch = packed_batch([6, 5], seed=4)
    padded = {key: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, 5)) for key, value in batch.items()}
    padded["document_ids"][0, 11:] = -1
    padded["loss_mask"][0, 11:] = 1  # even if someone supervises padding
    torch.testing.assert_close(model(**padded)[1], model(**batch)[1])


def test_defaults_of_optional_columns(make_drafter):
    """Positions default to 1, 2, ..; the loss mask to all; one document."""
    model = make_drafter()
    batch = packed_batch([7], supervised=2.0)
    only = {key: batch[key] for key in ("hidden_states", "input_ids", "verifier_last_hidden_states")}
    torch.testing.assert_close(model(**only)[1], model(**batch, lengths=None, error_records=0)[1])


def test_without_verifier_states_forward_gives_the_draft_ids_of_each_step(make_drafter):
    model = make_drafter()
    batch = packed_batch([7, 5], supervised=2.0)
    expected, _, _ = model(**batch)
    del batch["verifier_last_hidden_states"]
    drafts = model(**batch)
    assert len(drafts) == 3
    for s in range(3):
        scored = expected[s] >= 0
        assert torch.equal(drafts[s][scored], expected[s][scored])


def test_targets_carry_what_the_verifier_does_to_its_logits(make_drafter):
    """Soft cap 2 and scale 0.5, as a verifier's config may ask for: one supervised column, loss written out."""
    model, batch = make_drafter(), packed_batch([5])
    batch["loss_mask"] = torch.tensor([[0, 0, 0, 0, 1]])
    model.target_transform = (0.5, 2.0)
    _, loss, _ = model(**batch, ttt_steps=1)
    nested = model.config.transformer_layer_config
    naive = NaiveEagle3(model.state_dict(), nested, **flags(model.config))
    with torch.no_grad():
        state = naive.norm("verifier_norm", batch["verifier_last_hidden_states"][0, 4].double())
        target = 2.0 * torch.tanh(0.5 * (naive.w["verifier_lm_head.weight"] @ state) / 2.0)
        expected = kl(naive.w["lm_head.weight"] @ naive.unroll(batch, 1)[0][4], target)
    torch.testing.assert_close(loss.double(), expected / 1.00001, atol=1e-5, rtol=1e-5)


def test_batches_of_several_rows_are_refused(make_drafter):
    batch = {key: value.expand(2, *value.shape[1:]) for key, value in packed_batch([5]).items()}
    with pytest.raises(ValueError, match="packed into one row"):
        make_drafter()(**batch)


def test_embedding_is_trained_only_when_asked(make_drafter):
    assert not make_drafter().embed_tokens.weight.requires_grad
    model = make_drafter(embed_requires_grad=True)
    model(**packed_batch([6]))[1].backward()
    assert model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.lm_head.weight.grad is None


def test_bf16_autocast_stays_close_to_fp32(make_drafter):
    """bf16 has 8 bits: 2 % of a loss near 1 is a few roundings."""
    model = make_drafter(num_layers=2)
    batch = packed_batch([9, 8], seed=5)
    exact = model(**batch)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch)[1]
    rounded.backward()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("without_verifier", "draft_vocab_size", "num_said"),
    [(True, DRAFT_VOCAB, 1), (True, VOCAB, 0), (False, DRAFT_VOCAB, 0)],
)
def test_figures_that_flatter_for_want_of_a_verifier_are_said_once(
    make_drafter, caplog, without_verifier, draft_vocab_size, num_said
):
    model = make_drafter(draft_vocab_size=draft_vocab_size)
    if without_verifier:
        model.config.speculators_config.verifier.name_or_path = None
    batch = packed_batch([5, 4], seed=1)
    for _ in range(2):
        model(**batch, ttt_steps=1, loss_fn="kl_div")
    said = [record.getMessage() for record in caplog.records if "names no verifier" in record.getMessage()]
    assert len(said) == num_said
    assert all(f"outside the draft vocabulary of {DRAFT_VOCAB} " in line and "too high" in line for line in said)
