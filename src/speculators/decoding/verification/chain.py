"""Lossless acceptance rules for chains (trees go on to `trees.py`): greedy, strict, standard, block. Pure functions.

Shapes: B sequences, K draft slots, V verifier vocabulary; K1 = K + 1 (the last row scores the bonus token).
p = verifier (`target_probs_BK1V`), q = draft (`proposal.probs_BKV`; None = point mass on the drafted token).
A slot holding -1 ends its row's draft: whatever follows it is ignored and the next token is drawn from p alone.
Acceptance arithmetic is float64 on gathered values, distributions keep the dtype they came in (at least fp32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from speculators.decoding.verification.draws import as_draws
from speculators.decoding.verification.trees import greedy_tree, multi_round_tree, sample_and_match_tree
from speculators.interfaces import Draws, Proposal, Verification


@dataclass(frozen=True)
class GreedyRule:
    """Accept while the draft is the verifier's argmax (lowest id on ties); emit the argmax that follows.

    Only the order of scores matters, so logits may be given in place of probabilities (`reads_logits`).
    Lossless for greedy rows; a row with temperature needs another rule.
    """

    lossless: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = True

    def __call__(
        self, proposal: Proposal, target_probs_BK1V: Tensor, generator: torch.Generator | Draws | None = None
    ) -> Verification:
        return self.follow(proposal, target_probs_BK1V.argmax(-1))

    @staticmethod
    def follow(proposal: Proposal, best_BK1: Tensor) -> Verification:
        """The decision by the verifier's best token of each column."""
        if proposal.parents_K is not None:
            return greedy_tree(proposal, best_BK1)
        return match_chain(proposal.token_ids_BK, best_BK1)


@dataclass(frozen=True)
class StrictRule:
    """Sample-and-match: draw the verifier's own token at every position, accept while the draft equals it.

    Lossless for any draft law, q is not read. The output depends on the pick stream alone.
    """

    lossless: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False

    def __call__(
        self, proposal: Proposal, target_probs_BK1V: Tensor, generator: torch.Generator | Draws | None
    ) -> Verification:
        target_probs_BK1V = at_least_fp32(target_probs_BK1V)
        draws = as_draws(generator, target_probs_BK1V)
        if proposal.parents_K is not None:
            return sample_and_match_tree(proposal, target_probs_BK1V, draws)
        B, K1 = target_probs_BK1V.shape[:2]
        column_BK1 = torch.arange(K1, device=target_probs_BK1V.device).expand(B, K1)
        return match_chain(proposal.token_ids_BK, draws.pick(target_probs_BK1V, column_BK1))


@dataclass(frozen=True)
class StandardRule:
    """Rejection sampling (Leviathan et al. 2023, arXiv:2211.17192): accept with min(1, p/q), recover from (p - q)+.

    A point-mass draft is accepted with p(draft) and recovered from p without it. Drawing a token from p and matching it
    is the same law with one draw, so that case is `StrictRule`. Trees: multi-round rejection in slot order.
    """

    lossless: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False

    def __call__(
        self, proposal: Proposal, target_probs_BK1V: Tensor, generator: torch.Generator | Draws | None
    ) -> Verification:
        if proposal.probs_BKV is None:
            return StrictRule()(proposal, target_probs_BK1V, generator)
        target_probs_BK1V = at_least_fp32(target_probs_BK1V)
        draws = as_draws(generator, target_probs_BK1V)
        if proposal.parents_K is not None:
            return multi_round_tree(proposal, target_probs_BK1V, draws)
        accepted_BK = draws.accept(self.accept_probs(proposal, target_probs_BK1V))
        num_accepted_B = leading_run(accepted_BK)
        next_probs_BV = residual_at(num_accepted_B, proposal, target_probs_BK1V)
        return chain_verification(num_accepted_B, next_probs_BV, proposal.token_ids_BK.shape[1], draws)

    @staticmethod
    def accept_probs(proposal: Proposal, target_probs_BK1V: Tensor) -> Tensor:
        """[B, K]: probability of accepting each slot, given that all before it were accepted."""
        p_BK, q_BK = drafted_probs(proposal, target_probs_BK1V)
        ratio_BK = torch.where(q_BK > 0, p_BK / q_BK.clamp_min(torch.finfo(q_BK.dtype).tiny), 0.0)
        return torch.where(drafted(proposal.token_ids_BK), ratio_BK.clamp(max=1.0), 0.0)


