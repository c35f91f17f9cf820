"""The steps of one round: tokens to score, verification, its result on the host, statistics, log-probabilities.

Shapes: B rows, K draft slots, K1 = K + 1 columns (column 0 = the last committed token, column j + 1 = draft slot j).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speculators.decoding.adaptive import AdaptiveLength
from speculators.decoding.request import ActiveRequest, TokenLogprobs
from speculators.decoding.rows import Batch
from speculators.decoding.sampling import DraftedTokens
from speculators.decoding.settings import SamplingParams
from speculators.decoding.trees.token_tree import ancestor_mask, depths
from speculators.decoding.verification import GreedyRule, keyed_draws
from speculators.interfaces import AcceptanceRule, Proposal, Verification


@dataclass(frozen=True)
class Accepted:
    """A verification as integers on the host, for the rows that were decoded."""

    token_ids_by_row: dict[int, list[int]]
    """Accepted drafts and the token after them."""
    columns_by_row: dict[int, list[int]]
    """The scored columns that predicted these tokens; they are also the columns to keep: [0, path + 1 ...]."""
    offered_by_row: dict[int, tuple[int, int]]
    """(drafts, deepest draft) of each row."""
    is_chain: bool

    @property
    def num_accepted(self) -> list[int]:
        return [len(token_ids) - 1 for token_ids in self.token_ids_by_row.values()]

    def to_keep(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """`columns_BT` and `num_kept_B` of `Verifier.keep`."""
        num_kept = [len(self.columns_by_row.get(row, ())) for row in range(num_rows)]
        T = max(num_kept)
        padded = [self.columns_by_row.get(row, []) + [0] * (T - num_kept[row]) for row in range(num_rows)]
        return torch.tensor(padded), torch.tensor(num_kept)

    def states(self, states_BTD: Tensor | None) -> dict[int, Tensor] | Tensor | None:
        """States that predicted the emitted tokens: the leading columns of a chain, the path's of a tree."""
        if states_BTD is None or self.is_chain:
            return states_BTD
        return {row: states_BTD[row, columns] for row, columns in self.columns_by_row.items()}


class RoundTimes(NamedTuple):
    draft_s: float
    verify_s: float
    overhead_s: float


def account(
    requests: dict[int, ActiveRequest], accepted: Accepted, times: RoundTimes, adaptive: AdaptiveLength | None
) -> None:
    """Record a round in its requests' stats (its times split evenly) and in the adaptive draft length."""
    share = [seconds / len(requests) for seconds in times]
    for row, request in requests.items():
        request.output.stats.record(*accepted.offered_by_row[row], len(accepted.token_ids_by_row[row]) - 1)
        request.output.stats.spend(*share)
    if adaptive is not None:
        depths = [depth for _, depth in accepted.offered_by_row.values()]
        adaptive.observe(
            depths,
            accepted.num_accepted,
            verify_s=times.verify_s,
            other_s=times.draft_s + times.overhead_s,
            rows=list(accepted.offered_by_row),
        )


def no_drafts(num_rows: int, device: torch.device) -> Proposal:
    return Proposal(torch.empty(num_rows, 0, dtype=torch.int64, device=device))


def argmax_of(logits_B1V: Tensor) -> Verification:
    """The greedy rule where nothing was drafted: one argmax instead of its arithmetic on empty drafts."""
    next_token_B = logits_B1V[:, 0].argmax(-1)
    return Verification(next_token_B.new_empty(len(next_token_B), 0), torch.zeros_like(next_token_B), next_token_B)


