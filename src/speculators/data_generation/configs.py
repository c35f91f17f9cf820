"""Defines the presets, such as `--data ultrachat` (where the rows are and how they become conversations), and the
defaults of preparing and regenerating. Imports nothing heavy: the command's help reads it.

No preset is on-policy for your verifier: regenerate the responses (`regenerate_responses`) for a better drafter.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.data_generation.vllm_client import DEFAULT_ENDPOINT, DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT_S
from speculators.utils.names import did_you_mean, did_you_mean_path, refuse_missing_path, refusing_unknown

Row = dict[str, Any]
ROWS_WORTH_A_WORKER = 2000
"""Below this many raw rows another process costs more than it saves."""
DEFAULT_OUTPUT = "./output"
DEFAULT_SEQ_LENGTH = 8192
"""Tokens of the longest row."""
DEFAULT_SHOWN_ROWS = 3
"""Rows that `inspect-mask` shows."""
DEFAULT_ANSWER_TOKENS = 1024
"""Longest regenerated answer."""
DEFAULT_ANSWER_TIMEOUT_S = 600.0
"""A server answers when the last token is there."""
DEFAULT_ANSWER_RETRIES = 8
"""Waits of about three minutes in all: a server that is started again is back by then."""
DEFAULT_STATES_DIRECTORY = Path(tempfile.gettempdir()) / "hidden_states"
"""Where `launch-vllm` has a server write its files unless told otherwise, and where they are looked for."""
DEFAULT_CONCURRENCY = 32
"""Requests at a time to a server that extracts hidden states."""
DEFAULT_RECOMPUTED = 8
"""Stored samples that `store verify` computes anew."""
DEFAULT_SEED = 0
"""Order of prepared rows; draws of regenerated answers."""


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


@dataclass(frozen=True)
class TokenizeOptions:
    """Settings that decide how a raw row becomes training rows."""

    seq_length: int
    minimum_valid_tokens: int = 1
    """Rows with fewer supervised tokens in the window are dropped."""
    vocab_size: int | None = None
    """Pre-tokenised ids must be below it; None = not known."""
    merge_turns: bool = False
    """One row for several turns of a conversation where the earlier row is a prefix of the later one."""

    def __post_init__(self) -> None:
        if self.seq_length < 2:
            raise ValueError(f"seq_length={self.seq_length}; a row needs a context token and a supervised one: >= 2")
        if self.minimum_valid_tokens < 0:
            raise ValueError(f"minimum_valid_tokens={self.minimum_valid_tokens} is negative; 1 or more is useful")


@refusing_unknown
@dataclass(frozen=True, kw_only=True)
class RegenerateConfig:
    """Settings of `regenerate_responses`: which prompts are answered, how often, and what the rows of answers hold."""

    limit: int | None = None
    """Most conversations; None: all of the source."""
    num_samples: int = 1
    """Answers per prompt, each from a seed of its own."""
    prompt_field: str | None = None
    """Column of the prompts; None: it is recognised (messages, prompt, question, ...)."""
    batch_size: int = 32
    """Conversations answered together."""
    temperatures: Sequence[float] = ()
    """Each conversation (and sample) draws one; none: all have that of the sampling settings."""
    system_prompts: Sequence[str] = ()
    """Each conversation (and sample) without a system turn draws one."""
    drop_reasoning: bool = False
    """Thoughts stay in the rows as context and are not trained on."""
    resume: bool = False
    """Completes an output that exists and was made by the same recipe."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the chat template."""


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


FORMS = (
    "a .json, .jsonl or .parquet file, a directory of them or of a saved dataset, hf:<id>[:<subset>][:<split>], "
    f"hf://datasets/<org>/<repo>/<file>, or a preset ({', '.join(DATASET_CONFIGS)})"
)


def refuse_missing_source(source: str) -> None:
    """Raises `ValueError` for conversations that are neither here, nor a preset, nor said to be on the hub."""
    if not source.startswith("hf:") and source not in DATASET_CONFIGS and not Path(source).expanduser().exists():
        hint = did_you_mean(source, DATASET_CONFIGS) or did_you_mean_path(source)
        raise ValueError(f"data {source!r} does not exist and is no preset.{hint} Please give {FORMS}")


