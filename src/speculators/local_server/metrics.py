"""What the local server counts and times, and how Prometheus reads it: names, labels and bounds are vLLM's.

Of one sample of a request, by one clock:

    arrived   queued      scheduled       first tokens    further tokens     last tokens
       |        |---queue-----|---prefill------|------------decode---------------|
       |--------time to first token------------|             |----inference from `scheduled` on
       |--------------------e2e----------------------------------(to its end)----|

A round may bring several tokens: the time between two rounds of a sample is one inter-token latency, as in vLLM. The
round that ends a prompt also decodes: what both bring comes out together, and nothing passes between them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from speculators.decoding.request import ActiveRequest, StreamEvent
from speculators.decoding.stats import DecodeStats

# vLLM 0.32, v1/metrics/buckets.py
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...] | None]] = {
    "time_to_first_token_seconds": ("From the arrival of a request to its first tokens.", FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between two rounds that bring tokens to a request.", BETWEEN_TOKENS_S),
    "request_time_per_output_token_seconds": ("Decoding per token after the first, by request.", BETWEEN_TOKENS_S),
    "e2e_request_latency_seconds": ("From the arrival of a request to its end.", REQUEST_S),
    "request_queue_time_seconds": ("Waiting for a row of the batch.", REQUEST_S),
    "request_inference_time_seconds": ("In the batch, from its row to its last tokens.", REQUEST_S),
    "request_prefill_time_seconds": ("From its row in the batch to its first tokens.", REQUEST_S),
    "request_decode_time_seconds": ("From its first tokens to its last ones.", REQUEST_S),
    "request_prompt_tokens": ("Tokens of the prompt, by request.", None),
    "request_generation_tokens": ("Generated tokens, by request.", None),
}
"""Name -> (what it shows, upper bounds; None: 1, 2, 5, 10, 20, 50, ... up to the longest prompt plus answer)."""
REASONS = ("stop", "length", "abort", "error", "repetition")
"""vLLM's words for the end of a request."""
REASON_OF_VLLM = {"cancelled": "abort"}


@dataclass
class Histogram:
    """Counts values by the bound below which they lie, and adds them up."""

    bounds: Sequence[float]
    """Ascending; a value counts in the first bound that is not below it."""
    counts: list[int] = field(default_factory=list)
    """One more than `bounds`: the last is of what is above them."""
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        return Histogram(self.bounds, list(self.counts), self.total)


@dataclass
class Times:
    """When one sample of a request reached what the drawing above names, by one clock; None: not yet."""

    arrived_s: float
    queued_s: float
    scheduled_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None


class RequestTimes:
    """Times the requests of one engine: told of its rounds, of arrivals and of what each round brings."""

    def __init__(self, max_length: int):
        bounds_of_tokens = tuple(one_two_five(max_length))
        self.histograms = {name: Histogram(bounds or bounds_of_tokens) for name, (_, bounds) in HISTOGRAMS.items()}
        self._times: dict[int, tuple[ActiveRequest, Times]] = {}
        """By the identity of the sample."""
        self._round_s = 0.0

    def arrived(self, request: ActiveRequest, arrived_s: float, now_s: float) -> None:
        """Begins to time a sample: its connection asked at `arrived_s`, and it waits for a row from `now_s` on."""
        self._times[id(request)] = request, Times(arrived_s, now_s)

    def round_begins(self, now_s: float) -> None:
        """Requests whose prompts were read meanwhile took their rows at the beginning of the round before."""
        for request, times in self._times.values():
            if times.scheduled_s is None and request.num_prefilled:
                times.scheduled_s = self._round_s
        self._round_s = now_s

    def gained(self, request: ActiveRequest, event: StreamEvent, now_s: float) -> None:
        """Takes note of a round's tokens, and of the end. What was cancelled is timed up to its last tokens alone."""
        times = self._times[id(request)][1]
        if times.scheduled_s is None:
            times.scheduled_s = self._round_s
        if event.token_ids:
            if times.first_s is None:
                times.first_s = now_s
                self.histograms["time_to_first_token_seconds"].observe(now_s - times.arrived_s)
            elif times.last_s is not None and times.last_s < self._round_s:
                self.histograms["inter_token_latency_seconds"].observe(now_s - times.last_s)
            times.last_s = now_s
        if event.finish_reason is not None:
            del self._times[id(request)]
            if event.finish_reason != "cancelled":
                self._ended(request, times, now_s)

    def _ended(self, request: ActiveRequest, times: Times, now_s: float) -> None:
        """Observes the lengths of a sample that ended now; what it never reached it reaches now."""
        scheduled_s = now_s if times.scheduled_s is None else times.scheduled_s
        first_s = now_s if times.first_s is None else times.first_s
        last_s = now_s if times.last_s is None else times.last_s
        num_tokens = len(request.output.token_ids)
        values = {
            "e2e_request_latency_seconds": now_s - times.arrived_s,
            "request_queue_time_seconds": scheduled_s - times.queued_s,
            "request_prefill_time_seconds": first_s - scheduled_s,
            "request_decode_time_seconds": last_s - first_s,
            "request_inference_time_seconds": last_s - scheduled_s,
            "request_time_per_output_token_seconds": (last_s - first_s) / max(num_tokens - 1, 1),
            "request_prompt_tokens": len(request.prompt),
            "request_generation_tokens": num_tokens,
        }
        for name, value in values.items():
            self.histograms[name].observe(value)

    def forget(self) -> None:
        """The requests that run were ended without a word."""
        self._times.clear()


