"""The training forward against loops written from the formulas; the split head against autograd."""

import pytest
import torch
from dflash_naive import ce
from dflash_toys import MASK_TOKEN, MIXED, one_document, packed_batch
from drafter_toys import decoder_config, save_llama
from dspark_naive import NaiveDSpark, overlap
from naive_layers import kl
from transformers import LlamaForCausalLM

from speculators.losses import resolve_loss_config
from speculators.losses.chunked import SplitHead, split_row_losses
from speculators.losses.chunks import HeadTargets
from speculators.models import DSparkDraftModel

CASES = {
    "vanilla": {},
    "gated, all tokens": {"markov_head_type": "gated", "draft_vocab_size": 40},
    "rnn": {"markov_head_type": "rnn"},
    "rnn, anchor slot unused": {"markov_head_type": "rnn", "sample_from_anchor": False},
    "vanilla, anchor slot unused, confidence from the state": {
        "sample_from_anchor": False,
        "confidence_head_with_markov": False,
    },
    "sliding and full": MIXED,
}


def naive_of(model):
    config = model.config
    kinds = config.transformer_layer_config.layer_types
    naive = NaiveDSpark(
        model.state_dict(),
        config.transformer_layer_config,
        block_size=config.block_size,
        mask_token=MASK_TOKEN,
        from_anchor=config.sample_from_anchor,
        causal=[kind == "sliding_attention" for kind in kinds],
        kind=config.markov_head_type,
        confidence_reads_markov=config.confidence_head_with_markov,
    )
    outside = model.outside_head()
    naive.outside_head = None if outside is None else outside.weight_OH
    return naive


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_equal_loops_over_the_formulas(drafter, case):
    model = drafter(**CASES[case])
    batch = packed_batch([6, 8, 5], seed=1, padding=3)
    naive = naive_of(model)
    use_ce = case == "rnn"
    row_loss, weights_of = (ce, naive.dpace(0.4)) if use_ce else (kl, naive.fixed_decay(3.0))
    token_loss, found = naive.loss(batch, row_loss, weights_of)
    confidence_loss = naive.confidence_loss(found, 3.0, overlap)
    expected = token_loss + 0.7 * confidence_loss
    expected.backward()

    for route in ("eager", "sdpa"):
        model.config.transformer_layer_config._attn_implementation = route
        model.zero_grad()
        _, loss, metrics = model(
            **batch,
            loss_fn="ce" if use_ce else "kl_div",
            gamma=3.0,
            dpace_alpha=0.4,
            confidence_head_alpha=0.7,
            per_position_loss_weight="dpace" if use_ce else "fixed-exp-decay",
            max_anchors=100,
        )
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(metrics["confidence_loss_sum"].double(), confidence_loss, atol=1e-5, rtol=1e-5)
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"} < set(trained)
        for name, grad in trained.items():
            torch.testing.assert_close(grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=f"{route} {name}")
        check_metrics(metrics, found, naive)


def check_metrics(metrics, found, naive):
    first = 0 if naive.from_anchor else 1
    rates, runs, promised, errors, predictions = [], [], [], [], []
    for p, slots in found.items():
        if not slots:
            continue
        reach, hope, run, promise = 1.0, 1.0, 1.0, 1.0
        for k in range(first, naive.size):
            rate = naive.chance[p][k].item() if k in slots else 0.0
            chance = torch.sigmoid(naive.kappa[p][k]).item() if k in slots else 0.0
            reach, hope = reach * rate, hope * chance
            run, promise = run + reach, promise + hope
            if k in slots:
                rates.append(rate)
                errors.append(abs(rate - chance))
                predictions.append(chance)
        runs.append(run)
        promised.append(promise)
    expected = {
        "accept_rate": (sum(rates), len(rates)),
        "accept_len": (sum(runs), len(runs)),
        "confidence_abs_error": (sum(errors), len(errors)),
        "confidence_pred_mean": (sum(predictions), len(errors)),
        "confidence_cumprod_bias": (sum(promised) - sum(runs), len(runs)),
    }
    for name, (total, count) in expected.items():
        assert float(metrics[f"{name}_sum"]) == pytest.approx(total, abs=1e-4), name
        assert metrics[f"{name}_total"] == count, name
    assert metrics["loss"] == metrics["loss_sum"] and {"eal_sum", "full_acc_sum"} <= set(metrics)


