"""One thread that owns the engine: the requests of all connections become one running batch, and nobody else touches
the engine, its tokenizer or its numbers.

    connections  --submit, cancel, run-->  tasks  --between rounds-->  engine.serve  --Delta-->  each call's sink
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from speculators.decoding.engine import Engine
from speculators.decoding.request import ActiveRequest, RequestOutput, StreamEvent
from speculators.decoding.settings import SamplingParams
from speculators.local_server.metrics import Counts, RequestTimes

logger = logging.getLogger(__name__)
Returned = TypeVar("Returned")


class ServerBusyError(RuntimeError):
    """More requests wait than the server keeps."""


class ServerClosingError(RuntimeError):
    """The server ends before the request does."""


@dataclass(frozen=True)
class Delta:
    """What one sample of a call gained in a round."""

    choice: int
    """Prompts in order, the samples of each together."""
    event: StreamEvent
    output: RequestOutput
    time_s: float
    """When, by a clock of no particular beginning."""


@dataclass
class Call:
    """The requests of one connection: a prompt, or several, with their samples. Filled by the engine's thread."""

    sink: Callable[[Delta | Exception], None]
    """Called by the engine's thread, so it must not wait."""
    prompts: list[list[int]] = field(default_factory=list)
    requests: dict[int, list[ActiveRequest]] = field(default_factory=dict)
    """Index in the engine -> samples, of prompts that have not ended."""
    number_of: dict[int, int] = field(default_factory=dict)
    """Index in the engine -> number of the prompt."""
    num_open: dict[int, int] = field(default_factory=dict)
    """Index in the engine -> samples whose end was not delivered."""
    arrived_s: float = field(default_factory=time.perf_counter)
    """When, by a clock of no particular beginning."""


class EngineThread:
    """Decodes what `submit` brings until `close`. `max_waiting`: samples that may wait for a row of the batch."""

    def __init__(self, engine: Engine, *, max_waiting: int):
        self.engine, self.max_waiting = engine, max_waiting
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._serve, name="speculators-engine", daemon=True)
        self._indices = itertools.count()
        # of the thread alone:
        self._arrived: list[ActiveRequest] = []
        self._calls: dict[int, Call] = {}
        self._num_prompt_tokens = 0
        self._num_finished: Counter[str] = Counter()
        self._times = RequestTimes(engine.max_length)

    @property
    def most_samples(self) -> int:
        """Samples that can be under way at once."""
        return self.engine.max_batch_size + self.max_waiting

    # -- for any thread

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, timeout_s: float) -> None:
        """Ends what is running with `ServerClosingError`, and the thread, for which it waits `timeout_s` seconds."""
        self._tasks.put(None)
        self._thread.join(timeout_s)

    def run(self, function: Callable[[], Returned]) -> Future[Returned]:
        """Calls a function in the engine's thread, between two rounds; the future has what it returned or raised."""
        future: Future[Returned] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def submit(self, call: Call, prepare: Callable[[], tuple[Sequence[list[int]], SamplingParams]]) -> Future[None]:
        """Begins a call; `prepare()` gives the prompts' tokens and how they are sampled, in the engine's thread. The
        future raises ValueError for what the engine cannot decode, and `ServerBusyError`."""
        return self.run(lambda: self._begin(call, *prepare()))

    def cancel(self, call: Call) -> None:
        """Ends what is left of a call, without a word to its sink."""
        self.run(lambda: self._abandon(call))

    def counts(self) -> Future[Counts]:
        """Counts what the engine did since it began to serve, requests under way included."""
        return self.run(self._counts)

    # -- in the thread

    def _begin(self, call: Call, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        num_samples = len(prompts) * params.n
        if num_samples > self.most_samples:
            raise ValueError(
                f"{len(prompts)} prompts with n={params.n} are {num_samples} samples; this server takes "
                f"{self.most_samples} at once: ask in several requests"
            )
        indices = [next(self._indices) for _ in prompts]
        requests = {
            index: self.engine.request(index, prompt, params) for index, prompt in zip(indices, prompts, strict=True)
        }
        num_unfinished = sum(len(call.requests[index]) for index, call in self._calls.items())
        if num_unfinished + num_samples > self.most_samples:
            raise ServerBusyError(f"{num_unfinished} requests are running or waiting; ask again a little later")
        call.prompts, call.requests = list(prompts), requests
        call.number_of = {index: number for number, index in enumerate(indices)}
        call.num_open = {index: len(samples) for index, samples in requests.items()}
        for index, samples in requests.items():
            self._calls[index] = call
            self._arrived += samples
            for sample in samples:
                self._times.arrived(sample, call.arrived_s, time.perf_counter())
        self._num_prompt_tokens += sum(map(len, prompts))

    def _abandon(self, call: Call) -> None:
        for index in call.requests:
            self.engine.cancel(index)

    def _counts(self) -> Counts:
        live = [request for index, call in self._calls.items() for request in call.requests[index]]
        stats = sum((q.output.stats for q in live if q.output.finish_reason is None), self.engine.stats)
        num_unfinished = sum(request.output.finish_reason is None for request in live)
        num_waiting = max(0, num_unfinished - self.engine.max_batch_size)
        return Counts(
            stats,
            self._num_prompt_tokens,
            Counter(self._num_finished),
            num_unfinished - num_waiting,
            num_waiting,
            {name: histogram.copy() for name, histogram in self._times.histograms.items()},
        )

    def _arrivals(self, is_idle: bool) -> list[ActiveRequest] | None:
        """Does all tasks and returns the requests that they brought; None: closed. Waits where nothing is running."""
        while True:
            try:
                task = self._tasks.get(block=is_idle and not self._arrived)
            except Empty:
                arrived, self._arrived = self._arrived, []
                self._times.round_begins(time.perf_counter())
                return arrived
            if task is None:
                return None
            task()

    def _serve(self) -> None:
        """Serves until it is closed. An error of the engine ends the requests that run, and no others."""
        while True:
            try:
                for event in self.engine.serve(self._arrivals):
                    self._deliver(event)
            except Exception as error:
                logger.exception("the engine failed; its requests are ended, and it goes on")
                self._fail(error)
            else:
                self._fail(ServerClosingError("the server is shutting down"))
                return

    def _deliver(self, event: StreamEvent) -> None:
        """Gives what a sample gained to the sink of its call."""
        index = event.request_index
        call = self._calls[index]
        samples = call.requests[index]
        choice = call.number_of[index] * len(samples) + event.sample_index
        request, now_s = samples[event.sample_index], time.perf_counter()
        self._times.gained(request, event, now_s)
        call.sink(Delta(choice, event, request.output, now_s))
        if event.finish_reason is None:  # one that follows may have ended the request already: both are of one round
            return
        self._num_finished[event.finish_reason] += 1
        call.num_open[index] -= 1
        if not call.num_open[index]:
            del self._calls[index], call.requests[index]

    def _fail(self, error: Exception) -> None:
        """Ends every call with this error."""
        for call in {id(call): call for call in self._calls.values()}.values():
            call.requests.clear()
            call.sink(error)
        self._calls.clear()
        self._times.forget()
        self._arrived.clear()
