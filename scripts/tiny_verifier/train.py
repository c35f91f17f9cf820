"""Training of the verifier: a shallow model first, then the same function in a deep one.

Shapes: N rows, T tokens a row. Most of the training is done with `start_layers` layers; then every layer is followed by
copies of itself whose output projections are zero. The grown model computes the same function and learns on, at a
fraction of the cost of training all layers from the first step. Weights are held in float32 and computed in bfloat16.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tiny_verifier.repetition import repetition_loss
from tiny_verifier.tokenizer import PreTrainedTokenizerFast, render


@dataclass(frozen=True)
class ModelShape:
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 12
    num_heads: int = 8
    num_kv_heads: int = 2
    intermediate_size: int = 512
    max_positions: int = 1024


@dataclass(frozen=True)
class TrainConfig:
    init: str = ""
    """Folder of a model to continue at its own depth; empty starts with a shallow one that is grown."""
    num_tokens: int = 13_000_000
    """Tokens seen in all, about twice the corpus."""
    start_layers: int = 4
    grow_at: float = 0.75
    """Share of the tokens after which the model is grown to its full depth."""
    rows_per_step: int = 16
    row_length: int = 512
    rows_joined: int = 2
    """After growing, so many rows make one, so that later positions are learnt too."""
    learning_rate: float = 5e-3
    """Of Muon (matrices, updates scaled to the size of Adam's) and, times the factor below, of AdamW (all the rest)."""
    embedding_factor: float = 0.75
    weight_decay: float = 0.05
    warmup_steps: int = 40
    decay_share: float = 0.4
    """The last share of the tokens, over which the learning rate falls to zero."""
    repetition_weight: float = 0.0
    """Of the penalty on loops in the model's own greedy text (repetition.py); for a last phase, it costs generation."""
    num_repetition_prompts: int = 16
    num_repetition_tokens: int = 120
    num_evaluation_rows: int = 64
    steps_between_checkpoints: int = 200
    seed: int = 20
    compile: bool = False
    device: str = "auto"


def pack(tokenizer: PreTrainedTokenizerFast, documents: list, row_length: int, num_open: int = 64) -> np.ndarray:
    """tokens_NT: rows of whole documents, padded; longer ones are cut. Each piece goes into the fullest open row."""
    closed: list[list[int]] = []
    open_rows: list[list[int]] = []
    texts = [render(tokenizer, document) for document in documents]
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        for start in range(0, len(ids), row_length):
            piece = ids[start : start + row_length]
            fitting = [row for row in open_rows if len(row) + len(piece) <= row_length]
            if fitting:
                max(fitting, key=len).extend(piece)
                continue
            open_rows.append(list(piece))
            if len(open_rows) > num_open:
                fullest = max(range(len(open_rows)), key=lambda i: len(open_rows[i]))
                closed.append(open_rows.pop(fullest))
    rows = closed + open_rows
    tokens_NT = np.full((len(rows), row_length), tokenizer.pad_token_id, dtype=np.uint16)
    for row, ids in zip(tokens_NT, rows, strict=True):
        row[: len(ids)] = ids
    return tokens_NT


def build_model(shape: ModelShape, num_layers: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def first_model(shape: ModelShape, config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    if config.init:
        return LlamaForCausalLM.from_pretrained(config.init, dtype=torch.float32)
    return build_model(shape, config.start_layers, tokenizer)


def grown(model: LlamaForCausalLM, deep: LlamaForCausalLM) -> LlamaForCausalLM:
    """`deep` with the weights of `model`, computing the same function."""
    deep.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(model.model.norm.state_dict())
    times = len(deep.model.layers) // len(model.model.layers)
    for i, layer in enumerate(deep.model.layers):
        layer.load_state_dict(model.model.layers[i // times].state_dict())
        if i % times:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep


Penalty = Callable[[LlamaForCausalLM], torch.Tensor | None]


def loop_penalty(prompts: list[str], tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> Penalty | None:
    """The penalty over other prompts each time it is called; None if it is not wanted."""
    if not config.repetition_weight:
        return None
    rng = random.Random(config.seed)

    def penalty(model: LlamaForCausalLM) -> torch.Tensor | None:
        drawn = rng.sample(prompts, config.num_repetition_prompts)
        return repetition_loss(model, tokenizer, drawn, config.num_repetition_tokens)

    return penalty


class Stepper:
    """A bfloat16 model for the arithmetic, float32 copies of its weights for the optimisers."""

    def __init__(self, model: LlamaForCausalLM, config: TrainConfig):
        self.model, self.config = model.to(torch.bfloat16), config
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float().requires_grad_() for weight in self.weights]
        names = [name for name, _ in model.named_parameters()]
        is_matrix = [weight.ndim == 2 and "embed" not in name for name, weight in zip(names, self.weights, strict=True)]
        matrices = [m for m, matrix in zip(self.masters, is_matrix, strict=True) if matrix]
        others = [m for m, matrix in zip(self.masters, is_matrix, strict=True) if not matrix]
        decay = config.weight_decay
        self.muon = torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw", momentum=0.95)
        self.adam = torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
        self.loss = torch.compile(self.batch_loss) if config.compile else self.batch_loss

    def batch_loss(self, ids_NT: torch.Tensor) -> torch.Tensor:
        hidden_NTH = self.model.model(input_ids=ids_NT[:, :-1], use_cache=False).last_hidden_state
        logits = functional.linear(hidden_NTH.flatten(0, 1), self.model.lm_head.weight).float()
        pad = self.model.config.pad_token_id
        labels_NT = ids_NT[:, 1:].clone()
        # The first padding token after a document is its end mark and is learnt, the ones after it are filler.
        labels_NT[(labels_NT == pad) & (ids_NT[:, :-1] == pad)] = -100
        return functional.cross_entropy(logits, labels_NT.flatten())

    def step(self, ids_NT: torch.Tensor, learning_rate: float, penalty: Penalty | None = None) -> tuple[float, float]:
        """One update; returns the language-model loss and the penalty on loops."""
        loss = self.loss(ids_NT)
        loss.backward()
        extra = penalty(self.model) if penalty else None
        if extra is not None:
            (self.config.repetition_weight * extra).backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimiser, factor in ((self.muon, 1.0), (self.adam, self.config.embedding_factor)):
            optimiser.param_groups[0]["lr"] = learning_rate * factor
            optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.item(), 0.0 if extra is None else extra.item()

    @torch.no_grad()
    def full_precision_model(self) -> LlamaForCausalLM:
        """The model with the weights that the optimisers hold."""
        model = self.model.float()
        for weight, master in zip(model.parameters(), self.masters, strict=True):
            weight.copy_(master)
        return model


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup_steps)
    left = (num_steps - step) / (num_steps * config.decay_share)
    return config.learning_rate * min(warm, 1.0, left)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens_NT: torch.Tensor, rows_per_step: int) -> float:
    """Nats a token over `tokens_NT`, all tokens but the filler."""
    pad, device = model.config.pad_token_id, model.device
    total, number = 0.0, 0
    for ids_NT in tokens_NT.split(rows_per_step):
        ids_NT = ids_NT.to(device)
        logits = model(input_ids=ids_NT[:, :-1], use_cache=False).logits.float()
        labels_NT = ids_NT[:, 1:].clone()
        labels_NT[(labels_NT == pad) & (ids_NT[:, :-1] == pad)] = -100
        total += functional.cross_entropy(logits.flatten(0, 1), labels_NT.flatten(), reduction="sum").item()
        number += int((labels_NT != -100).sum())
    return total / max(number, 1)


def train(
    train_NT: np.ndarray,
    heldout_NT: np.ndarray,
    prompts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    shape: ModelShape,
    config: TrainConfig,
    report: Callable[[int, int, str], None],
    checkpoint: Path,
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """`report(step, num_steps, line)` is called after every step. Returns the model and its final figures."""
    torch.manual_seed(config.seed)
    device = torch.device(pick_device(config.device))
    num_steps = config.num_tokens // (config.rows_per_step * config.row_length)
    grow_step = int(num_steps * config.grow_at) if not config.init else -1
    stepper = Stepper(first_model(shape, config, tokenizer).to(device), config)
    rows = torch.from_numpy(train_NT.astype(np.int64))
    order, begin, average = torch.randperm(len(rows)), time.monotonic(), math.nan
    heldout = torch.from_numpy(heldout_NT[: config.num_evaluation_rows].astype(np.int64))
    penalty, penalties = loop_penalty(prompts, tokenizer, config), 0.0
    used, joined = 0, config.rows_joined if config.init else 1
    for step in range(num_steps):
        if step == grow_step:
            deep = build_model(shape, shape.num_layers, tokenizer).to(device)
            stepper = Stepper(grown(stepper.full_precision_model(), deep), config)
            joined = config.rows_joined
        if used + config.rows_per_step > len(order):
            order, used = torch.randperm(len(rows)), 0
        batch = rows[order[used : used + config.rows_per_step]].to(device).view(-1, joined * config.row_length)
        used += config.rows_per_step
        loss, extra = stepper.step(batch, learning_rate(step, num_steps, config), penalty)
        penalties = 0.9 * penalties + 0.1 * extra
        average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
        rate = (step + 1) * batch.numel() / (time.monotonic() - begin)
        line = f"loss {average:.3f}  {rate:,.0f} tok/s  {len(stepper.model.model.layers)} layers"
        report(step + 1, num_steps, line + (f"  loops {penalties:.3f}" if penalty else ""))
        if (step + 1) % config.steps_between_checkpoints == 0:
            stepper.model.save_pretrained(checkpoint)
            heldout_loss = evaluate(stepper.model, heldout, config.rows_per_step)
            report(step + 1, num_steps, f"held-out loss {heldout_loss:.3f}")
    model = stepper.model.eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    figures = {
        "train_loss": evaluate(model, rows[: config.num_evaluation_rows], config.rows_per_step),
        "heldout_loss": evaluate(model, heldout, config.rows_per_step),
        "seconds": time.monotonic() - begin,
        "steps": num_steps,
    }
    return model, figures


def pick_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
