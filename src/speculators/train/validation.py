"""Decodes held-out prompts with the drafter in training: the acceptance length that serving would have now. Accuracies
are of one forward over the verifier's own text and flatter: there every draft before is right.

    row of the validation split   p0 p1 .. pn | a0 a1 ..     prompt: up to the first supervised token

At the end of a run the parity gate decodes such prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from speculators.data_generation import PreparedData
from speculators.evaluation.config import ParityConfig
from speculators.evaluation.measurement import decode_greedily
from speculators.evaluation.parity import REPORT_NAME, ParityReport, check_parity, recorded_num_tokens
from speculators.model import SpeculatorModel
from speculators.train.config import TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.events import DECODED
from speculators.verifier import turn_of

MAX_TOKENS = 64
"""Longest answer: validation is to cost little beside the epoch before it."""
NUM_GATE_PROMPTS, MAX_GATE_PROMPT_TOKENS, MAX_GATE_TOKENS = 4, 64, 32
"""A wrong drafter shows within a few rounds."""


@dataclass(frozen=True)
class PromptDecoder:
    """Decodes the same prompts greedily in every validation. Training goes on as if nothing had been decoded."""

    verifier: PreTrainedModel
    prompts: Sequence[list[int]]
    """Of all ranks; each decodes a share of them."""

    @classmethod
    def of(cls, model: SpeculatorModel, verifier: PreTrainedModel, rows: Dataset, num_prompts: int) -> PromptDecoder:
        """Takes the first `num_prompts` rows. Raises `ValueError` when the algorithm cannot draft."""
        if type(model).make_proposer is SpeculatorModel.make_proposer:
            name = model.config.speculators_model_type
            raise ValueError(
                f"--eval-prompts {num_prompts}: '{name}' can only be trained, it has no make_proposer; leave it out"
            )
        return cls(verifier, prompts_of(rows.select(range(min(num_prompts, len(rows))))))

    def measure(self, model: SpeculatorModel, ranks: Ranks) -> dict[str, float]:
        """Returns the acceptance length, over all ranks; nothing when no answer is longer than its first token."""
        state = ranks.random_state()
        try:
            mine, num_drafts = self.prompts[ranks.rank :: ranks.world_size], recorded_num_tokens(model)
            with turn_of(self.verifier):  # the states of the next row may be computed meanwhile
                stats = decode_greedily(model, self.verifier, mine, num_drafts=num_drafts, max_tokens=MAX_TOKENS)
        finally:
            ranks.set_random_state(state)
        counts = torch.tensor([stats.num_accepted, stats.num_rounds], dtype=torch.float64, device=ranks.device)
        ranks.add_up(counts)
        num_accepted, num_rounds = counts.tolist()
        return {DECODED: 1.0 + num_accepted / num_rounds} if num_rounds else {}


def prompts_of(rows: Dataset) -> list[list[int]]:
    """Cuts each row before its first supervised token."""
    return [prompt_of(row["input_ids"], row["loss_mask"]) for row in rows]


def prompt_of(input_ids: Sequence[int], loss_mask: Sequence[int]) -> list[int]:
    first = next((index for index, mask in enumerate(loss_mask) if mask), len(input_ids))
    return [int(token) for token in input_ids[: max(first, 1)]]


def run_gate(
    config: TrainConfig, verifier: str, checkpoint: Path, device: torch.device, loaded: PreTrainedModel | None = None
) -> ParityReport:
    """Runs the parity gate: the checkpoint on prompts of the run's own data. Writes the report beside its weights.

    `loaded`: the verifier, when the run was given it. One that is loaded here has the run's own precision on an
    accelerator: a second verifier in fp32 may not fit.
    """
    report = check_parity(
        ParityConfig(
            checkpoint=str(checkpoint),
            verifier=verifier,
            max_tokens=MAX_GATE_TOKENS,
            max_prompt_tokens=MAX_GATE_PROMPT_TOKENS,
            dtype="float32" if device.type == "cpu" else config.data.hidden_states_dtype,
            device=config.data.verifier_device or str(device),
            trust_remote_code=config.verifier.trust_remote_code,
        ),
        gate_prompts(config),
        verifier=loaded,
    )
    report.save(checkpoint / REPORT_NAME)
    return report


def gate_prompts(config: TrainConfig) -> list[list[int]]:
    """Returns the prompts of the last rows of the data: the held-out ones, if there are any."""
    rows = PreparedData.open(config.data.data_path).dataset()
    return prompts_of(rows.select(range(max(0, len(rows) - NUM_GATE_PROMPTS), len(rows))))
