"""What the tests of the drafters share: sizes, a verifier on disk, random weights, requests that grow as a test says.

Shapes: V 40, D 24, H 16; aux layers * H where a drafter reads several states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from speculators.decoding import Engine, SamplingParams
from speculators.interfaces import Committed, DraftSampling, Proposer
from speculators.train.config import TrainConfig
from speculators.train.events import Event, StepDone
from speculators.train.records import TrainResult
from speculators.train.run import train

VOCAB, DRAFT_VOCAB, HIDDEN = 40, 24, 16
LONGEST = 300


def save_llama(path: Path, *, num_layers: int, norm_noise: float = 0.0, **sizes: Any) -> Path:
    """A random verifier; `norm_noise` takes its final norm away from one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 32,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.3,
            **sizes,
        }
    )
    model = LlamaForCausalLM(config).eval()
    model.model.norm.weight.data += norm_noise * torch.randn(HIDDEN)
    model.save_pretrained(path)
    return path


def decoder_config(arch: str, **sizes: Any) -> PretrainedConfig:
    """The drafter's layers, as training gets them."""
    return AutoConfig.for_model(
        arch,
        **{
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "max_position_embeddings": 256,
            "pad_token_id": None,
            **sizes,
        },
    )


def randomise(model: Any, *, matrix_scale: float = 1.0, left_out: Sequence[str] = ()) -> None:
    """Every trained weight, so that each of them matters: norms about one, matrices that keep the scale of a state."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in left_out:
            noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
            parameter.data.copy_(1 + noise if parameter.ndim == 1 else matrix_scale * noise)


def draft_maps() -> tuple[Tensor, Tensor]:
    """t2d, d2t of 24 scattered ids."""
    kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(DRAFT_VOCAB)


def packed_row(
    lengths: Sequence[int],
    *,
    num_aux: int = 1,
    first_position: int = 0,
    seed: int = 0,
    padding: int = 0,
    supervised: float = 0.7,
) -> dict[str, Tensor]:
    """A packed row as the trainer gives it: documents of the given lengths, then padding."""
    generator = torch.Generator().manual_seed(seed)
    document_ids = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding])
    positions = [p for n in lengths for p in range(first_position, first_position + n)]
    total, real = document_ids.shape[1], document_ids != -1
    return {
        "hidden_states": torch.randn(1, total, num_aux * HIDDEN, generator=generator) * real[..., None],
        "verifier_last_hidden_states": torch.randn(1, total, HIDDEN, generator=generator) * real[..., None],
        "input_ids": torch.randint(0, VOCAB, (1, total), generator=generator) * real,
        "loss_mask": (torch.rand(1, total, generator=generator) < supervised).long() * real,
        "document_ids": document_ids,
        "position_ids": torch.tensor([positions + [0] * padding]),
    }


class Request:
    """Tokens and verifier states of one request, made up as it grows."""

    def __init__(self, seed: int, length: int, num_aux: int = 1):
        generator = torch.Generator().manual_seed(seed)
        self.tokens: list[int] = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        self.states = torch.randn(LONGEST, num_aux * HIDDEN, generator=generator)
        self.num_seen = 0

    def unseen(self) -> tuple[list[int], list[Tensor]]:
        """(tokens, state that predicted each) not yet committed to the proposer."""
        start, self.num_seen = self.num_seen, len(self.tokens)
        states = [self.states[i - 1] if i else torch.zeros_like(self.states[0]) for i in range(start, len(self.tokens))]
        return self.tokens[start:], states


def commit(requests: Sequence[Request], active: Sequence[bool] | None = None) -> Committed:
    """What each request emitted since; right padded with noise that must not matter."""
    fresh = [r.unseen() if active is None or active[b] else ([], []) for b, r in enumerate(requests)]
    width = max(len(tokens) for tokens, _ in fresh)
    token_ids = torch.zeros(len(requests), width, dtype=torch.int64)
    states = torch.randn(len(requests), width, requests[0].states.shape[1]) * 9
    for b, (tokens, rows) in enumerate(fresh):
        if tokens:
            token_ids[b, : len(tokens)] = torch.tensor(tokens)
            states[b, : len(rows)] = torch.stack(rows)
    counts = torch.tensor([len(tokens) for tokens, _ in fresh])
    return Committed(token_ids, states, counts, torch.tensor([len(r.tokens) for r in requests]))


def sampled(num_rows: int, temperature: float = 1.0, seed: int = 0) -> DraftSampling:
    return DraftSampling(torch.full((num_rows,), temperature), torch.Generator().manual_seed(seed), probabilistic=True)


PROMPTS = [[5, 9, 3], [7] * 12, [1, 2]]


def check_greedy_text(verifier: PreTrainedModel, engine: Engine, prompts: Sequence[list[int]] = PROMPTS) -> None:
    """The engine drafts, and its greedy text is that of the verifier alone."""
    greedy = SamplingParams(max_tokens=24, ignore_eos=True)
    plain = Engine(verifier, max_batch_size=engine.max_batch_size).generate(prompts, greedy)
    drafted = engine.generate(prompts, greedy)
    assert [output.token_ids for output in drafted] == [output.token_ids for output in plain]
    assert sum(output.stats.num_drafted for output in drafted) > 0


def check_that_drafts_follow_q(proposer: Proposer, request: Request, num_tokens: int) -> None:
    """20,000 last drafts of one row against its own q: chi-squared below the 99.99 % point of its 23 degrees."""
    committed = commit([request])
    columns = [committed.token_ids_BT, committed.states_BTD, committed.num_new_B, committed.num_committed_B]
    many = Committed(*(column.expand(2000, *column.shape[1:]) for column in columns))
    drawing = DraftSampling(torch.full((2000,), 0.7), torch.Generator().manual_seed(1), probabilistic=True)
    counts = torch.zeros(VOCAB)
    for _ in range(10):
        proposal = proposer.propose(many, num_tokens, drawing)
        counts += torch.bincount(proposal.token_ids_BK[:, -1], minlength=VOCAB)
    assert proposal.probs_BKV is not None
    expected = proposal.probs_BKV[0, -1] * 20_000
    inside = expected > 0
    assert counts[~inside].sum() == 0 and inside.sum() == DRAFT_VOCAB
    assert ((counts - expected)[inside] ** 2 / expected[inside]).sum() < 58.0


def train_on_counting(folder: Path, speculator_type: str, verifier: Path, **flags: Any) -> tuple[TrainResult, float]:
    """Train by the command line on a language of counting; the result, and the last loss as a share of the first."""
    rows = [[(start + stride * i) % VOCAB for i in range(20)] for start in range(6) for stride in (1, 3)]
    data = [{"input_ids": ids, "loss_mask": [0] * 3 + [1] * 17, "seq_len": 20} for ids in rows]
    Dataset.from_list(data).save_to_disk(folder / "data")
    settings = {
        "speculator_type": speculator_type,
        "verifier_name_or_path": verifier,
        "data_path": folder / "data",
        "save_path": folder / "run",
        "total_seq_len": 128,
        "epochs": 15,
        "lr": 0.01,
        "train_data_ratio": 1.0,
        "hidden_states_dtype": "float32",
        **flags,
    }
    argv = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    losses = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.metrics["loss"])

    result = train(TrainConfig.resolve(argv), on_event=listen)
    return result, sum(losses[-3:]) / sum(losses[:3])