def verify(
    rule: AcceptanceRule, batch: Batch, proposal: Proposal, logits_BTV: Tensor, first_row: int = 0
) -> Verification:
    """Apply a rule to the law each row is really sampled from: penalties, temperature, filters, and its own seed."""
    last_row = first_row + len(logits_BTV)
    sampling = batch.sampling(first_row, last_row)
    if sampling.is_argmax and rule.lossless:
        return GreedyRule()(proposal, logits_BTV) if proposal.token_ids_BK.shape[1] else argmax_of(logits_BTV)
    if sampling.has_penalties:
        assert batch.seen is not None
        seen = batch.seen.rows(first_row, last_row)
        logits_BTV = sampling.penalised(logits_BTV, seen, drafted_tokens(proposal))
    if rule.reads_logits:
        return rule(proposal, logits_BTV, None)
    position_B = batch.lengths(first_row, last_row)
    draws = keyed_draws(sampling.seed_B, position_B, logits_BTV.shape[1])
    return rule(proposal, sampling.probs(logits_BTV), draws)


def to_score(batch: Batch, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """Each row's last committed token followed by its drafts [B, K1], and the number of valid columns [B]."""
    rows = batch.rows[: batch.width]
    is_decoding = [row is not None and row.is_prefilled for row in rows]
    last = [row.last_token_id if row is not None and ok else 0 for row, ok in zip(rows, is_decoding, strict=True)]
    last_B1 = torch.tensor(last, dtype=torch.int64, device=batch.device)[:, None]
    if proposal.token_ids_BK.shape[1] == 0:
        return last_B1, torch.tensor(is_decoding, device=batch.device).long()
    token_ids_BK1 = torch.cat([last_B1, proposal.token_ids_BK.clamp_min(0)], dim=1)
    num_valid_B = (proposal.token_ids_BK >= 0).sum(1) + 1
    if not all(is_decoding):
        num_valid_B = num_valid_B * torch.tensor(is_decoding, device=batch.device)
    return token_ids_BK1, num_valid_B


def on_host(verification: Verification, proposal: Proposal, rows: Iterable[int], first_row: int = 0) -> Accepted:
    """Copy a round's result to the host in one tensor: the only synchronisation of a round."""
    K = proposal.token_ids_BK.shape[1]
    packed = torch.cat(
        [
            proposal.token_ids_BK,
            verification.path_BK,
            verification.num_accepted_B[:, None],
            verification.next_token_B[:, None],
        ],
        dim=1,
    ).tolist()
    slot_depths = list(range(1, K + 1)) if proposal.parents_K is None else depths(proposal.parents_K.tolist())
    token_ids_by_row, columns_by_row, offered_by_row = {}, {}, {}
    for row in rows:
        values = packed[row - first_row]
        drafts, path, num_accepted, next_token = values[:K], values[K : 2 * K], values[2 * K], values[2 * K + 1]
        path = path[:num_accepted]
        token_ids_by_row[row] = [drafts[slot] for slot in path] + [next_token]
        columns_by_row[row] = [0] + [slot + 1 for slot in path]
        offered = [slot_depths[slot] for slot, token_id in enumerate(drafts) if token_id >= 0]
        offered_by_row[row] = (len(offered), max(offered, default=0))
    return Accepted(token_ids_by_row, columns_by_row, offered_by_row, proposal.parents_K is None)


def drafted_tokens(proposal: Proposal) -> DraftedTokens | None:
    """The drafts before each column, which penalties count as emitted; None where nothing was drafted."""
    K = proposal.token_ids_BK.shape[1]
    if K == 0:
        return None
    if proposal.parents_K is not None:
        is_ancestor_TT = ancestor_mask(proposal.parents_K.tolist())
    else:
        is_ancestor_TT = torch.ones(K + 1, K + 1, dtype=torch.bool).tril()
    return DraftedTokens(proposal.token_ids_BK, is_ancestor_TT.to(proposal.token_ids_BK.device))


def logprobs_of(
    params: SamplingParams, logits_TV: Tensor, columns: list[int], token_ids: list[int]
) -> list[TokenLogprobs] | None:
    if params.logprobs is None:
        return None
    logprobs_TV = logits_TV[columns].float().log_softmax(-1)
    top = logprobs_TV.topk(params.logprobs) if params.logprobs else None
    return [
        TokenLogprobs(
            logprob=logprobs_TV[i, token_id].item(),
            top=dict(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)) if top is not None else {},
        )
        for i, token_id in enumerate(token_ids)
    ]
