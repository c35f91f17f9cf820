"""The verifiers that `decode.py` decodes with, each with prompts: the embedded one, and a random Llama of 12 layers."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from speculators.assets import prompts_path, tiny_verifier_path
from speculators.verifier import load_verifier

Prompts = list[list[int]]
DRAFT_LAYERS = 3
"""First layers of a verifier that draft for it."""
PROMPT_TOKENS = 64


def embedded() -> tuple[PreTrainedModel, Prompts]:
    path = str(tiny_verifier_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = []
    with open(prompts_path("heldout")) as lines:
        for line in lines:
            turns = [turn for turn in json.loads(line)["conversations"] if turn["role"] != "assistant"][:1]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
            prompts.append(list(ids))
    return load_verifier(path, dtype=torch.float32), prompts


def random_512() -> tuple[PreTrainedModel, Prompts]:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(5, 8192, (16, PROMPT_TOKENS), generator=generator).tolist()


MODELS: dict[str, Callable[[], tuple[PreTrainedModel, Prompts]]] = {"embedded": embedded, "random-512": random_512}
