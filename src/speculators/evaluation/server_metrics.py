"""What a vLLM server counted between two readings of its /metrics, as our own statistics.

    vllm:spec_decode_num_drafts_total                          rounds in which something was drafted
    vllm:spec_decode_num_draft_tokens_total                    drafts offered
    vllm:spec_decode_num_accepted_tokens_total                 drafts accepted
    vllm:spec_decode_num_accepted_tokens_per_pos_total{position="i"}   rounds that accepted more than i drafts
    vllm:generation_tokens_total, vllm:prefix_cache_hits_total

Counters grow over the server's life and restart at 0 with it; engines (data parallel) and models are summed.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from speculators.decoding.stats import DecodeStats

SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+\d+)?$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class ServerCounters:
    """One reading, or the difference of two."""

    num_drafts: int
    num_drafted: int
    num_accepted: int
    accepted_per_position: tuple[int, ...]
    """[i] = rounds that accepted at least i + 1 drafts. As long as the longest draft: K."""
    num_generated: int
    num_cached_prompt_tokens: int
    speculates: bool = True
    """False: the server has no such counters, because nothing drafts."""

    def since(self, earlier: ServerCounters) -> ServerCounters:
        positions = zip(self.accepted_per_position, earlier.accepted_per_position, strict=True)
        return ServerCounters(
            self.num_drafts - earlier.num_drafts,
            self.num_drafted - earlier.num_drafted,
            self.num_accepted - earlier.num_accepted,
            tuple(now - before for now, before in positions),
            self.num_generated - earlier.num_generated,
            self.num_cached_prompt_tokens - earlier.num_cached_prompt_tokens,
            self.speculates,
        )

    @property
    def went_backwards(self) -> bool:
        return min(self.num_drafts, self.num_drafted, self.num_accepted, self.num_generated) < 0


def parse_metrics(text: str) -> ServerCounters:
    """From Prometheus' text format."""
    totals: Counter[str] = Counter()
    positions: Counter[int] = Counter()
    names = set()
    for line in text.splitlines():
        sample = SAMPLE.match(line)
        if sample is None or not sample["name"].startswith("vllm:"):
            continue
        name, value = sample["name"], float(sample["value"])
        names.add(name)
        if name == f"{PREFIX}accepted_tokens_per_pos_total":
            labels = dict(LABEL.findall(sample["labels"] or ""))
            positions[int(labels["position"])] += round(value)
        elif value == value:  # a NaN of a summary that saw nothing
            totals[name] += round(value)
    return ServerCounters(
        num_drafts=totals[f"{PREFIX}drafts_total"],
        num_drafted=totals[f"{PREFIX}draft_tokens_total"],
        num_accepted=totals[f"{PREFIX}accepted_tokens_total"],
        accepted_per_position=tuple(positions[i] for i in range(max(positions, default=-1) + 1)),
        num_generated=totals["vllm:generation_tokens_total"],
        num_cached_prompt_tokens=totals["vllm:prefix_cache_hits_total"],
        speculates=f"{PREFIX}drafts_total" in names,
    )


def stats_of(counted: ServerCounters, num_tokens: int, num_requests: int) -> DecodeStats:
    """The counts as rounds: acceptance rate, length and conditional acceptance then mean what they mean elsewhere.

    vLLM counts rounds with a draft only. The others are found from the tokens: each request's first token comes from
    its prompt, and every round emits one token more than it accepts. (Tokens cut off at an answer's end hide at most K
    of them an answer, and none where every round drafts.)
    """
    rounds: Counter[tuple[int, int, int]] = Counter()
    depth = len(counted.accepted_per_position)
    at_least = [counted.num_drafts, *counted.accepted_per_position, 0]
    # Offered drafts are known in all, not a round: spread evenly, which leaves every sum as it was counted.
    offered, longer = divmod(counted.num_drafted, counted.num_drafts) if counted.num_drafts else (0, 0)
    for accepted in range(depth + 1):
        count = at_least[accepted] - at_least[accepted + 1]
        num_longer = min(count, longer)
        longer -= num_longer
        for drafted, share in ((offered + 1, num_longer), (offered, count - num_longer)):
            if share:
                rounds[drafted, depth, accepted] += share
    undrafted = num_tokens - num_requests - counted.num_accepted - counted.num_drafts
    if undrafted > 0:
        rounds[0, 0, 0] += undrafted
    return DecodeStats(rounds, num_tokens)
