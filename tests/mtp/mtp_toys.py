"""Tiny verifiers on disk and MTP drafters for them. Shapes: V 40, H 16, 3 verifier layers.

`qwen2` is a MiMo: its checkpoint holds an MTP layer as MiMo's does.
"""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from speculators.interfaces import Committed, DraftSampling
from speculators.models.mtp import MTPDraftModel

VOCAB, HIDDEN = 40, 16
MIMO_LAYER = "model.mtp_layers.0."


def save_verifier(arch, path):
    """Random weights, the final norm's far from one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        arch, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=256, tie_word_embeddings=arch == "llama",
        initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.norm.weight.data = 1 + 0.5 * torch.randn(HIDDEN)
    model.save_pretrained(path)
    if arch == "qwen2":
        add_mimo_layer(path)
    return path


def add_mimo_layer(path):
    tensors, layer = load_file(path / "model.safetensors"), "model.layers.0."
    size = tensors["model.norm.weight"].shape[0]
    ours = {MIMO_LAYER + k.removeprefix(layer): torch.randn_like(w) for k, w in tensors.items() if k.startswith(layer)}
    ours |= {MIMO_LAYER + f"{name}_layernorm.weight": torch.randn(size) for name in ("token", "hidden", "final")}
    ours[MIMO_LAYER + "input_proj.weight"] = torch.randn(size, 2 * size)
    save_file({**tensors, **ours}, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    values |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(values))


def make_drafter(verifier_path, *, seed=0, random=True, **arguments):
    """A drafter with every trained weight random, so that each of them matters."""
    config = AutoConfig.from_pretrained(verifier_path)
    model = MTPDraftModel.from_training_args(config, verifier_name_or_path=str(verifier_path), **arguments)
    torch.manual_seed(seed)
    for parameter in model.parameters() if random else ():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
            parameter.data.copy_(1 + noise if parameter.ndim == 1 else noise)
    return model


def packed_batch(lengths, seed=0, padding=0, supervised=0.7):
    """A packed row as the trainer gives it: documents of the given lengths, then padding."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    document_ids = torch.full((1, total), -1)
    position_ids = torch.zeros(1, total, dtype=torch.int64)
    start = 0
    for i, length in enumerate(lengths):
        document_ids[0, start : start + length] = i
        position_ids[0, start : start + length] = torch.arange(length)
        start += length
    real = document_ids != -1
    return {
        "hidden_states": torch.randn(1, total, HIDDEN, generator=generator) * real[..., None],
        "input_ids": torch.randint(0, VOCAB, (1, total), generator=generator) * real,
        "loss_mask": (torch.rand(1, total, generator=generator) < supervised).long() * real,
        "document_ids": document_ids,
        "position_ids": position_ids,
    }


class Request:
    """Tokens and verifier states of one request, made up as it grows."""

    def __init__(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        self.states = torch.randn(200, HIDDEN, generator=generator)
        self.num_seen = 0

    def unseen(self):
        """(tokens, state that predicted each) not yet committed to the proposer."""
        start, self.num_seen = self.num_seen, len(self.tokens)
        states = [self.states[i - 1] if i else torch.zeros(HIDDEN) for i in range(start, len(self.tokens))]
        return self.tokens[start:], states


def commit(requests, active=None):
    """A `Committed` of what each request emitted since; right padded with noise that must not matter."""
    fresh = [r.unseen() if active is None or active[b] else ([], []) for b, r in enumerate(requests)]
    width = max(len(tokens) for tokens, _ in fresh)
    token_ids = torch.zeros(len(requests), width, dtype=torch.int64)
    states = torch.randn(len(requests), width, HIDDEN) * 9
    for b, (tokens, rows) in enumerate(fresh):
        if tokens:
            token_ids[b, : len(tokens)] = torch.tensor(tokens)
            states[b, : len(rows)] = torch.stack(rows)
    counts = torch.tensor([len(tokens) for tokens, _ in fresh])
    return Committed(token_ids, states, counts, torch.tensor([len(r.tokens) for r in requests]))


def sampled(num_rows, temperature=1.0):
    return DraftSampling(torch.full((num_rows,), temperature), torch.Generator().manual_seed(0), probabilistic=True)