def one_two_five(most: int) -> Iterator[float]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    unit = 1
    while True:
        for value in (unit, 2 * unit, 5 * unit):
            if value > most:
                return
            yield float(value)
        unit *= 10


@dataclass(frozen=True)
class Counts:
    """What an engine did since it began to serve."""

    stats: DecodeStats
    num_prompt_tokens: int
    num_finished: Counter[str]
    """By reason."""
    num_running: int
    num_waiting: int
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    """By the names of `HISTOGRAMS`."""


def prometheus_text(counts: Counts, model_name: str, num_drafts: int) -> str:
    """Counters, gauges and histograms in Prometheus' text format; those of drafts where something drafts (`num_drafts`,
    the number of those that ask for no other, is above 0), which is how a client sees that it does."""
    label, stats, lines = f'engine="0",model_name="{escaped(model_name)}"', counts.stats, list[str]()

    def family(name: str, kind: str, told: str, values: Mapping[str, float]) -> None:
        """`values`: of each further label."""
        lines.extend([f"# HELP vllm:{name} {told}", f"# TYPE vllm:{name} {kind}"])
        lines.extend(f"vllm:{name}{{{label}{further}}} {value}" for further, value in values.items())

    family("num_requests_running", "gauge", "Requests in rows of the batch.", {"": counts.num_running})
    family("num_requests_waiting", "gauge", "Requests that wait for a row.", {"": counts.num_waiting})
    family("prompt_tokens_total", "counter", "Tokens of prompts that were taken in.", {"": counts.num_prompt_tokens})
    family("generation_tokens_total", "counter", "Generated tokens.", {"": stats.num_tokens})
    ended = Counter(dict.fromkeys(REASONS, 0))
    for reason, number in counts.num_finished.items():
        ended[REASON_OF_VLLM.get(reason, reason)] += number
    reasons = {f',finished_reason="{reason}"': number for reason, number in ended.items()}
    family("request_success_total", "counter", "Requests that ended, by reason.", reasons)
    if num_drafts:
        accepted = stats.accepted_per_position
        accepted += [0] * (num_drafts - len(accepted))
        positions = {f',position="{position}"': number for position, number in enumerate(accepted)}
        drafts, tokens, kept = stats.num_drafts, stats.num_drafted, stats.num_accepted
        family("spec_decode_num_drafts_total", "counter", "Rounds in which something was drafted.", {"": drafts})
        family("spec_decode_num_draft_tokens_total", "counter", "Drafted tokens.", {"": tokens})
        family("spec_decode_num_accepted_tokens_total", "counter", "Accepted drafts.", {"": kept})
        told = "Accepted drafts, by position from 0."
        family("spec_decode_num_accepted_tokens_per_pos_total", "counter", told, positions)
    for name, histogram in counts.histograms.items():
        family(name, "histogram", HISTOGRAMS[name][0], {})
        bounds = [*map(str, histogram.bounds), "+Inf"]
        for bound, number in zip(bounds, accumulate(histogram.counts), strict=True):
            lines.append(f'vllm:{name}_bucket{{{label},le="{bound}"}} {number}')
        lines.append(f"vllm:{name}_sum{{{label}}} {histogram.total}")
        lines.append(f"vllm:{name}_count{{{label}}} {sum(histogram.counts)}")
    return "\n".join(lines) + "\n"


def escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