def is_prepared(path: Path) -> bool:
    return (path / "state.json").is_file()


def refuse_unprepared(path: Path) -> None:
    """Raises `ValueError` for what is not a directory that `prepare_data` wrote."""
    refuse_missing_path(path, "the prepared dataset", "make it with prepare-data, or name another by --data")
    if not is_prepared(path):
        raise ValueError(f"{str(path)!r} is not a prepared dataset (no state.json); make one with prepare-data")


def refuse_missing_states(path: Path) -> None:
    """Raises `ValueError` when there is no such directory of hidden states."""
    refuse_missing_path(path, "the directory of hidden states", "write it with generate-offline-data")


DEFAULT_SHARD_SIZE = "1GiB"
STATES_DTYPES = ("bfloat16", "float16", "float32", "fp8")
"""Types in which hidden states are stored; fp8 is float8_e4m3fn with one scale per token."""


BYTES_OF_UNIT = {"": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}}
BYTES_OF_UNIT |= {f"{prefix}IB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)}


def parse_bytes(text: str) -> int:
    """Reads a number of bytes: "500GB", "1.5 TB", "1GiB". Raises `ValueError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = None if found is None else BYTES_OF_UNIT.get(found[2].upper())
    if found is None or unit is None:
        raise ValueError(f"{text!r} is no number of bytes; write 500GB, 1.5TB or 1GiB")
    return int(float(found[1]) * unit)


DEFAULT_SHARD_BYTES = parse_bytes(DEFAULT_SHARD_SIZE)


@dataclass(frozen=True)
class OfflineConfig:
    """Settings of `generate_offline_data`: source, target, and what to do when a row fails."""

    preprocessed_data: str
    in_process: bool = False
    """Loads the verifier in this process; otherwise a server extracts."""
    endpoint: str = DEFAULT_ENDPOINT
    server_states_path: str = str(DEFAULT_STATES_DIRECTORY)
    """Directory that the server writes to; its files are read and deleted there and nowhere else."""
    output: str | None = None
    """None: beside the prepared data, where `train` looks."""
    model: str | None = None
    """The model that the server must serve, which is only checked; in process, the one that is loaded (None: the one
    that the data was prepared for)."""
    target_layer_ids: tuple[int, ...] | None = None
    """Layers that the server extracts if `launch-vllm` did not start it, or in process those to extract (None: 2, n//2,
    n-3 and the last of n layers); the last layer at the end."""
    max_samples: int | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    validate_outputs: bool = False
    """Reads existing states in full, and replaces damaged ones. Otherwise reads only the index."""
    request_timeout_s: float = DEFAULT_TIMEOUT_S
    max_retries: int = DEFAULT_MAX_RETRIES
    fail_on_error: bool = False
    max_consecutive_errors: int | None = None
    """Ends the run after so many failed rows in sequence; None: `concurrency`."""
    world_size: int = 1
    rank: int = 0
    """Several machines share the rows: this one is number `rank` of `world_size`."""
    states_dtype: str | None = None
    """One of `STATES_DTYPES`; None: the type in which the states come."""
    last_states: str = "all"
    """"supervised": last states only where a target is made of them. Not for drafters that read them as input."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    max_disk_bytes: int | None = None
    """Cap of the store: the oldest shards make room for new ones. None: as much as it takes."""
    dtype: str = "bfloat16"
    """In process: precision of the verifier, the default of training. float32 is faster on many CPUs."""
    device: str = "auto"
    batch_tokens: int | None = None
    """In process: most tokens of a forward. None: by device; a CPU is fastest with a row at a time."""
    trust_remote_code: bool = False


def default_num_workers(num_rows: int) -> int:
    auto = max(1, min(128, math.floor(0.75 * (os.cpu_count() or 1)) // 4))
    return max(1, min(auto, num_rows // ROWS_WORTH_A_WORKER))
