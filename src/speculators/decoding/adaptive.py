"""How many tokens to draft: expected tokens a round against its measured cost. K = 0, plain decoding, always competes.

Shapes: B sequences, K draft slots. Conditional rate a_i = P(slot i accepted | the slots before it were); survival =
their running product; expected tokens of a round = 1 + sum of survivals.

    speed(K) = (1 + sum_{k<=K} prod_{i<=k} a_i) / (other_s(K) + verify_s(tokens scored))

Lossless adaptation looks only at what precedes the token it decides about. Whether slot i is drafted may depend on the
context, on d_1..d_{i-1} and on the LAW q_i (its largest probability, say), never on the token drawn from q_i: keeping
only well-liked draws changes the law of what is verified. For point-mass drafts d_i is a function of the context, so
anything known before verification may be used (`lengths_within_budget`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculators.decoding.calibration import ConfidenceFit
from speculators.decoding.round_costs import CostMeter, CostModel
from speculators.interfaces import Proposal


def expected_tokens(conditional_rates: Sequence[float]) -> float:
    """Tokens a round emits on average, the recovered or bonus token included."""
    survival, total = 1.0, 1.0
    for rate in conditional_rates:
        survival *= rate
        total += survival
    return total


def expected_columns(offer_rates: Sequence[float], batch_size: int) -> float:
    """Columns a forward scores on average: slot i is one of them when any of the rows has a draft there."""
    return 1.0 + sum(1.0 - (1.0 - rate) ** batch_size for rate in offer_rates)


def speeds_by_num_tokens(
    conditional_rates: Sequence[float], cost: CostModel, batch_size: int = 1, offer_rates: Sequence[float] | None = None
) -> list[float]:
    """Tokens a second of each row, by K. `offer_rates`: P(a row has a draft in slot i, which was asked for), or 1."""
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

    A forward is as wide as its longest row, so what is chosen is the width; all drafts are paid for. A confidence below
    0 marks a slot without a draft.
    """
    B, K = confidence_BK.shape
    survival_BK = confidence_BK.double().clamp_min(0).cumprod(-1)
    emitted_K = B + survival_BK.sum(0).cumsum(0).cpu()
    tokens = torch.cat([emitted_K.new_full((1,), B), emitted_K])
    num_drafted = min(K, len(cost.other_s) - 1)
    round_s = torch.tensor([cost.round_s(num_drafted, B * (1 + width)) for width in range(K + 1)], dtype=torch.float64)
    width = int((tokens / round_s).argmax())
    return (survival_BK[:, :width] > 0).sum(-1)


@dataclass
class AcceptanceRates:
    """Conditional rates per slot from the rounds so far, the past fading out; and how often a slot had a draft.

    What is left is filled up by the prior, weighted as `prior_tests` tests: a slot that was not tried for long is
    judged by it again, so it will be tried if the prior makes it worth while. While nothing at all is drafted that
    waits for the next draft: a drafter that was left alone is dear to ask, and not to be asked on a mere prior.
    """

    num_slots: int
    prior_rate: float = 0.6
    prior_tests: float = 2.0
    memory_rounds: float = 200.0
    """Rounds after which an observation counts 1/e."""
    num_silent: int = 0
    """Rounds without drafts since the last one with."""
    tested: list[float] = field(init=False)
    tried: list[float] = field(init=False)
    """The tests in which there was a draft."""
    accepted: list[float] = field(init=False)
    asked: list[float] = field(init=False)
    offered: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.tested, self.tried, self.accepted, self.asked, self.offered = ([0.0] * self.num_slots for _ in range(5))

    def observe(self, num_asked: int, num_drafted: Sequence[int], num_accepted: Sequence[int]) -> None:
        """One round, by row: slots 0..accepted - 1 passed, the next one failed (or had no draft) unless all passed."""
        if num_asked == 0:
            self.num_silent += 1
            return
        keep = math.exp(-(1 + self.num_silent) / self.memory_rounds)
        self.num_silent = 0
        for counts in (self.tested, self.tried, self.accepted, self.asked, self.offered):
            counts[:] = [count * keep for count in counts]
        for drafted, accepted in zip(num_drafted, num_accepted, strict=True):
            for slot in range(min(num_asked, self.num_slots)):
                self.asked[slot] += 1
                self.offered[slot] += slot < drafted
                if slot <= accepted:
                    self.tested[slot] += 1
                    self.tried[slot] += slot < drafted
                    self.accepted[slot] += slot < accepted

    def conditional(self) -> list[float]:
        return self._rates(self.tested)

    def when_offered(self) -> list[float]:
        """P(slot i accepted | it has a draft, the slots before it were accepted)."""
        return self._rates(self.tried)

    def _rates(self, tests: list[float]) -> list[float]:
        rates, rate = [], self.prior_rate
        for tested, accepted in zip(tests, self.accepted, strict=True):
            # an untested slot is taken for as good as the one before it
            rate = (accepted + rate * self.prior_tests) / (tested + self.prior_tests)
            rates.append(rate)
        return rates

    def offers(self) -> list[float]:
        """P(a row has a draft in the slot, when asked for it); 1 before it was."""
        return [
            (offered + self.prior_tests) / (asked + self.prior_tests)
            for offered, asked in zip(self.offered, self.asked, strict=True)
        ]


