"""What `/metrics` counts and times: read by a strict reader of Prometheus' text format, held to vLLM's own logger."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest

from speculators.decoding import DecodeStats, SamplingParams
from speculators.decoding.request import ActiveRequest, RequestOutput, StreamEvent
from speculators.local_server.metrics import Counts, RequestTimes, one_two_five, prometheus_text

LISTED = "1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3,"
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{((?:[a-z_]+=\"(?:[^\"\\\n]|\\[\\n\"])*\",?)*)\} ([0-9.eE+-]+)")
LABEL = re.compile(r"([a-z_]+)=\"((?:[^\"\\]|\\.)*)\"")


@dataclass
class Family:
    kind: str
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = field(default_factory=dict)
    """(suffix of the name, labels) -> value."""

    def value(self, suffix: str = "", **labels: str) -> float:
        """Of the one sample that has these labels among its own."""
        [found] = [v for (end, own), v in self.samples.items() if end == suffix and labels.items() <= dict(own).items()]
        return found

    @property
    def bounds(self) -> list[float]:
        return [float(dict(labels)["le"]) for suffix, labels in self.samples if suffix == "_bucket"]


def read(text: str) -> dict[str, Family]:
    """Refuses what the text format 0.0.4 does not allow: samples outside of their family, a sample twice, histograms
    that do not add up."""
    assert text.endswith("\n")
    families: dict[str, Family] = {}
    name, told = "", ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            told = line.split(" ", 3)[2]
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == told and name not in families and kind in ("counter", "gauge", "histogram")
            assert (kind == "counter") == name.endswith("_total")
            families[name] = Family(kind)
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample is not None and sample[1].startswith(name), line
            key = sample[1].removeprefix(name), frozenset(LABEL.findall(sample[2]))
            assert key[0] in (("_bucket", "_sum", "_count") if families[name].kind == "histogram" else ("",))
            assert key not in families[name].samples
            families[name].samples[key] = float(sample[3])
    for family in families.values():
        if family.kind == "histogram":
            numbers = [value for (suffix, _), value in family.samples.items() if suffix == "_bucket"]
            assert family.bounds == sorted(set(family.bounds)) and family.bounds[-1] == float("inf")
            assert numbers == sorted(numbers) and numbers[-1] == family.value("_count")
    return families


def request(index: int = 0, num_prompt: int = 7) -> ActiveRequest:
    return ActiveRequest(index, SamplingParams(), 0, frozenset(), 64, RequestOutput([0] * num_prompt), None)


def gain(times: RequestTimes, of: ActiveRequest, tokens: list[int], now_s: float, reason: Any = None) -> None:
    of.output.token_ids += tokens
    times.gained(of, StreamEvent(of.index, tokens, "", reason), now_s)


def test_times_are_those_of_a_hand_worked_day():
    times, first, second = RequestTimes(64), request(), request(1)
    times.arrived(first, 1.0, 1.5)
    times.arrived(second, 1.0, 1.5)
    times.round_begins(2.0)  # `first` gets a row, and a chunk of its prompt is read
    first.num_prefilled = 4
    times.round_begins(3.0)  # the rest of the prompt, and a round of drafts: both come out together
    gain(times, first, [1], 4.0)
    gain(times, first, [2, 3], 4.001)
    times.round_begins(5.0)
    gain(times, first, [4, 5, 6], 6.5, "length")
    times.round_begins(7.0)  # `second` gets the row, has one token, and hangs up
    gain(times, second, [1], 8.0)
    times.round_begins(9.0)
    gain(times, second, [], 9.5, "cancelled")
    totals = {name: (sum(h.counts), pytest.approx(h.total)) for name, h in times.histograms.items()}
    assert totals == {
        "time_to_first_token_seconds": (2, 3.0 + 7.0),
        "inter_token_latency_seconds": (1, 6.5 - 4.001),
        "request_time_per_output_token_seconds": (1, 2.5 / 5),
        "e2e_request_latency_seconds": (1, 5.5),
        "request_queue_time_seconds": (1, 0.5),
        "request_inference_time_seconds": (1, 4.5),
        "request_prefill_time_seconds": (1, 2.0),
        "request_decode_time_seconds": (1, 2.5),
        "request_prompt_tokens": (1, 7),
        "request_generation_tokens": (1, 6),
    }


def test_a_value_counts_in_the_first_bound_that_is_not_below_it():
    times = RequestTimes(1000)
    for seconds in (0.001, 0.0011, 0.005, 3000.0):
        times.histograms["time_to_first_token_seconds"].observe(seconds)
    none = Counts(DecodeStats(), 0, Counter(), 0, 0, times.histograms)
    found = read(prometheus_text(none, 'a"b\\c', 0))["vllm:time_to_first_token_seconds"]
    numbers = {bound: found.value("_bucket", le=bound) for bound in ("0.001", "0.005", "0.01", "2560.0", "+Inf")}
    assert numbers == {"0.001": 1, "0.005": 3, "0.01": 3, "2560.0": 3, "+Inf": 4}
    assert found.value("_sum") == pytest.approx(3000.0071) and found.value("_count", model_name='a\\"b\\\\c') == 4
    assert list(one_two_five(60)) == [1, 2, 5, 10, 20, 50] and list(one_two_five(100))[-1] == 100


def test_every_request_is_timed_once_and_its_times_add_up(http, server, monkeypatch):
    def metrics() -> Mapping[str, Family]:
        answer = http.get("/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return read(answer.text)

    def gained(name: str, suffix: str) -> float:
        return after[f"vllm:{name}"].value(suffix) - before[f"vllm:{name}"].value(suffix)

    before, held, submit, arrived = metrics(), threading.Event(), server.api.thread.submit, threading.Semaphore(0)
    monkeypatch.setattr(server.api.thread, "submit", lambda *args: (submit(*args), arrived.release())[0])
    server.api.thread.run(held.wait)
    body = {"prompt": LISTED, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(5) as pool:  # 4 rows: one waits for them
        answers = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60) for _ in range(5)]
        assert all(arrived.acquire(timeout=30) for _ in range(5))
        time.sleep(0.1)
        held.set()
        assert all(answer.result().is_success for answer in answers)
    after = metrics()
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time")
    for name in (*parts, "e2e_request_latency", "time_to_first_token", "request_time_per_output_token"):
        assert gained(f"{name}_seconds", "_count") == 5, name
    queue_s, prefill_s, decode_s, inference_s = (gained(f"{name}_seconds", "_sum") for name in parts)
    assert inference_s == pytest.approx(prefill_s + decode_s)
    assert queue_s > decode_s / 10  # the fifth waited for one of the others
    whole_s = gained("e2e_request_latency_seconds", "_sum")
    assert whole_s >= 0.1 * 5 + queue_s + inference_s  # all waited for the engine's thread before they queued
    assert gained("time_to_first_token_seconds", "_sum") == pytest.approx(whole_s - decode_s, rel=0.05)
    assert gained("inter_token_latency_seconds", "_sum") <= decode_s * 1.01
    assert 5 <= gained("inter_token_latency_seconds", "_count") <= 5 * 11
    assert gained("request_time_per_output_token_seconds", "_sum") == pytest.approx(decode_s / 11)
    assert gained("request_generation_tokens", "_sum") == 5 * 12 and gained("request_prompt_tokens", "_sum") > 5 * 10
    ended = "vllm:request_success_total"
    assert after[ended].value(finished_reason="length") - before[ended].value(finished_reason="length") == 5


@pytest.mark.vllm
def test_names_labels_and_bounds_are_those_of_vllms_own_logger():
    """Runs in an environment that has vLLM: `pytest -m vllm tests/local_server/test_prometheus.py`."""
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    config = MagicMock()
    config.model_config.served_model_name, config.model_config.max_model_len = "tiny", 1024
    config.model_config.is_diffusion = config.observability_config.kv_cache_metrics = False
    config.speculative_config.num_speculative_tokens = 3
    config.observability_config.custom_histogram_buckets = config.watermark_config = config.lora_config = None
    config.ec_transfer_config = config.kv_transfer_config = None
    PrometheusStatLogger(config)
    theirs = {family.name: family for family in text_string_to_metric_families(generate_latest().decode())}
    none = Counts(DecodeStats(), 0, Counter(), 0, 0, RequestTimes(1024).histograms)
    ours = list(text_string_to_metric_families(prometheus_text(none, "tiny", 3)))
    assert len(ours) == 19
    for family in ours:
        known = theirs[family.name]
        samples = {(sample.name, *sorted(sample.labels.items())) for sample in known.samples}
        assert family.type == known.type
        assert {(sample.name, *sorted(sample.labels.items())) for sample in family.samples} == {
            key for key in samples if not key[0].endswith("_created")
        }