def test_confidence_may_be_taught_greedy_agreement(drafter):
    model, batch = drafter(), packed_batch([7, 8], padding=3)
    naive = naive_of(model)
    _, found = naive.loss(batch, kl, naive.fixed_decay(4.0))
    expected = naive.confidence_loss(found, 4.0, lambda draft, target: float(draft.argmax() == target.argmax()))
    metrics = model(**batch, confidence_target="greedy")[2]
    torch.testing.assert_close(metrics["confidence_loss_sum"].double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="confidence_target='no'"):
        model(**batch, confidence_target="no")


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("loss", ["kl_div", "ce", '{"ce": 0.3, "tv": 0.7}'])
def test_the_split_head_equals_autograd_over_all_logits(implementation, loss):
    """Rows share target rows, chunks are small; fp64, so any difference is a mistake."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, features, trained = (random(*s).requires_grad_() for s in ((50, 6), (50, 3), (11, 3)))
    frozen, target_hidden, target_head, row_weight = random(11, 6), random(20, 6), random(11, 6), random(50)
    index = torch.randint(0, 20, (50,), generator=generator)
    losses = split_row_losses(
        hidden,
        features,
        SplitHead(frozen, trained),
        HeadTargets(target_hidden, target_head),
        index,
        resolve_loss_config(loss, implementation),
        chunk_elements=64,
    )
    grads = torch.autograd.grad(losses.loss_N @ row_weight, (hidden, features, trained))

    logits, targets = hidden @ frozen.T + features @ trained.T, (target_hidden @ target_head.T)[index]
    q, p = logits.log_softmax(-1), targets.log_softmax(-1)
    terms = {
        "kl_div": (p.exp() * (p - q)).sum(-1),
        "ce": -q.gather(1, targets.argmax(-1, keepdim=True))[:, 0],
        "tv": 1 - torch.minimum(p.exp(), q.exp()).sum(-1),
    }
    expected = 0.3 * terms["ce"] + 0.7 * terms["tv"] if loss.startswith("{") else terms[loss]
    torch.testing.assert_close(losses.loss_N, expected)
    for grad, reference in zip(
        grads, torch.autograd.grad(expected @ row_weight, (hidden, features, trained)), strict=True
    ):
        torch.testing.assert_close(grad, reference)
    assert torch.equal(losses.correct_N, logits.argmax(-1) == targets.argmax(-1))


def test_packed_documents_equal_separate_documents(drafter):
    model = drafter(**MIXED, markov_head_type="rnn")
    lengths = [9, 6, 8]
    batch = packed_batch(lengths, seed=2, padding=4, supervised=0.9)
    _, loss, packed = model(**batch, max_anchors=100)
    total, start, sums = 0.0, 0, dict.fromkeys(packed, 0.0)
    for length in lengths:
        _, alone_loss, alone = model(**one_document(batch, start, length, padding=4), max_anchors=100)
        total += alone_loss * alone["full_acc_total"]
        sums = {key: sums[key] + alone[key] for key in sums}
        start += length
    torch.testing.assert_close(loss * packed["full_acc_total"], total, atol=1e-3, rtol=1e-5)
    for key in packed:
        if "loss" not in key:
            torch.testing.assert_close(packed[key], sums[key], atol=1e-4, rtol=1e-5, msg=key)


def test_without_heads_it_is_dflash(drafter, verifier_path):
    """Same weights, no Markov and no confidence head: DFlash's loss, and no head metrics."""
    from dflash_toys import make_drafter

    model = drafter(markov_rank=0, enable_confidence_head=False)
    plain = make_drafter("dflash", verifier_path, sample_from_anchor=True)
    plain.load_state_dict(model.state_dict())
    batch = packed_batch([9, 9], padding=2)
    _, loss, metrics = model(**batch, loss_fn="kl_div")
    assert torch.equal(loss, plain(**batch, loss_fn="kl_div")[1])
    assert "confidence_loss_sum" not in metrics and "accept_len_sum" in metrics


def test_a_row_without_supervision_has_loss_zero(drafter):
    model, batch = drafter(markov_head_type="rnn"), packed_batch([9], padding=2)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    _, loss, _ = model(**batch)
    loss.backward()
    assert loss == 0 and all(bool(p.grad.eq(0).all()) for p in model.parameters() if p.requires_grad)


def test_bf16_autocast_stays_close_to_fp32(drafter):
    model, batch = drafter(markov_head_type="gated"), packed_batch([20, 30], seed=5)
    exact = model(**batch, max_anchors=99)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch, max_anchors=99)[1]
    rounded.backward()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_acceptance_counts_what_a_draft_vocabulary_leaves_out(implementation, tmp_path):
    """One token can be drafted, and all states are equal: q(token) = 1, so a draft is accepted with p(token)."""
    verifier = save_llama(tmp_path, num_layers=2)
    token, t2d = 7, torch.zeros(40, dtype=torch.bool)
    t2d[token] = True
    keys = {"verifier_name_or_path": str(verifier), "target_layer_ids": [1], "block_size": 4, "num_layers": 1}
    shape = decoder_config("qwen3", num_hidden_layers=1)
    model = DSparkDraftModel.from_training_args(
        shape, t2d, torch.tensor([token]), draft_vocab_size=1, mask_token_id=3, markov_rank=4, **keys
    )
    batch = packed_batch([9], seed=1)
    state = torch.randn(16, generator=torch.Generator().manual_seed(2))
    batch["verifier_last_hidden_states"] = state.expand(1, batch["input_ids"].shape[1], -1).contiguous()
    batch["hidden_states"] = batch["hidden_states"][..., :16]
    batch["loss_mask"] = torch.ones_like(batch["loss_mask"])
    loss_config = resolve_loss_config("kl_div", implementation)
    tv_loss_fn, _ = resolve_loss_config("tv", implementation)["tv"]
    metrics = model.eval()(**batch, loss_config=loss_config, tv_loss_fn=tv_loss_fn)[2]
    whole = LlamaForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    with torch.no_grad():
        chance = float(whole.lm_head(whole.model.norm(state)).softmax(-1)[token])
    assert float(metrics["accept_rate_sum"] / metrics["accept_rate_total"]) == pytest.approx(chance, rel=1e-5)
    assert chance < 0.2
