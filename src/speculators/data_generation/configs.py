"""Defines the presets, such as `--data ultrachat` (where the rows are and how they become conversations), and the
defaults of preparing and regenerating. Imports nothing heavy: the command's help reads it.

No preset is on-policy for your verifier: regenerate the responses (`regenerate_responses`) for a better drafter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DEFAULT_OUTPUT = "./output"
DEFAULT_SEQ_LENGTH = 8192
"""Tokens of the longest row."""
DEFAULT_ANSWER_TOKENS = 1024
"""Longest regenerated answer."""
DEFAULT_ANSWERED_TOGETHER = 32
"""Conversations that one batch answers."""
DEFAULT_STATES_DIRECTORY = Path(tempfile.gettempdir()) / "hidden_states"
"""Where `launch-vllm` has a server write its files unless told otherwise, and where they are looked for."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Describes one data set of the Hugging Face hub."""

    name: str
    hf_path: str
    subset: str | None = None
    split: str
    filter_fn: Callable[[Row], bool] | None = None
    """Rows for which this is False are left out (and counted)."""
    normalize_fn: Callable[[Row], Row] | None = None
    """Turns a raw row into one with `conversations`. None: the rows already have that column."""
    prompt_field: str | None = None
    """Column that holds the bare prompt, for regeneration; None: the first user turn is the prompt."""


def question_and_answer(row: Row) -> Row:
    return {"conversations": [turn("user", row["question"]), turn("assistant", row["answer"])]}


def input_and_output(row: Row) -> Row:
    """Reads rows whose `input` is a list of messages (or one prompt) and whose `output` is the response."""
    prompt = row["input"]
    messages = [turn("user", prompt)] if isinstance(prompt, str) else list(prompt)
    return {"conversations": [*messages, turn("assistant", row["output"])]}


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


DATASET_CONFIGS: dict[str, DatasetConfig] = {
    config.name: config
    for config in (
        DatasetConfig(name="sharegpt", hf_path="Aeala/ShareGPT_Vicuna_unfiltered", split="train"),
        DatasetConfig(
            name="ultrachat", hf_path="HuggingFaceH4/ultrachat_200k", split="train_sft", prompt_field="prompt"
        ),
        DatasetConfig(
            name="gsm8k",
            hf_path="openai/gsm8k",
            subset="main",
            split="train",
            normalize_fn=question_and_answer,
            prompt_field="question",
        ),
        DatasetConfig(
            name="magpie",
            hf_path="Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered",
            split="train",
            prompt_field="instruction",
        ),
        DatasetConfig(
            name="nemotron",
            hf_path="nvidia/Llama-Nemotron-Post-Training-Dataset",
            subset="SFT",
            split="chat",
            normalize_fn=input_and_output,
        ),
        # Rows with images are dropped and counted: only text is tokenised.
        DatasetConfig(name="sharegpt4v_coco", hf_path="Lin-Chen/ShareGPT4V", subset="ShareGPT4V", split="train"),
        DatasetConfig(name="open-perfectblend", hf_path="mlabonne/open-perfectblend", split="train"),
        DatasetConfig(
            name="hermes-fc", hf_path="NousResearch/hermes-function-calling-v1", subset="func_calling", split="train"
        ),
    )
}
