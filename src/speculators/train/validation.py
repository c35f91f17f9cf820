"""Decodes held-out prompts with the drafter in training: the acceptance length that serving would have now. Accuracies
are of one forward over the verifier's own text and flatter: there every draft before is right.

    row of the validation split   p0 p1 .. pn | a0 a1 ..     prompt: up to the first supervised token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from speculators.evaluation.measurement import decode_greedily
from speculators.evaluation.parity import recorded_num_tokens
from speculators.model import SpeculatorModel
from speculators.train.distributed import Ranks
from speculators.train.events import DECODED

MAX_TOKENS = 64
"""Longest answer: validation is to cost little beside the epoch before it."""


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
