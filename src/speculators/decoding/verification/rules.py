"""The acceptance rules by name, and those that change the output for longer acceptance, or for benchmarks: typical,
tolerance, synthetic. The others are in `chain`.

Shapes: B sequences, K draft slots, V verifier vocabulary; K1 = K + 1. Chains and trees, except synthetic (chains only).
The first two accept a slot on its own score and keep the longest path of accepted slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from speculators.decoding.verification.chain import (
    BlockRule,
    GreedyRule,
    StandardRule,
    StrictRule,
    at_least_fp32,
    chain_verification,
    leading_run,
    residual_at,
)
from speculators.decoding.verification.draws import as_draws
from speculators.decoding.verification.trees import longest_path, parent_rows
from speculators.interfaces import AcceptanceRule, Draws, Proposal, Verification


@dataclass(frozen=True)
class TypicalRule:
    """Medusa's typical acceptance (arXiv:2401.10774): accept x while p(x) > min(threshold, alpha * exp(-entropy)).

    The token that follows is drawn from p without the tokens below the same bound.
    """

    posterior_threshold: float = 0.09
    posterior_alpha: float = 0.3

    lossless: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("posterior_threshold", "posterior_alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in (0, 1]")

    def __call__(
        self, proposal: Proposal, target_probs_BK1V: Tensor, generator: torch.Generator | Draws | None
    ) -> Verification:
        target_probs_BK1V = at_least_fp32(target_probs_BK1V)
        draws = as_draws(generator, target_probs_BK1V)
        entropy_BK1 = -(target_probs_BK1V * (target_probs_BK1V + 1e-5).log()).sum(-1)
        bound_BK1 = (self.posterior_alpha * (-entropy_BK1).exp()).clamp(max=self.posterior_threshold)
        rows_BK = parent_rows(proposal)
        p_BK = _scores_of_drafts(proposal, target_probs_BK1V, rows_BK)
        accepted_BK = (p_BK > bound_BK1.gather(1, rows_BK)) & (proposal.token_ids_BK >= 0)
        path_BK, num_accepted_B, last_B = longest_path(accepted_BK, p_BK.clamp_min(1e-38).log(), proposal)
        row_B = torch.arange(len(last_B), device=last_B.device)
        next_BV = target_probs_BK1V[row_B, last_B + 1]
        next_BV = torch.where(next_BV < bound_BK1[row_B, last_B + 1, None], 0.0, next_BV)
        next_BV = next_BV / next_BV.sum(-1, keepdim=True)
        return Verification(path_BK, num_accepted_B, draws.pick(next_BV[:, None], num_accepted_B[:, None])[:, 0])


@dataclass(frozen=True)
class ToleranceRule:
    """The greedy proposal's own leniency: accept x among the verifier's `verifier_accept_k` best tokens when its
    log-likelihood is within `accept_tolerance` of the best one's; emit the argmax that follows.

    Reads logits (or log-probabilities): one-hot rows would hide the gap. Exact greedy when k = 1 or tolerance = 0.
    Rows with a temperature are decoded greedily too.
    """

    verifier_accept_k: int = 1
    accept_tolerance: float = 0.0

    reads_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.verifier_accept_k < 1:
            raise ValueError(f"verifier_accept_k={self.verifier_accept_k} must be at least 1")
        if not self.accept_tolerance >= 0:
            raise ValueError(f"accept_tolerance={self.accept_tolerance} must be at least 0")

    @property
    def lossless(self) -> bool:
        return self.verifier_accept_k == 1 or self.accept_tolerance == 0

    def __call__(
        self, proposal: Proposal, target_probs_BK1V: Tensor, generator: torch.Generator | Draws | None = None
    ) -> Verification:
        best_score_BK1, best_BK1 = target_probs_BK1V.max(-1).values, target_probs_BK1V.argmax(-1)
        rows_BK = parent_rows(proposal)
        score_BK = _scores_of_drafts(proposal, target_probs_BK1V, rows_BK)
        accepted_BK = proposal.token_ids_BK == best_BK1.gather(1, rows_BK)
        if not self.lossless:
            is_close_BK = best_score_BK1.gather(1, rows_BK) - score_BK <= self.accept_tolerance
            accepted_BK |= is_close_BK & (self._rank(proposal, target_probs_BK1V, rows_BK) < self.verifier_accept_k)
        accepted_BK &= proposal.token_ids_BK >= 0
        path_BK, num_accepted_B, last_B = longest_path(accepted_BK, score_BK, proposal)
        return Verification(path_BK, num_accepted_B, best_BK1.gather(1, last_B[:, None] + 1)[:, 0])

    @staticmethod
    def _rank(proposal: Proposal, scores_BK1V: Tensor, rows_BK: Tensor) -> Tensor:
        """Counts the tokens that the verifier prefers to the drafted one (ties: lower ids first)."""
        token_id_V = torch.arange(scores_BK1V.shape[-1], device=scores_BK1V.device)
        ranks = []
        row_B = torch.arange(len(rows_BK), device=rows_BK.device)
        for slot in range(rows_BK.shape[1]):
            index_B1 = proposal.token_ids_BK[:, slot, None].clamp_min(0)
            score_BV = scores_BK1V[row_B, rows_BK[:, slot]]
            own_B1 = score_BV.gather(1, index_B1)
            is_ahead_BV = (score_BV > own_B1) | ((score_BV == own_B1) & (token_id_V < index_B1))
            ranks.append(is_ahead_BV.sum(-1))
        return torch.stack(ranks, 1) if ranks else proposal.token_ids_BK


@dataclass(frozen=True)
class SyntheticRule:
    """Accept slot i with a prescribed probability, whatever its token: measures speed at a known acceptance.

    `acceptance_rates` are unconditional and non-increasing: r_i = P(slots 0..i all accepted). After the cut the token
    is drawn as in standard rejection.
    """

    acceptance_rates: tuple[float, ...]

    lossless: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False

    def __call__(
        self, proposal: Proposal, target_probs_BK1V: Tensor, generator: torch.Generator | Draws | None
    ) -> Verification:
        if proposal.parents_K is not None:
            raise ValueError("synthetic acceptance is defined for chains; draft a chain")
        num_slots = proposal.token_ids_BK.shape[1]
        if num_slots > len(self.acceptance_rates):
            raise ValueError(f"{num_slots} draft slots but {len(self.acceptance_rates)} synthetic acceptance rates")
        target_probs_BK1V = at_least_fp32(target_probs_BK1V)
        draws = as_draws(generator, target_probs_BK1V)
        rate_K = torch.tensor(conditional_rates(self.acceptance_rates)[:num_slots], dtype=torch.float64)
        probs_BK = torch.where(proposal.token_ids_BK >= 0, rate_K.to(target_probs_BK1V.device, non_blocking=True), 0.0)
        num_accepted_B = leading_run(draws.accept(probs_BK))
        return chain_verification(
            num_accepted_B, residual_at(num_accepted_B, proposal, target_probs_BK1V), num_slots, draws
        )


def conditional_rates(acceptance_rates: tuple[float, ...]) -> list[float]:
    """c_0 = r_0, c_i = r_i / r_{i-1} (0 after a rate of 0)."""
    before = (1.0, *acceptance_rates)
    return [rate / last if last > 0 else 0.0 for last, rate in zip(before, acceptance_rates, strict=False)]


def _scores_of_drafts(proposal: Proposal, scores_BK1V: Tensor, rows_BK: Tensor) -> Tensor:
    """[B, K]: the verifier's score of each slot's token, read at the slot's parent."""
    row_B1 = torch.arange(len(rows_BK), device=rows_BK.device)[:, None]
    return scores_BK1V[row_B1, rows_BK, proposal.token_ids_BK.clamp_min(0)]


RULES: dict[str, Callable[..., AcceptanceRule]] = {
    "greedy": GreedyRule,
    "strict": StrictRule,
    "standard": StandardRule,
    "probabilistic": StandardRule,  # its name before vLLM 0.32
    "block": BlockRule,
    "tolerance": ToleranceRule,
    "typical": TypicalRule,
    "synthetic": SyntheticRule,
}


def resolve_rule(name: str, **options: Any) -> AcceptanceRule:
    """The rule called `name`; `options` are its dataclass's fields. Raises ValueError for unknown names or options."""
    if name not in RULES:
        raise ValueError(f"acceptance rule {name!r} does not exist; choose one of {sorted(RULES)}")
    try:
        return RULES[name](**options)
    except TypeError as error:
        raise ValueError(f"acceptance rule {name!r} does not take these options: {error}") from error
