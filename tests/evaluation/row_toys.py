"""One row of results that drafts: 20 greedy prompts, of which one has another text."""

from __future__ import annotations

from speculators.evaluation.records import MethodRow
from speculators.evaluation.statistics import Estimate

ROW = MethodRow(
    method="eagle3",
    num_speculative_tokens=4,
    temperature=0.0,
    num_prompts=20,
    num_tokens=99,
    acceptance_length=Estimate(2.5, 2.0, 3.0),
    acceptance_rate=0.4,
    conditional_acceptance=(0.5, 0.25),
    tokens_per_s=9.0,
    plain_tokens_per_s=6.0,
    speedup=Estimate(1.5, 1.4, 1.6),
    speedup_per_token=0.6,
    num_identical=19,
    draft_share=0.1,
    draft_cost=0.2,
    verify_cost=1.1,
)
