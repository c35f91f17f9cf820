"""The steps of one round: tokens to score, verification, its result on the host, statistics, log-probabilities.

Shapes: B rows, K draft slots, K1 = K + 1 columns (column 0 = the last committed token, column j + 1 = draft slot j).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from speculators.decoding.adaptive import AdaptiveLength
from speculators.decoding.request import ActiveRequest, Drafted
from speculators.decoding.rows import Batch
from speculators.decoding.sampling import DraftedTokens
from speculators.decoding.trees.token_tree import ancestor_mask, depths
from speculators.decoding.verification import GreedyRule, keyed_draws
from speculators.interfaces import AcceptanceRule, Proposal, Verification, Verifier, VerifierOutput
from speculators.nn.device import to_device


@dataclass(frozen=True)
class Verified:
    """A rule's decision, and the columns whose scores it may be taken from."""

    verification: Verification
    is_finite_BT: Tensor
    """bool, T columns: the best score is a number; False for NaN, +inf, or -inf everywhere."""


@dataclass(frozen=True)
class Accepted:
    """A verification as integers on the host, for the rows that were decoded."""

    is_chain: bool
    token_ids_by_row: dict[int, list[int]] = field(default_factory=dict)
    """Accepted drafts and the token after them, up to the first column on their way whose scores are not finite."""
    columns_by_row: dict[int, list[int]] = field(default_factory=dict)
    """The scored columns that predicted these tokens; they are also the columns to keep: [0, path + 1 ...]."""
    offered_by_row: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(drafts, deepest draft) of each row."""
    drafts_by_row: dict[int, list[int]] = field(default_factory=dict)
    """Of chains: each row's drafts."""
    num_dropped_by_row: dict[int, int] = field(default_factory=dict)
    failed_column_by_row: dict[int, int] = field(default_factory=dict)
    """The column that ends a row's request: what follows it cannot be told."""
    is_finite_BT: Tensor | None = None
    """None when all scores were finite, those of columns that no row reached included."""

    @property
    def rows_in_doubt(self) -> list[int]:
        """Rows whose failure may be that of a draft."""
        return [row for row in self.failed_column_by_row if self.offered_by_row[row][0]]

    def num_accepted(self, row: int) -> int:
        return len(self.token_ids_by_row[row]) - (row not in self.failed_column_by_row)

    def drafted(self, row: int, own_probs_by_row: Mapping[int, list[float | None]]) -> Drafted:
        drafts = self.drafts_by_row[row]
        own_probs = own_probs_by_row.get(row, [])[: len(drafts)] or None
        return Drafted(self.num_accepted(row), self.offered_by_row[row][1], drafts, own_probs)

    def to_keep(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """`columns_BT` and `num_kept_B` of `Verifier.keep`."""
        num_kept = [len(self.columns_by_row.get(row, ())) for row in range(num_rows)]
        T = max(num_kept)
        padded = [self.columns_by_row.get(row, []) + [0] * (T - num_kept[row]) for row in range(num_rows)]
        return torch.tensor(padded), torch.tensor(num_kept)

    def states(self, states_BTD: Tensor | None) -> Tensor | None:
        """States that predicted the emitted tokens, in the leading columns: a chain's are there, a tree's path is
        moved there."""
        if states_BTD is not None and self.is_finite_BT is not None:
            # drafters run over padding too, and a NaN in their caches would be read with weight 0
            states_BTD = states_BTD.masked_fill(~self.is_finite_BT[..., None], 0.0)
        if states_BTD is None or self.is_chain:
            return states_BTD
        columns_BT = to_device(self.to_keep(len(states_BTD))[0], states_BTD.device)
        return states_BTD.gather(1, columns_BT[..., None].expand(-1, -1, states_BTD.shape[-1]))


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
        request.output.stats.record(*accepted.offered_by_row[row], accepted.num_accepted(row))
        request.output.stats.num_dropped_drafts += accepted.num_dropped_by_row.get(row, 0)
        request.output.stats.spend(*share)
    if adaptive is not None:
        depths = [depth for _, depth in accepted.offered_by_row.values()]
        adaptive.observe(
            depths,
            [accepted.num_accepted(row) for row in accepted.offered_by_row],
            verify_s=times.verify_s,
            other_s=times.draft_s + times.overhead_s,
            rows=list(accepted.offered_by_row),
        )


def no_drafts(num_rows: int, device: torch.device) -> Proposal:
    return Proposal(torch.empty(num_rows, 0, dtype=torch.int64, device=device))


def greedily(proposal: Proposal, logits_BTV: Tensor) -> Verified:
    """The greedy rule, and whether the best scores are finite: the argmax of a row with a NaN is the NaN."""
    best_BT = logits_BTV.argmax(-1)
    is_finite_BT = logits_BTV.gather(-1, best_BT[..., None])[..., 0].isfinite()
    if proposal.token_ids_BK.shape[1]:
        return Verified(GreedyRule.follow(proposal, best_BT), is_finite_BT)
    next_token_B = best_BT[:, 0]  # nothing was drafted: no arithmetic on empty drafts
    nothing_B0 = next_token_B.new_empty(len(next_token_B), 0)
    return Verified(Verification(nothing_B0, torch.zeros_like(next_token_B), next_token_B), is_finite_BT)


def verify(rule: AcceptanceRule, batch: Batch, proposal: Proposal, logits_BTV: Tensor, first_row: int = 0) -> Verified:
    """Apply a rule to the law each row is really sampled from (adjustments, penalties, temperature, filters), with the
    row's own seed."""
    last_row = first_row + len(logits_BTV)
    sampling = batch.sampling(first_row, last_row)
    if sampling.is_argmax and rule.lossless:
        return greedily(proposal, logits_BTV)
    if sampling.adjustments is not None:
        logits_BTV = sampling.adjustments.added(logits_BTV, batch.outputs(first_row, last_row), proposal)
    if sampling.has_penalties:
        assert batch.seen is not None
        seen = batch.seen.rows(first_row, last_row)
        logits_BTV = sampling.penalised(logits_BTV, seen, drafted_tokens(proposal))
    is_finite_BT = sampling.is_finite(logits_BTV)
    if rule.reads_logits:
        return Verified(rule(proposal, logits_BTV, None), is_finite_BT)
    position_B = to_device(batch.lengths(first_row, last_row), batch.device)
    draws = keyed_draws(sampling.seed_B, position_B, logits_BTV.shape[1])
    # any law will do in the other columns: the text is cut before them, but rules read all columns to decide on one
    probs_BTV = sampling.probs(logits_BTV).masked_fill_(~is_finite_BT[..., None], 1 / logits_BTV.shape[-1])
    return Verified(rule(proposal, probs_BTV, draws), is_finite_BT)


def to_score(batch: Batch, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """Each row's last committed token followed by its drafts [B, K1], and the number of valid columns [B].

    Empty slots and idle rows repeat a token that is in the batch: a token that nobody wrote could have a NaN embedding.
    """
    rows = batch.rows[: batch.width]
    is_decoding = [row is not None and row.is_prefilled for row in rows]
    known = next(row.last_token_id for row in rows if row is not None and row.is_prefilled)
    last = [row.last_token_id if row is not None and ok else known for row, ok in zip(rows, is_decoding, strict=True)]
    last_B1 = to_device(last, batch.device)[:, None]
    if proposal.token_ids_BK.shape[1] == 0:
        return last_B1, to_device(is_decoding, batch.device)
    drafts_BK = torch.where(proposal.token_ids_BK >= 0, proposal.token_ids_BK, last_B1)
    token_ids_BK1 = torch.cat([last_B1, drafts_BK], dim=1)
    num_valid_B = (proposal.token_ids_BK >= 0).sum(1) + 1
    if not all(is_decoding):
        num_valid_B = num_valid_B * to_device(is_decoding, batch.device, torch.bool)
    return token_ids_BK1, num_valid_B


def on_host(verified: Verified, proposal: Proposal, rows: Iterable[int], first_row: int = 0) -> Accepted:
    """Copy a round's result to the host in one tensor: the only synchronisation of a round."""
    verification, K = verified.verification, proposal.token_ids_BK.shape[1]
    num_dropped_B = proposal.num_dropped_B
    packed = torch.cat(
        [
            proposal.token_ids_BK,
            verification.path_BK,
            verification.num_accepted_B[:, None],
            verification.next_token_B[:, None],
            (num_dropped_B if num_dropped_B is not None else torch.zeros_like(verification.num_accepted_B))[:, None],
            verified.is_finite_BT,
        ],
        dim=1,
    ).tolist()
    is_all_finite = all(all(values[2 * K + 3 :]) for values in packed)
    slot_depths = list(range(1, K + 1)) if proposal.parents_K is None else depths(proposal.parents_K.tolist())
    accepted = Accepted(
        is_chain=proposal.parents_K is None, is_finite_BT=None if is_all_finite else verified.is_finite_BT
    )
    for row in rows:
        values = packed[row - first_row]
        drafts, path, num_accepted, next_token = values[:K], values[K : 2 * K], values[2 * K], values[2 * K + 1]
        path = path[:num_accepted]
        token_ids, columns = [drafts[slot] for slot in path] + [next_token], [0] + [slot + 1 for slot in path]
        if not is_all_finite:
            finite = takewhile(bool, (values[2 * K + 3 + column] for column in columns))
            num_finite = sum(1 for _ in finite)
            if num_finite < len(columns):
                accepted.failed_column_by_row[row] = columns[num_finite]
                token_ids, columns = token_ids[:num_finite], columns[:num_finite]
        accepted.token_ids_by_row[row], accepted.columns_by_row[row] = token_ids, columns
        offered = [slot_depths[slot] for slot, token_id in enumerate(drafts) if token_id >= 0]
        accepted.offered_by_row[row] = (len(offered), max(offered, default=0))
        accepted.drafts_by_row[row] = drafts[: len(offered)] if accepted.is_chain else []
        accepted.num_dropped_by_row[row] = values[2 * K + 2]
    return accepted


def drafted_tokens(proposal: Proposal) -> DraftedTokens | None:
    """The drafts before each column, which penalties count as emitted; None where nothing was drafted."""
    K = proposal.token_ids_BK.shape[1]
    if K == 0:
        return None
    if proposal.parents_K is not None:
        is_ancestor_TT = ancestor_mask(proposal.parents_K.tolist())
    else:
        is_ancestor_TT = torch.ones(K + 1, K + 1, dtype=torch.bool).tril()
    return DraftedTokens(proposal.token_ids_BK, to_device(is_ancestor_TT, proposal.token_ids_BK.device, torch.bool))


# -- scores that are no numbers
#
# A draft whose keys or values are NaN spoils the whole row of its forward: the columns before it do not attend to it,
# but read it with weight 0, and 0 times NaN is NaN. Such a row is scored again, and gives what plain decoding gives.


def usable_drafts(proposal: Proposal, vocab_size: int) -> Proposal:
    """The proposal without drafts that cannot be verified: of a token outside the vocabulary, or drawn from scores that
    were not finite. A chain ends before the first of them."""
    token_ids_BK = proposal.token_ids_BK
    is_unusable_BK = token_ids_BK >= vocab_size
    if proposal.probs_BKV is not None:
        is_unusable_BK |= (token_ids_BK >= 0) & ~proposal.probs_BKV.amax(-1).isfinite()
    num_dropped_B = is_unusable_BK.sum(1)
    if proposal.parents_K is None:
        is_unusable_BK = is_unusable_BK.cumsum(1) > 0
    return replace(proposal, token_ids_BK=token_ids_BK.masked_fill(is_unusable_BK, -1), num_dropped_B=num_dropped_B)


def score_again(
    verifier: Verifier, batch: Batch, proposal: Proposal, output: VerifierOutput, rows: list[int]
) -> tuple[Proposal, VerifierOutput]:
    """Scores the given rows without the influence of later columns on earlier ones; the others keep their scores.

    A chain is scored column by column, then whole up to its last sound draft. A tree's rows lose their drafts."""
    verifier.clear_unused()
    is_again_B = torch.zeros(batch.width, dtype=torch.bool, device=batch.device)
    is_again_B[rows] = True
    if proposal.parents_K is not None:
        proposal = replace(proposal, token_ids_BK=proposal.token_ids_BK.masked_fill(is_again_B[:, None], -1))
        return proposal, verifier.score(*to_score(batch, proposal), proposal.parents_K)
    token_ids_BK1, num_valid_B = to_score(batch, proposal)
    logits_BTV = one_by_one(verifier, batch, token_ids_BK1, num_valid_B * is_again_B)
    logits_BTV = torch.where(is_again_B[:, None, None], logits_BTV, output.logits_BTV)
    # the cache and the states come from a forward in which unsound drafts are replaced: what follows them is not kept
    is_sound_BK = logits_BTV[:, 1:].amax(-1).isfinite().cumprod(1).bool()
    is_replaced_BK = is_again_B[:, None] & ~is_sound_BK
    token_ids_BK1[:, 1:] = torch.where(is_replaced_BK, token_ids_BK1[:, :1], token_ids_BK1[:, 1:])
    states_BTD = verifier.score(token_ids_BK1, num_valid_B).states_BTD
    return proposal, VerifierOutput(logits_BTV, states_BTD)


def one_by_one(verifier: Verifier, batch: Batch, token_ids_BK1: Tensor, num_valid_B: Tensor) -> Tensor:
    """Logits [B, K1, V] of one forward per column; the verifier is left as it was."""
    logits, num_valid = [], num_valid_B.cpu()
    for column, token_ids_B1 in enumerate(token_ids_BK1.split(1, dim=1)):
        is_valid_B = (num_valid > column).long()
        logits.append(verifier.score(token_ids_B1, is_valid_B.to(batch.device)).logits_BTV)
        verifier.keep(torch.zeros(len(is_valid_B), 1, dtype=torch.int64), is_valid_B)
    for row, request in batch.decoding().items():
        if num_valid[row]:
            verifier.truncate(row, request.length - 1)
    verifier.clear_unused()
    return torch.cat(logits, dim=1)


def refuse_outside(token_ids_by_row: dict[int, list[int]], vocab_size: int) -> None:
    """Raise ValueError for a token that an acceptance rule made up."""
    for token_ids in token_ids_by_row.values():
        if token_ids and not 0 <= token_ids[-1] < vocab_size:  # the others are drafts
            raise ValueError(
                f"the acceptance rule emitted token {token_ids[-1]}, outside the vocabulary of {vocab_size}: "
                "next_token_B must hold token ids"
            )


def failure(logits_V: Tensor, after: str) -> str:
    """What is wrong with the scores of a column that ended its request, for people."""
    num_nan, num_inf = int(logits_V.isnan().sum()), int((logits_V == torch.inf).sum())
    if num_nan or num_inf:
        kind = f"{num_nan or num_inf} of {len(logits_V)} are {'NaN' if num_nan else 'inf'}"
    elif bool((logits_V == -torch.inf).all()):
        kind = f"all {len(logits_V)} are -inf"
    else:
        settings = "biases, bad words, min_tokens, penalties and temperature"
        return f"{after} the request's {settings} leave no token with a finite score; use milder ones"
    return (
        f"{after} the verifier's scores are not finite ({kind}): its weights are damaged, or its dtype is too narrow "
        "for its activations (try bfloat16 or float32)"
    )
