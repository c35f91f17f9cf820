"""Statistics of a decode run: one histogram of rounds, and times. Everything else is derived, so runs add with `+`.

A round = one propose + verify for one request. Definitions are vLLM's (`vllm:spec_decode_*`), except for rounds in
which nothing was drafted (a lookup found nothing, K = 0): vLLM leaves them out.

    acceptance_length                1 + accepted / rounds      tokens per verify step; speed follows from it
    acceptance_length_when_drafted   1 + accepted / drafts      vLLM's "mean acceptance length"; drafts = `num_drafts`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

RECOVERED, BONUS, UNDRAFTED = "recovered", "bonus", "verifier"
"""Who wrote a token that is no draft: the verifier, after a draft that it rejected, after drafts that it accepted all,
or where nothing was drafted."""


def authors_of(num_tokens: int, num_accepted: int, draft_depth: int) -> list[str]:
    """Who wrote each token of a round: `draft 1`, `draft 2`, ... by position, then the verifier."""
    drafts = [f"draft {position}" for position in range(1, num_accepted + 1)]
    own = RECOVERED if num_accepted < draft_depth else BONUS if draft_depth else UNDRAFTED
    return drafts + [own] * (num_tokens - num_accepted)


@dataclass
class DecodeStats:
    """Counts and seconds of one request, or of many (they add)."""

    rounds: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """How many rounds had (drafts offered, deepest draft, drafts accepted). Offered = deepest for a chain."""
    num_tokens: int = 0
    """Emitted tokens, including the first one (from the prompt), without those cut off by a stop."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    overhead_s: float = 0.0
    """Everything but the proposer and the verifier. Times of a round are split evenly over its requests."""
    prefill_s: float = 0.0
    num_non_finite: int = 0
    """Requests that ended because the verifier's scores were not finite (finish reason "error")."""
    num_dropped_drafts: int = 0
    """Drafts that were left out: drawn from scores that were not finite, or of tokens outside the vocabulary."""

    def record(self, num_drafted: int, depth: int, num_accepted: int) -> None:
        self.rounds[num_drafted, depth, num_accepted] += 1

    def spend(self, draft_s: float, verify_s: float, overhead_s: float) -> None:
        self.draft_s += draft_s
        self.verify_s += verify_s
        self.overhead_s += overhead_s

    def __add__(self, other: DecodeStats) -> DecodeStats:
        return DecodeStats(
            self.rounds + other.rounds,
            self.num_tokens + other.num_tokens,
            self.draft_s + other.draft_s,
            self.verify_s + other.verify_s,
            self.overhead_s + other.overhead_s,
            self.prefill_s + other.prefill_s,
            self.num_non_finite + other.num_non_finite,
            self.num_dropped_drafts + other.num_dropped_drafts,
        )

    @property
    def num_rounds(self) -> int:
        return self.rounds.total()

    @property
    def num_drafts(self) -> int:
        """Rounds in which something was drafted (vLLM's num_drafts)."""
        return sum(count for (drafted, _, _), count in self.rounds.items() if drafted)

    @property
    def num_drafted(self) -> int:
        return sum(drafted * count for (drafted, _, _), count in self.rounds.items())

    @property
    def num_accepted(self) -> int:
        return sum(accepted * count for (_, _, accepted), count in self.rounds.items())

    @property
    def accepted_histogram(self) -> list[int]:
        """[n] = rounds that accepted exactly n drafts; as long as the deepest draft, plus one."""
        histogram = [0] * (1 + max((depth for _, depth, _ in self.rounds), default=0))
        for (_, _, accepted), count in self.rounds.items():
            histogram[accepted] += count
        return histogram

    @property
    def drafted_per_position(self) -> list[int]:
        """[i] = rounds whose draft reached position i (0-based)."""
        return [self._count(lambda depth, accepted, i=i: depth > i) for i in range(self._max_depth)]

    @property
    def accepted_per_position(self) -> list[int]:
        """[i] = rounds that accepted at least i + 1 drafts."""
        return [self._count(lambda depth, accepted, i=i: accepted > i) for i in range(self._max_depth)]

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per verify step, recovered or bonus token included; rounds without drafts count too."""
        return 1.0 + self.num_accepted / self.num_rounds if self.num_rounds else 1.0

    @property
    def acceptance_length_when_drafted(self) -> float:
        """The same over the rounds in which something was drafted: vLLM's mean acceptance length."""
        return 1.0 + self.num_accepted / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def conditional_rates(self) -> list[float]:
        """[i] = share of rounds accepting position i, of those that accepted all before it and drafted it."""
        rates = []
        for i in range(self._max_depth):
            reached = self._count(lambda depth, accepted, i=i: depth > i and accepted >= i)
            accepted_i = self._count(lambda depth, accepted, i=i: accepted > i)
            rates.append(accepted_i / reached if reached else 0.0)
        return rates

    @property
    def _max_depth(self) -> int:
        return max((depth for _, depth, _ in self.rounds), default=0)

    def _count(self, holds: Callable[..., bool]) -> int:
        return sum(count for (_, depth, accepted), count in self.rounds.items() if holds(depth, accepted))