@dataclass(frozen=True)
class BlockRule:
    """Block verification (Sun et al. 2024, arXiv:2403.10444): tests every prefix, keeps the longest that passes.

    The optimal chain rule: E[accepted] >= standard's, equal for K = 1 and for point-mass drafts (which are drawn by
    `StrictRule`, the same law with reproducible output).
    """

    lossless: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False

    def __call__(
        self, proposal: Proposal, target_probs_BK1V: Tensor, generator: torch.Generator | Draws | None
    ) -> Verification:
        if proposal.parents_K is not None:
            raise ValueError(
                "rejection_sample_method='block' verifies chains only; draft a chain or use 'standard' for trees"
            )
        if proposal.probs_BKV is None:
            return StrictRule()(proposal, target_probs_BK1V, generator)
        target_probs_BK1V = at_least_fp32(target_probs_BK1V)
        B, K1, _ = target_probs_BK1V.shape
        draws = as_draws(generator, target_probs_BK1V)
        prefix_BK1 = self.prefix_weights(proposal, target_probs_BK1V)
        passed_BK = draws.accept(self.accept_probs(proposal, target_probs_BK1V, prefix_BK1))
        slot_K = torch.arange(1, K1, device=passed_BK.device)
        num_accepted_B = torch.where(passed_BK, slot_K, 0).amax(-1) if K1 > 1 else slot_K.new_zeros(B)
        kept_B = prefix_BK1.gather(1, num_accepted_B[:, None])[:, 0]
        next_probs_BV = residual_at(num_accepted_B, proposal, target_probs_BK1V, target_scale_B=kept_B)
        return chain_verification(num_accepted_B, next_probs_BV, K1 - 1, draws)

    @staticmethod
    def prefix_weights(proposal: Proposal, target_probs_BK1V: Tensor) -> Tensor:
        """[B, K1]: P_0 = 1, P_i = min(1, P_{i-1} p_i(d_i) / q_i(d_i)); 0 once the draft has ended."""
        p_BK, q_BK = drafted_probs(proposal, target_probs_BK1V)
        ratio_BK = torch.where(q_BK > 0, p_BK / q_BK.clamp_min(torch.finfo(q_BK.dtype).tiny), 0.0)
        ratio_BK = torch.where(drafted(proposal.token_ids_BK), ratio_BK, 0.0)
        prefix = [ratio_BK.new_ones(ratio_BK.shape[0])]
        for ratio_B in ratio_BK.unbind(1):
            prefix.append((prefix[-1] * ratio_B).clamp(max=1.0))
        return torch.stack(prefix, 1)

    @staticmethod
    def accept_probs(proposal: Proposal, target_probs_BK1V: Tensor, prefix_BK1: Tensor) -> Tensor:
        """[B, K]: h_i, the probability with which the prefix of length i passes its own test."""
        assert proposal.probs_BKV is not None
        valid_BK = drafted(proposal.token_ids_BK)
        K = valid_BK.shape[1]
        passes = []
        for i in range(1, K + 1):  # a loop, not [B, K, V] at once: one [B, V] temporary
            weight_B = prefix_BK1[:, i]
            if i < K:
                excess_BV = weight_B[:, None] * target_probs_BK1V[:, i] - proposal.probs_BKV[:, i]
                residual_B = excess_BV.clamp_min(0).sum(-1, dtype=torch.float64)
                denominator_B = residual_B + 1 - weight_B
                tested_B = torch.where(denominator_B > 0, residual_B / denominator_B.clamp_min(1e-300), 1.0)
                weight_B = torch.where(valid_BK[:, i], tested_B, weight_B)  # the last draft of the row: h = P
            passes.append(torch.where(valid_BK[:, i - 1], weight_B, 0.0))
        return torch.stack(passes, 1) if passes else prefix_BK1[:, 1:]


