"""Runs the parity gate at the end of a run: the checkpoint on prompts of the run's own data, in seconds.

It runs only if the run itself held the verifier: a run on stored states may be on a machine that cannot.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from speculators.data_generation import PreparedData
from speculators.evaluation.config import ParityConfig
from speculators.evaluation.parity import REPORT_NAME, ParityReport, check_parity
from speculators.train.config import TrainConfig

NUM_PROMPTS, MAX_PROMPT_TOKENS, MAX_TOKENS = 4, 64, 32
"""A wrong drafter shows within a few rounds."""


def run_gate(
    config: TrainConfig, verifier: str, checkpoint: Path, device: torch.device, loaded: PreTrainedModel | None = None
) -> ParityReport:
    """Verifies the checkpoint and writes the report beside its weights.

    `loaded`: the verifier, when the run was given it. One that is loaded here has the run's own precision on an
    accelerator: a second verifier in fp32 may not fit.
    """
    report = check_parity(
        ParityConfig(
            checkpoint=str(checkpoint),
            verifier=verifier,
            max_tokens=MAX_TOKENS,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            dtype="float32" if device.type == "cpu" else config.data.hidden_states_dtype,
            device=str(device),
            trust_remote_code=config.verifier.trust_remote_code,
        ),
        gate_prompts(config),
        verifier=loaded,
    )
    report.save(checkpoint / REPORT_NAME)
    return report


def gate_prompts(config: TrainConfig) -> list[list[int]]:
    """Returns the last rows of the data up to their first supervised token: the held-out ones, if there are any."""
    rows = PreparedData.open(config.data.data_path).dataset()
    last = rows.select(range(max(0, len(rows) - NUM_PROMPTS), len(rows)))
    return [prompt_of(row["input_ids"], row["loss_mask"]) for row in last]


def prompt_of(input_ids: list[int], loss_mask: list[int]) -> list[int]:
    first = next((index for index, mask in enumerate(loss_mask) if mask), len(input_ids))
    return list(input_ids[: max(first, 1)])
