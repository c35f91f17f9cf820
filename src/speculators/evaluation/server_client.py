"""A running vLLM server as something to measure: prompts in, answers and counted rounds out, many clients at once."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from speculators.data_generation.vllm_client import (
    InvalidResponseError,
    TransientError,
    checked_json,
    make_client,
    served_model,
    with_retries,
)
from speculators.evaluation.records import Measurement
from speculators.evaluation.server_metrics import ServerCounters, parse_metrics, stats_of


@dataclass(frozen=True)
class Answering:
    """How every request is answered."""

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def request(self, model: str, prompt: Sequence[int]) -> dict[str, object]:
        request: dict[str, object] = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "return_token_ids": True,
        }
        if self.temperature > 0:
            # prompts of one seed would draw alike, and the bootstrap takes them for independent
            request["seed"] = self.seed + zlib.crc32(" ".join(map(str, prompt)).encode())
            request["top_p"] = self.top_p
            request["top_k"] = self.top_k or -1  # vLLM's way of saying "all"
        return request


class ServerRestartedError(RuntimeError):
    """The counters went backwards: what was measured spans two lives of the server."""


class MeasuredServer:
    """One server and its counters."""

    def __init__(self, url: str, *, timeout_s: float, max_retries: int, max_clients: int) -> None:
        """`url`: with or without the `/v1` of its endpoint."""
        self.base_url = url.rstrip("/").removesuffix("/v1")
        self.max_retries = max_retries
        self.client = make_client(f"{self.base_url}/v1", timeout_s=timeout_s, num_connections=max_clients + 1)
        self.served = served_model(self.client, max_retries=max_retries)
        self.pool = ThreadPoolExecutor(max_clients)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.client.close()

    def counters(self) -> ServerCounters:
        return parse_metrics(get_text(self.client, f"{self.base_url}/metrics", max_retries=self.max_retries))

    def measure(self, prompts: Sequence[Sequence[int]], answering: Answering) -> tuple[Measurement, ServerCounters]:
        """All prompts at once, a client each; the clock stops with the last answer."""
        before = self.counters()
        start_s = time.perf_counter()
        futures = [self.pool.submit(self.answer, answering, prompt) for prompt in prompts]
        try:
            token_ids = tuple(tuple(future.result()) for future in futures)
        finally:
            for future in futures:
                future.cancel()
        time_s = time.perf_counter() - start_s
        num_tokens = sum(map(len, token_ids))
        counted = self.settled(before, num_tokens).since(before)
        if counted.went_backwards or counted.num_generated < num_tokens:
            raise ServerRestartedError(f"the counters of {self.base_url} restarted")
        return Measurement(token_ids, time_s, stats_of(counted, num_tokens, len(prompts))), counted

    def settled(self, before: ServerCounters, num_tokens: int) -> ServerCounters:
        """The counters after the answers. The front end updates them a moment after it hands out the last token."""
        deadline = time.monotonic() + 2.0
        while True:
            now = self.counters()
            if now.num_generated - before.num_generated >= num_tokens or time.monotonic() > deadline:
                return now
            time.sleep(0.02)

    def answer(self, answering: Answering, prompt: Sequence[int]) -> list[int]:
        body = complete(self.client, answering.request(self.served.name, prompt), max_retries=self.max_retries)
        choice = (body.get("choices") or [{}])[0]
        if choice.get("token_ids") is None:
            raise InvalidResponseError(f"{self.base_url} returns no token_ids; vLLM does from 0.10 on")
        return list(choice["token_ids"])


@with_retries
def complete(client: httpx.Client, request: dict[str, object]) -> dict[str, object]:
    return checked_json(client.post("completions", json=request))


@with_retries
def get_text(client: httpx.Client, url: str) -> str:
    response = client.get(url)
    if response.status_code != 200:
        raise TransientError(f"{url} answered {response.status_code}")
    return response.text
