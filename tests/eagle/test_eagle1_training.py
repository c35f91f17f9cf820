"""The training forward against HASS written as in its paper, and what it must do at document ends."""

import pytest
import torch
from drafter_toys import packed_row
from naive_eagle1 import NaiveEagle, top_cross_entropy
from naive_layers import kl

from speculators.models.eagle import EagleSpeculator
from speculators.models.eagle.training import align

CASES = {
    "eagle": {},
    "fusion_bias": {"fusion_bias": True},
    "layernorms": {"layernorms": True, "fusion_bias": True},
    "qwen3": {"arch": "qwen3"},
    "biases": {"nested": {"attention_bias": True}},
}
ROUTES = ["eager", "simple_flex_attention"]
QUIET = {"feature_noise": 0.0}


def naive_of(model, verifier):
    return NaiveEagle(
        model.state_dict(),
        model.config.transformer_layer_config,
        verifier.model.embed_tokens.weight,
        verifier.lm_head.weight,
        verifier.model.norm.weight,
    )


def kwargs_of(**changes):
    settings = {
        "loss_fn": "kl_div",
        "distillation_weight": 0.4,
        "top_k_weight": 0.7,
        "top_k": 5,
        "regression_weight": 1.3,
        "ttt_steps": 3,
        "detach_steps": True,
        **QUIET,
    }
    return EagleSpeculator.get_trainer_kwargs(**{**settings, **changes})[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("detach", [True, False])
def test_loss_and_gradients_equal_hass_as_its_paper_has_it(make_drafter, verifier, case, detach):
    """The query moves with the token there and stays at its column here; one document after the other there."""
    model = make_drafter(**CASES[case])
    batch = packed_row([5, 4, 6], seed=1, padding=3)

    def row_loss(draft, target):
        return 0.4 * kl(draft, target) + 0.7 * top_cross_entropy(draft, target, 5)

    naive = naive_of(model, verifier)
    expected = naive.loss(batch, 3, row_loss, 1.3, detach=detach)
    expected.backward()
    for route in ROUTES:
        model.config.transformer_layer_config._attn_implementation = route
        model.zero_grad()
        _, loss, _ = model(**batch, **kwargs_of(detach_steps=detach))
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained.keys() == model.state_dict().keys()
        for name, grad in trained.items():
            torch.testing.assert_close(grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=f"{route} {name}")


def test_one_step_is_eagle_1(make_drafter, verifier):
    model = make_drafter()
    batch = packed_row([6, 3], seed=2)
    expected = naive_of(model, verifier).loss(batch, 1, lambda d, t: 0.1 * kl(d, t), 1.0)
    settings = kwargs_of(ttt_steps=1, distillation_weight=0.1, top_k_weight=0.0, regression_weight=1.0)
    torch.testing.assert_close(model(**batch, **settings)[1].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_packed_documents_equal_separate_documents(make_drafter, route):
    model = make_drafter()
    model.config.transformer_layer_config._attn_implementation = route
    batch = packed_row([6, 5, 7], seed=2, padding=4)
    packed_drafts, _, packed = model(**batch, **kwargs_of())
    sums, totals = [0.0] * 3, [0.0] * 3
    for start, length in ((0, 6), (6, 5), (11, 7)):
        alone = {key: value[:, start : start + length] for key, value in batch.items()}
        alone["document_ids"] = torch.zeros(1, length, dtype=torch.int64)
        drafts, _, metrics = model(**alone, **kwargs_of())
        for s in range(3):
            assert torch.equal(drafts[s][0], packed_drafts[s][0, start : start + length])
            count = metrics[f"full_acc_{s}_total"]
            sums[s] += metrics[f"loss_{s}_sum"] * (count + 1e-5)
            totals[s] += count
    for s in range(3):
        assert packed[f"full_acc_{s}_total"] == totals[s]
        torch.testing.assert_close(packed[f"loss_{s}_sum"], sums[s] / (totals[s] + 1e-5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_supervised_gives_loss_zero(make_drafter, route):
    model = make_drafter()
    model.config.transformer_layer_config._attn_implementation = route
    empty = packed_row([], padding=8)
    for batch in (packed_row([5, 4], padding=2), empty, {**empty, "hidden_states": torch.zeros(1, 8, 0)}):
        batch["loss_mask"].zero_()
        model.zero_grad()
        _, loss, metrics = model(**batch, **kwargs_of())
        loss.backward()
        assert loss == 0.0
        assert all(torch.isfinite(value).all() for value in metrics.values())
        assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_padding_changes_nothing(make_drafter):
    model, batch = make_drafter(), packed_row([6, 5], seed=4)
    padded = {key: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, 5)) for key, value in batch.items()}
    padded["document_ids"][0, 11:] = -1
    padded["loss_mask"][0, 11:] = 1  # even if someone supervises padding
    torch.testing.assert_close(model(**padded, **kwargs_of())[1], model(**batch, **kwargs_of())[1])


def test_align_pairs_each_token_with_the_state_before_it():
    """Hand-worked: tokens 0 10 20 30; states named by their position."""
    column = torch.arange(4)
    sample = {
        "input_ids": column * 10,
        "hidden_states": torch.zeros(4, 0),
        "loss_mask": torch.tensor([0, 0, 1, 1]),
        "verifier_last_hidden_states": column[:, None].float(),
        "position_ids": column,
        "lengths": torch.tensor([4]),
    }
    aligned = align(sample)
    assert aligned["input_ids"].tolist() == [10, 20, 30]
    assert aligned["hidden_states"].flatten().tolist() == [0, 1, 2]
    assert aligned["verifier_last_hidden_states"].flatten().tolist() == [1, 2, 3]
    assert aligned["loss_mask"].tolist() == [0, 1, 1] and aligned["position_ids"].tolist() == [0, 1, 2]
    assert aligned["lengths"].tolist() == [3] and sample["lengths"].tolist() == [4]


def test_noise_is_for_training_alone(make_drafter):
    model, batch = make_drafter(), packed_row([9])
    noisy = {**kwargs_of(), "feature_noise": 0.2}
    assert torch.equal(model(**batch, **noisy)[1], model(**batch, **kwargs_of())[1])
    model.train()
    assert not torch.equal(model(**batch, **noisy)[1], model(**batch, **noisy)[1])


def test_metrics_and_trainer_kwargs(make_drafter):
    assert EagleSpeculator.get_trainer_kwargs() == ({}, {})
    _, _, metrics = make_drafter()(**packed_row([6]), **kwargs_of(ttt_steps=2))
    kinds = ("loss", "full_acc", "cond_acc", "kl_div_loss", "top_k_loss", "regression_loss")
    names = {"loss"} | {f"{kind}_{s}" for kind in kinds for s in range(2)}
    assert set(metrics) == {"loss"} | {f"{name}_{part}" for name in names for part in ("sum", "total")}