LEAST_PROBE_LOSS = 0.2
"""In plain rounds: costs are noisy, and a probe that seemed free is not to follow on another."""


@dataclass
class AdaptiveLength:
    """K for each round from what the rounds before it showed. Use as `num_tokens(num_rows)`; then `observe`. Rows are
    those of the forward, idle ones included: they cost as much. Between the two, `shorten` drops drafts that do not
    pay: by what their drafter thinks of them, or because too few rows have one.

    It starts with one round of each K, and drafts at full length now and then (else a drafter that got better would
    never be noticed) so seldom that it costs `probe_share` of the time; more often at first, when little is known. What
    a probe costs is measured: a drafter that was left alone has much to catch up on. As seldom it decodes plainly where
    it drafts, so that what it compares with stays known. A new K must be `margin` faster than the current one, and than
    plain decoding: noise is no reason to draft. It is reviewed every few rounds, for a review takes its time too.
    """

    most: int
    probe_share: float = 0.01
    first_probe_share: float = 0.02
    margin: float = 0.02
    review_rounds: int = 8
    rates: AcceptanceRates = field(init=False)
    costs: CostMeter = field(default_factory=CostMeter)
    fit: ConfidenceFit = field(default_factory=ConfidenceFit)
    confidence_by_row: list[list[float]] | None = None
    """What the drafter thought of this round's drafts."""
    asked: int = 0
    num_rows: int = 0
    num_rounds: int = 0
    next_review: int = 0
    last_full: int = 0
    """The last round that was drafted at full length to see what comes of it."""
    last_plain: int = 0
    is_probe: bool = False
    probe_s: float | None = None
    """What that round cost; None: the first one was broken off, and none was made since."""
    probe_loss: float = math.inf
    """What it cost beyond a plain round, in plain rounds."""
    current: int = field(init=False)

    def __post_init__(self) -> None:
        self.rates = AcceptanceRates(self.most)
        self.current = self.most

    def num_tokens(self, num_rows: int) -> int:
        self.confidence_by_row = None
        self.num_rounds += 1
        probe = self._probe()
        self.is_probe = probe is not None
        if num_rows != self.num_rows or probe is not None:
            self.num_rows, self.next_review = num_rows, 0
        if probe is None and self.num_rounds >= self.next_review:
            self._review()
        self.asked = self.current if probe is None else probe
        if self.asked == 0:
            self.last_plain = self.num_rounds
        return self.asked

    def _probe(self) -> int | None:
        """The length to try in this round whatever is known, if it is time to."""
        if self.num_rounds <= self.most + 1:
            self.last_full = 1
            return self.most + 1 - self.num_rounds  # most, most - 1, ..., 0
        since = self.num_rounds - self.last_full
        share = self.first_probe_share if since > self.last_full else self.probe_share
        if since * share > self.probe_loss:
            self.last_full = self.num_rounds
            return self.most
        return 0 if (self.num_rounds - self.last_plain) * self.probe_share > 1 else None

    def _review(self) -> None:
        self.next_review = self.num_rounds + min(self.review_rounds, 1 + self.num_rounds // 16)
        cost = self.costs.model(self.most)
        if cost is None:  # every round so far was broken off
            return
        speeds = speeds_by_num_tokens(self.rates.conditional(), cost, self.num_rows, self.rates.offers())
        best = best_num_tokens(speeds)
        if speeds[best] <= speeds[0] * (1 + self.margin):
            self.current = 0
        elif speeds[best] > speeds[self.current] * (1 + self.margin):
            self.current = best
        guessed_s = cost.round_s(self.most, self.num_rows * (1 + self.most))
        probe_s = guessed_s if self.probe_s is None else self.probe_s
        self.probe_loss = max(probe_s / cost.round_s(0, self.num_rows) - 1, LEAST_PROBE_LOSS)

    def shorten(self, proposal: Proposal) -> Proposal:
        """Chains of point masses only: a draft that was drawn may not be dropped for what it is."""
        if proposal.probs_BKV is not None or proposal.parents_K is not None:
            return proposal
        if proposal.confidence_BK is not None:
            self.confidence_by_row = proposal.confidence_BK.tolist()
        cost = self.costs.model(self.most)
        if self.is_probe or cost is None:
            return proposal  # verified as they are: what is never verified cannot be found to be better than it says
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
        """P(accepted) of each slot [B, K] by its drafter's word, or else by how such slots fared; None where the choice
        of K has said it already: every row has all its drafts."""
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
        """One round: of each request how deep the drafts went that were verified, how many were accepted and which row
        it has; and what the round cost. A tree counts as deep as it is: it costs the same whenever it is that deep."""
        if self.is_probe and self.asked == self.most:
            self.probe_s = verify_s + other_s
        self.rates.observe(self.asked, depths, num_accepted)
        num_scored = self.num_rows * (1 + max(depths))
        self.costs.observe(self.asked, num_scored, verify_s=verify_s, other_s=other_s)
        if self.confidence_by_row is not None:
            for row, depth, accepted in zip(rows, depths, num_accepted, strict=True):
                for slot in range(min(depth, accepted + 1)):
                    self.fit.observe(self.confidence_by_row[row][slot], slot < accepted)
