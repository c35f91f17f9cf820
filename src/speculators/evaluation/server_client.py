"""Asks a running vLLM server, many clients at once, and reads what it counted between two readings of its /metrics.

    vllm:spec_decode_num_drafts_total                          rounds in which something was drafted
    vllm:spec_decode_num_draft_tokens_total                    drafts offered
    vllm:spec_decode_num_accepted_tokens_total                 drafts accepted
    vllm:spec_decode_num_accepted_tokens_per_pos_total{position="i"}   rounds that accepted more than i drafts
    vllm:generation_tokens_total, vllm:prefix_cache_hits_total

Counters grow over the server's life and restart at 0 with it; engines (data parallel) and models are summed.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from operator import add
from typing import Any

import httpx

from speculators.data_generation.endpoints import generated_token_ids
from speculators.data_generation.vllm_client import (
    InvalidResponseError,
    TransientError,
    checked_json,
    first_choice,
    make_client,
    retry_after_s,
    served_model,
    with_retries,
)
from speculators.decoding.settings import SamplingParams
from speculators.decoding.stats import DecodeStats
from speculators.evaluation.measurement import Measurement, seeded_by_prompt

SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+\d+)?$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
PREFIX = "vllm:spec_decode_num_"


ALWAYS_SENT = ("max_tokens", "temperature", "top_p", "min_p", "repetition_penalty")
"""Left out, vLLM takes some of them from the verifier's generation_config.json."""
SENT_IF_SET = (
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "bad_words",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
)


def completion_request(model: str, prompt: Sequence[int], sampling: SamplingParams) -> dict[str, object]:
    """The request in vLLM's form, where the settings have the same names."""
    sampling = seeded_by_prompt(sampling, prompt)
    changed = [name for name in SENT_IF_SET if getattr(sampling, name) != getattr(SamplingParams, name)]
    request = {name: getattr(sampling, name) for name in (*ALWAYS_SENT, *changed)}
    if sampling.seed is not None:
        request["seed"] = sampling.seed
    top_k = sampling.top_k or -1  # vLLM writes "all" as -1
    return {"model": model, "prompt": list(prompt), "return_token_ids": True, "top_k": top_k, **request}


class ServerRestartedError(RuntimeError):
    """The counters went backwards: the server was restarted during the measurement."""


class MeasuredServer:
    """One server and its counters."""

    def __init__(self, url: str, *, timeout_s: float, max_retries: int, max_clients: int) -> None:
        """`url`: with or without the `/v1` of its endpoint."""
        self.base_url = url.rstrip("/").removesuffix("/v1")
        self.max_retries = max_retries
        self.client = make_client(f"{self.base_url}/v1", timeout_s=timeout_s, num_connections=max_clients + 1)
        self.pool = ThreadPoolExecutor(max_clients)
        try:
            self.served = served_model(self.client, max_retries=max_retries)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.client.close()

    def counters(self) -> ServerCounters:
        return parse_metrics(get_text(self.client, f"{self.base_url}/metrics", max_retries=self.max_retries))

    def measure(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> tuple[Measurement, ServerCounters]:
        """All prompts at once, a client each; the clock stops with the last answer."""
        before = self.counters()
        start_s = time.perf_counter()
        futures = [self.pool.submit(self.answer, sampling, prompt) for prompt in prompts]
        try:
            token_ids = tuple(tuple(future.result()) for future in futures)
        finally:
            for future in futures:
                future.cancel()
        time_s = time.perf_counter() - start_s
        num_tokens = sum(map(len, token_ids))
        counted = self.counters_after(before, num_tokens).since(before)
        if counted.went_backwards or counted.num_generated < num_tokens:
            raise ServerRestartedError(f"the counters of {self.base_url} restarted")
        return Measurement(token_ids, time_s, stats_of(counted, num_tokens, len(prompts))), counted

    def counters_after(self, before: ServerCounters, num_tokens: int) -> ServerCounters:
        """The counters after the answers. The front end updates them a moment after it hands out the last token."""
        deadline = time.monotonic() + 2.0
        while True:
            now = self.counters()
            if now.num_generated - before.num_generated >= num_tokens or time.monotonic() > deadline:
                return now
            time.sleep(0.02)

    def answer(self, sampling: SamplingParams, prompt: Sequence[int]) -> list[int]:
        request = completion_request(self.served.name, prompt, sampling)
        body = complete(self.client, request, max_retries=self.max_retries)
        token_ids = generated_token_ids(first_choice(body))
        if token_ids is None:
            raise InvalidResponseError(f"{self.base_url} returns no token_ids; vLLM does from 0.10 on")
        return token_ids


@with_retries
def complete(client: httpx.Client, request: dict[str, object]) -> dict[str, object]:
    return checked_json(client.post("completions", json=request))


@with_retries
def get_text(client: httpx.Client, url: str) -> str:
    response = client.get(url)
    if response.status_code != 200:
        raise TransientError(f"{url} answered {response.status_code}", retry_after_s(response))
    return response.text


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
        # a server that drafts by several methods counts deeper positions when it first drafts them
        positions = zip_longest(self.accepted_per_position, earlier.accepted_per_position, fillvalue=0)
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
    # Offered drafts are known in all, not per round: spread evenly, which leaves every sum as it was counted.
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


@dataclass(frozen=True)
class Served:
    """What a server answered, and what it counted meanwhile."""

    answers: list[list[int]]
    stats: DecodeStats
    num_drafts: int
    """Rounds in which something was drafted."""
    rounds_by_prompt: list[tuple[int, ...]]
    """Prompt -> rounds that accepted at least i drafts, of those in which something was drafted."""
    speculates: bool

    @property
    def accepted_per_position(self) -> list[int]:
        return [sum(column) for column in zip_longest(*self.rounds_by_prompt, fillvalue=0)][1:]

    @property
    def by_position(self) -> list[float]:
        return [count / max(self.num_drafts, 1) for count in self.accepted_per_position]

    @property
    def draft_tokens(self) -> float:
        """Draft tokens of a round, on average."""
        return self.stats.num_drafted / max(self.num_drafts, 1)

    def facts(self) -> dict[str, Any]:
        if not self.speculates:
            return {"the server drafts": "nothing"}
        return {
            "acceptance length, server": 1 + self.stats.num_accepted / max(self.num_drafts, 1),
            "accepted by position, server": self.by_position,
            "draft tokens per round, server": self.draft_tokens,
        }


def ask(server: MeasuredServer, prompts: Sequence[list[int]], sampling: SamplingParams) -> Served:
    """Asks prompt by prompt: batches would change the order of sums."""
    found = [server.measure([prompt], sampling) for prompt in prompts]
    return Served(
        [list(measurement.token_ids[0]) for measurement, _ in found],
        reduce(add, (measurement.stats for measurement, _ in found)),
        sum(counted.num_drafts for _, counted in found),
        [(counted.num_drafts, *counted.accepted_per_position) for _, counted in found],
        any(counted.speculates for _, counted in found),
    )
