"""Chooses how many tokens to draft: expected tokens per round against measured cost. K = 0 is plain decoding.

Shapes: B sequences, K draft slots. Conditional rate a_i = P(slot i accepted | the slots before it were); survival =
their running product; expected tokens of a round = 1 + sum of survivals.

    speed(K) = (1 + sum_{k<=K} prod_{i<=k} a_i) / (other_s(K) + verify_s(tokens scored))

Lossless adaptation looks only at what precedes the token it decides about. Whether slot i is drafted may depend on the
context, on d_1..d_{i-1} and on the LAW q_i (its largest probability, say), never on the token drawn from q_i: keeping
only draws of high probability changes the law of what is verified. For point-mass drafts d_i is a function of the
context, so anything known before verification may be used (`lengths_within_budget`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculators.decoding.measurements import AcceptanceRates, ConfidenceFit, CostMeter, CostModel
from speculators.interfaces import Proposal


def expected_tokens(conditional_rates: Sequence[float]) -> float:
    """Tokens per round on average, the recovered or bonus token included."""
    survival, total = 1.0, 1.0
    for rate in conditional_rates:
        survival *= rate
        total += survival
    return total


def expected_columns(offer_rates: Sequence[float], batch_size: int) -> float:
    """Columns per forward on average: slot i is scored when any of the rows has a draft there."""
    return 1.0 + sum(1.0 - (1.0 - rate) ** batch_size for rate in offer_rates)


def speeds_by_num_tokens(
    conditional_rates: Sequence[float], cost: CostModel, batch_size: int = 1, offer_rates: Sequence[float] | None = None
) -> list[float]:
    """Tokens per second of each row, by K. `offer_rates`: P(a row has a draft in slot i, if requested); None: 1."""
    offer_rates = offer_rates if offer_rates is not None else [1.0] * len(conditional_rates)
    most = min(len(conditional_rates), len(cost.other_s) - 1)
    return [
        expected_tokens(conditional_rates[:k])
        / cost.round_s(k, batch_size * expected_columns(offer_rates[:k], batch_size))
        for k in range(most + 1)
    ]


def best_num_tokens(speeds: Sequence[float]) -> int:
    """The fastest K, the smallest of equals. A scan: measured costs need not be convex."""
    return max(range(len(speeds)), key=lambda k: (speeds[k], -k))


def lengths_within_budget(confidence_BK: Tensor, cost: CostModel) -> Tensor:
    """int64 [B]: how many drafts of each row to verify, so that the batch is fastest. Point-mass drafts only.

    A forward costs by its longest row, so one width is chosen for all rows; drafting is paid for already. A confidence
    below 0 marks a slot without a draft.
    """
    B, K = confidence_BK.shape
    survival_BK = confidence_BK.double().clamp_min(0).cumprod(-1)
    emitted_K = B + survival_BK.sum(0).cumsum(0).cpu()
    tokens = torch.cat([emitted_K.new_full((1,), B), emitted_K])
    num_drafted = min(K, len(cost.other_s) - 1)
    round_s = torch.tensor([cost.round_s(num_drafted, B * (1 + width)) for width in range(K + 1)], dtype=torch.float64)
    width = int((tokens / round_s).argmax())
    return (survival_BK[:, :width] > 0).sum(-1)


LEAST_PROBE_LOSS = 0.2
"""In units of a plain round: costs are noisy, and a probe that seemed free must not be repeated at once."""


@dataclass
class AdaptiveLength:
    """Chooses K for each round from the rounds before. Call `num_tokens(num_rows)` before a round and `observe` after
    it. Rows are those of the forward, idle ones included: they cost as much. Between the two calls, `shorten` drops
    drafts that are not worth verifying: by the drafter's own confidence, or because too few rows have one.

    The first rounds try each K once. Later it probes (drafts at full length), because otherwise a drafter that got
    better would never be noticed; so seldom that probes cost `probe_share` of the time, more often at first. The cost
    of a probe is measured: a drafter that was not called for long must first process the tokens it missed. While it
    drafts, it probes plain decoding as seldom, to keep that cost up to date. A new K must be faster than the current
    one, and than plain decoding, by `margin`: noise is no reason to draft. K is reviewed every few rounds only, because
    a review takes time too.
    """

    max_num_tokens: int
    probe_share: float = 0.01
    first_probe_share: float = 0.02
    margin: float = 0.02
    review_rounds: int = 8
    rates: AcceptanceRates = field(init=False)
    costs: CostMeter = field(default_factory=CostMeter)
    fit: ConfidenceFit = field(default_factory=ConfidenceFit)
    confidence_by_row: list[list[float]] | None = None
    """The drafter's estimates for this round's drafts."""
    num_requested: int = 0
    """K of this round."""
    num_rows: int = 0
    num_rounds: int = 0
    next_review: int = 0
    last_full: int = 0
    """The last probe."""
    last_plain: int = 0
    is_probe: bool = False
    probe_s: float | None = None
    """Seconds of the last probe; None: the first one did not end, and there was none since."""
    probe_loss: float = math.inf
    """Its extra seconds over a plain round, in units of a plain round."""
    current: int = field(init=False)

    def __post_init__(self) -> None:
        self.rates = AcceptanceRates(self.max_num_tokens)
        self.current = self.max_num_tokens

    def num_tokens(self, num_rows: int) -> int:
        self.confidence_by_row = None
        self.num_rounds += 1
        probe = self._probe()
        self.is_probe = probe is not None
        if num_rows != self.num_rows or probe is not None:
            self.num_rows, self.next_review = num_rows, 0
        if probe is None and self.num_rounds >= self.next_review:
            self._review()
        self.num_requested = self.current if probe is None else probe
        if self.num_requested == 0:
            self.last_plain = self.num_rounds
        return self.num_requested

    def _probe(self) -> int | None:
        """The K to try in this round regardless of the measurements; None: no probe is due."""
        if self.num_rounds <= self.max_num_tokens + 1:
            self.last_full = 1
            return self.max_num_tokens + 1 - self.num_rounds  # most, most - 1, ..., 0
        since = self.num_rounds - self.last_full
        share = self.first_probe_share if since > self.last_full else self.probe_share
        if since * share > self.probe_loss:
            self.last_full = self.num_rounds
            return self.max_num_tokens
        return 0 if (self.num_rounds - self.last_plain) * self.probe_share > 1 else None

    def _review(self) -> None:
        self.next_review = self.num_rounds + min(self.review_rounds, 1 + self.num_rounds // 16)
        cost = self.costs.model(self.max_num_tokens)
        if cost is None:  # no round has ended so far
            return
        speeds = speeds_by_num_tokens(self.rates.conditional(), cost, self.num_rows, self.rates.offers())
        best = best_num_tokens(speeds)
        if speeds[best] <= speeds[0] * (1 + self.margin):
            self.current = 0
        elif speeds[best] > speeds[self.current] * (1 + self.margin):
            self.current = best
        guessed_s = cost.round_s(self.max_num_tokens, self.num_rows * (1 + self.max_num_tokens))
        probe_s = guessed_s if self.probe_s is None else self.probe_s
        self.probe_loss = max(probe_s / cost.round_s(0, self.num_rows) - 1, LEAST_PROBE_LOSS)

    def shorten(self, proposal: Proposal) -> Proposal:
        """Drop drafts that are not worth verifying. Chains of point masses only: drawn drafts may not be selected."""
        if proposal.probs_BKV is not None or proposal.parents_K is not None:
            return proposal
        if proposal.confidence_BK is not None:
            self.confidence_by_row = proposal.confidence_BK.tolist()
        cost = self.costs.model(self.max_num_tokens)
        if self.is_probe or cost is None:
            return proposal  # verified in full: drafts that are never verified would never be found to be good
        has_draft_BK = (proposal.token_ids_BK >= 0).cpu()
        rate_BK = self._rate_of_each(has_draft_BK)
        if rate_BK is None:
            return proposal
        length_B = lengths_within_budget(rate_BK.masked_fill(~has_draft_BK, -1.0), cost)
        length_B1 = length_B[:, None].to(proposal.token_ids_BK.device)
        slot_K = torch.arange(int(length_B.max()), device=length_B1.device)
        token_ids_BK = proposal.token_ids_BK[:, : len(slot_K)].masked_fill(slot_K >= length_B1, -1)
        return Proposal(token_ids_BK)

    def _rate_of_each(self, has_draft_BK: Tensor) -> Tensor | None:
        """P(accepted) of each slot [B, K] by the drafter's confidence, or else by past rounds; None where every row has
        all its drafts: then the choice of K has taken account of it."""
        if self.confidence_by_row is not None:
            return torch.tensor([[self.fit.rate(prob) for prob in row] for row in self.confidence_by_row])
        if bool(has_draft_BK.all()) or not has_draft_BK.numel():
            return None
        return torch.tensor(self.rates.when_offered()[: has_draft_BK.shape[1]]).expand(has_draft_BK.shape)

    def observe(
        self,
        depths: Sequence[int],
        num_accepted: Sequence[int],
        *,
        verify_s: float,
        other_s: float,
        rows: Sequence[int] = (),
    ) -> None:
        """Record one round: per request the depth of its verified drafts, the number accepted and its row; and the cost
        in seconds. A tree counts by its depth: trees of one depth cost the same."""
        if self.is_probe and self.num_requested == self.max_num_tokens:
            self.probe_s = verify_s + other_s
        self.rates.observe(self.num_requested, depths, num_accepted)
        num_scored = self.num_rows * (1 + max(depths))
        self.costs.observe(self.num_requested, num_scored, verify_s=verify_s, other_s=other_s)
        if self.confidence_by_row is not None:
            for row, depth, accepted in zip(rows, depths, num_accepted, strict=True):
                for slot in range(min(depth, accepted + 1)):
                    self.fit.observe(self.confidence_by_row[row][slot], slot < accepted)