def at_least_fp32(probs: Tensor) -> Tensor:
    return probs if probs.dtype in (torch.float32, torch.float64) else probs.float()


def drafted(token_ids_BK: Tensor) -> Tensor:
    """bool [B, K]: slots before the first -1."""
    return (token_ids_BK >= 0).cumprod(-1).bool()


def leading_run(accepted_BK: Tensor) -> Tensor:
    """int64 [B]: how many slots were accepted before the first that was not."""
    return accepted_BK.long().cumprod(-1).sum(-1)


def drafted_probs(proposal: Proposal, target_probs_BK1V: Tensor) -> tuple[Tensor, Tensor]:
    """float64 p and q [B, K] of the drafted tokens (slots without a draft: token 0, to be masked by the caller)."""
    index_BK1 = proposal.token_ids_BK.clamp_min(0)[..., None]
    p_BK = target_probs_BK1V[:, :-1].gather(-1, index_BK1)[..., 0].double()
    if proposal.probs_BKV is None:
        return p_BK, torch.ones_like(p_BK)
    return p_BK, proposal.probs_BKV.gather(-1, index_BK1)[..., 0].double()


def residual(target_probs_BV: Tensor, draft_probs_BV: Tensor, target_scale_B: Tensor | None = None) -> Tensor:
    """(scale * p - q)+ normalised; p where that is all zeros (p = q: a rejection there has probability 0)."""
    scaled_BV = target_probs_BV if target_scale_B is None else target_probs_BV * target_scale_B[:, None]
    left_BV = (scaled_BV - draft_probs_BV).clamp_min(0)
    total_B1 = left_BV.sum(-1, keepdim=True)
    return torch.where(total_B1 > 0, left_BV / total_B1.clamp_min(torch.finfo(left_BV.dtype).tiny), target_probs_BV)


def residual_at(
    num_accepted_B: Tensor, proposal: Proposal, target_probs_BK1V: Tensor, target_scale_B: Tensor | None = None
) -> Tensor:
    """[B, V]: law of the token after the accepted drafts: recovered where a draft was rejected, else p itself."""
    B, K1, _ = target_probs_BK1V.shape
    row_B = torch.arange(B, device=target_probs_BK1V.device)
    target_BV = target_probs_BK1V[row_B, num_accepted_B]
    if K1 == 1:
        return target_BV
    slot_B = num_accepted_B.clamp(max=K1 - 2)
    token_B = proposal.token_ids_BK[row_B, slot_B]
    rejected_B = (num_accepted_B < K1 - 1) & (token_B >= 0)
    if proposal.probs_BKV is None:
        draft_BV = torch.zeros_like(target_BV).scatter(1, token_B.clamp_min(0)[:, None], 1.0)
    else:
        draft_BV = proposal.probs_BKV[row_B, slot_B].to(target_BV.dtype)
    return torch.where(rejected_B[:, None], residual(target_BV, draft_BV, target_scale_B), target_BV)


def chain_verification(num_accepted_B: Tensor, next_probs_BV: Tensor, num_slots: int, draws: Draws) -> Verification:
    """The first slots of the chain, and one token from the given law."""
    next_token_B = draws.pick(next_probs_BV[:, None], num_accepted_B[:, None])[:, 0]
    return Verification(chain_path(num_accepted_B, num_slots), num_accepted_B, next_token_B)


def match_chain(token_ids_BK: Tensor, target_token_BK1: Tensor) -> Verification:
    """Accept while the draft equals the verifier's own token; emit the verifier's token at the first difference."""
    num_accepted_B = leading_run(token_ids_BK == target_token_BK1[:, :-1])
    next_token_B = target_token_BK1.gather(1, num_accepted_B[:, None])[:, 0]
    return Verification(chain_path(num_accepted_B, token_ids_BK.shape[1]), num_accepted_B, next_token_B)


def chain_path(num_accepted_B: Tensor, num_slots: int) -> Tensor:
    slot_K = torch.arange(num_slots, device=num_accepted_B.device)
    return torch.where(slot_K < num_accepted_B[:, None], slot_K, -1)
