"""What the tests of the drafters share that read the last state alone: rows, and loops over the formulas of the loss.

Shapes: V 40, H 16.
"""

import torch
import torch.nn.functional as F
from drafter_toys import HIDDEN, VOCAB, save_llama

EPS = 1e-4


def save_verifier(path):
    """Random weights, the final norm's far from one."""
    return save_llama(path, num_layers=2, norm_noise=0.5, intermediate_size=24, eos_token_id=None, rms_norm_eps=EPS)


def randomise_trained(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.5)


def packed_batch(lengths, seed=0, padding=0, supervised=0.7):
    """A packed row as the trainer gives it: documents of the given lengths, then padding (with noise in it)."""
    generator = torch.Generator().manual_seed(seed)
    documents = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    total = len(documents)
    return {
        "hidden_states": torch.randn(1, total, HIDDEN, generator=generator),
        "input_ids": torch.randint(0, VOCAB, (1, total), generator=generator),
        "loss_mask": (torch.rand(1, total, generator=generator) < supervised).long(),
        "document_ids": torch.tensor([documents]),
    }


def normed(state, weight):
    return weight * state / (state.pow(2).mean() + EPS).sqrt()


class NaiveHeads:
    """One (head, column) at a time, in double precision. Subclasses say what a head answers."""

    num_heads: int

    def __init__(self, model):
        self.w = {name: t.detach().double().clone() for name, t in model.state_dict().items()}
        for name, tensor in self.w.items():
            tensor.requires_grad_(not name.startswith("verifier"))

    def logits(self, head, state, tokens):
        """After `tokens`: the one that follows the state's and the `head` further ones."""
        raise NotImplementedError

    def verifier_logits(self, state):
        return self.w["verifier_lm_head.weight"] @ normed(state.double(), self.w["verifier_norm.weight"])

    def loss(self, batch, decay, hard):
        """(loss, {(head, column): whether its best token is the target's})"""
        tokens, mask, documents = (batch[key][0].tolist() for key in ("input_ids", "loss_mask", "document_ids"))
        states, total, correct = batch["hidden_states"][0], 0.0, {}
        for head in range(self.num_heads):
            losses = []
            for t in range(len(tokens)):
                target = t + 2 + head
                if target >= len(tokens) or documents[t] == -1 or documents[t] != documents[target] or not mask[target]:
                    continue
                logits = self.logits(head, states[t], tokens[t + 1 : target])
                p = F.one_hot(torch.tensor(tokens[target]), VOCAB).double()
                if not hard:
                    p = self.verifier_logits(states[target - 1]).softmax(-1)
                entropy = (p * p.clamp_min(1e-300).log()).sum()
                losses.append(entropy - (p * logits.log_softmax(-1)).sum())
                correct[head, t] = bool(logits.argmax() == p.argmax())
            total = total + decay**head * sum(losses) / len(losses)
        return total, correct


def check_loss_and_gradients(model, naive, batch, decay, loss_fn):
    """Those of the loops; (which best tokens are the target's, the model's metrics)."""
    expected, correct = naive.loss(batch, decay, hard=loss_fn == "ce")
    expected.backward()
    kwargs, _ = model.get_trainer_kwargs(loss_fn=loss_fn, head_weight_decay=decay, lr=1.0)
    logits, loss, metrics = model(**batch, **kwargs)
    loss.backward()
    assert logits == []
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), naive.w[name].grad, atol=1e-5, rtol=1e-4, msg=name)
        else:
            assert name.startswith("verifier") and parameter.grad is None
    return correct, metrics


def check_that_documents_add_up(model):
    """The sums of a packed row are those of its documents alone."""
    lengths = [9, 6, 3, 8]
    batch = packed_batch(lengths, seed=2, padding=4, supervised=0.9)
    packed, start = model(**batch)[2], 0
    sums = dict.fromkeys([f"{name}_{k}_sum" for name in ("loss", "full_acc", "cond_acc") for k in range(3)], 0.0)
    for length in lengths:
        alone = model(**{key: value[:, start : start + length] for key, value in batch.items()})[2]
        sums = {key: value + alone[key] for key, value in sums.items()}
        start += length
    for key, value in sums.items():
        torch.testing.assert_close(packed[key], value)


def check_that_nothing_to_learn_has_loss_zero(make_drafter):
    for batch in (packed_batch([1]), packed_batch([2], padding=3), packed_batch([9], supervised=0.0)):
        model = make_drafter()
        loss = model(**batch)[1]
        loss.backward()
        assert loss == 0 and all(bool(p.grad.eq(0).all()) for p in model.parameters() if p.requires_grad)


def check_that_bfloat16_stays_close(model):
    batch = packed_batch([20, 30], seed=5)
    exact = model(**batch)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch)[1]
    rounded.backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.03, atol=0.03)
