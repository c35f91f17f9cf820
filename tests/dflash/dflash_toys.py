"""A tiny Llama verifier on disk and block drafters for it. Shapes: V 40, D 24, H 16, 6 verifier layers."""

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from speculators.interfaces import Committed, DraftSampling
from speculators.model import SpeculatorModel

VOCAB, DRAFT_VOCAB, HIDDEN, NUM_AUX = 40, 24, 16, 3
MASK_TOKEN = 39
MIXED = {"num_layers": 2, "nested": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}}
SLIDING = {"num_layers": 2, "nested": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}}


def save_verifier(path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(path)
    return path


def draft_maps():
    """t2d, d2t of 24 scattered ids."""
    kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(DRAFT_VOCAB)


def make_drafter(
    algorithm, verifier_path, *, num_layers=1, draft_vocab_size=DRAFT_VOCAB, seed=0, nested=None, noise=1.0, **arguments
):
    """A drafter with every weight random, so that each of them matters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen3",
        **{
            "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": num_layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 256,
            "use_sliding_window": True,  # else transformers forgets the window
            **(nested or {}),
        },
    )  # fmt: skip
    t2d, d2t = draft_maps() if draft_vocab_size != VOCAB else (None, None)
    arguments = {"block_size": 4, "mask_token_id": MASK_TOKEN, "target_layer_ids": [1, 3, 5], **arguments}
    model = SpeculatorModel.get_class(algorithm).from_training_args(
        config, t2d=t2d, d2t=d2t, draft_vocab_size=draft_vocab_size, verifier_name_or_path=str(verifier_path),
        **arguments,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            random = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
            parameter.data.copy_(1 + random if parameter.ndim == 1 else noise * random)
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
        "hidden_states": torch.randn(1, total, NUM_AUX * HIDDEN, generator=generator) * real[..., None],
        "verifier_last_hidden_states": torch.randn(1, total, HIDDEN, generator=generator) * real[..., None],
        "input_ids": torch.randint(0, VOCAB, (1, total), generator=generator) * real,
        "loss_mask": (torch.rand(1, total, generator=generator) < supervised).long() * real,
        "document_ids": document_ids,
        "position_ids": position_ids,
    }


def one_document(batch, start, length, padding):
    """The document at columns start .. of a packed row as a row of its own, with padding behind it."""
    alone = {}
    for key, value in batch.items():
        rows = value[:, start : start + length]
        fill = -1 if key == "document_ids" else 0
        alone[key] = torch.cat((rows, rows.new_full((1, padding, *rows.shape[2:]), fill)), dim=1)
    return alone


class Request:
    """Tokens and verifier states of one request, made up as it grows."""

    def __init__(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        self.states = torch.randn(300, NUM_AUX * HIDDEN, generator=generator)
        self.num_seen = 0

    def unseen(self):
        """(tokens, state that predicted each) not yet committed to the proposer."""
        start, self.num_seen = self.num_seen, len(self.tokens)
        states = [self.states[i - 1] if i else torch.zeros(NUM_AUX * HIDDEN) for i in range(start, len(self.tokens))]
        return self.tokens[start:], states

    def as_batch(self, drafts):
        """The training row of this request followed by `drafts`, states of tokens that have none zero; the last
        committed token is the only anchor that is drawn."""
        tokens = torch.tensor([*self.tokens, *drafts, *[0] * (len(drafts) + 2)])[None]
        num_known = len(self.tokens) - 1
        states = torch.zeros(1, tokens.shape[1], NUM_AUX * HIDDEN)
        states[0, :num_known] = self.states[:num_known]
        mask = torch.zeros_like(tokens)
        mask[0, num_known : num_known + len(drafts) + 1] = 1
        return {
            "hidden_states": states, "input_ids": tokens, "loss_mask": mask,
            "verifier_last_hidden_states": torch.zeros(1, tokens.shape[1], HIDDEN),
        }  # fmt: skip


def commit(requests, active=None):
    """A `Committed` of what each request emitted since; right padded with noise that must not matter."""
    fresh = [r.unseen() if active is None or active[b] else ([], []) for b, r in enumerate(requests)]
    width = max(len(tokens) for tokens, _ in fresh)
    token_ids = torch.zeros(len(requests), width, dtype=torch.int64)
    states = torch.randn(len(requests), width, NUM_AUX * HIDDEN) * 9
    for b, (tokens, rows) in enumerate(fresh):
        if tokens:
            token_ids[b, : len(tokens)] = torch.tensor(tokens)
            states[b, : len(rows)] = torch.stack(rows)
    counts = torch.tensor([len(tokens) for tokens, _ in fresh])
    return Committed(token_ids, states, counts, torch.tensor([len(r.tokens) for r in requests]))


def sampled(num_rows, temperature=1.0, seed=0):
    return DraftSampling(torch.full((num_rows,), temperature), torch.Generator().manual_seed(seed), probabilistic=True)
