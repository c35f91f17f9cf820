"""BalancedSource: shares rows out among servers of one model, and asks another one where one fails."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch import Tensor

from speculators.data_generation.sources.vllm import VllmSource, read_at_once
from speculators.data_generation.vllm_client import ServedModel, ServerUnavailableError, retry_wait_s
from speculators.interfaces import CaptureSpec, VerifierStates

logger = logging.getLogger(__name__)

REST_S = 30.0
"""A server that failed is asked again after this, or when all others failed too."""


@dataclass
class StatesServer:
    connect: Callable[[], VllmSource]
    """Raises `ServerUnavailableError` when it does not answer."""
    source: VllmSource | None = None
    """None: it has not answered yet."""
    num_in_flight: int = 0
    rests_until_s: float = 0.0


class BalancedSource:
    """A `HiddenStateSource` over servers of one model. Threads may share it.

    A row goes to the server with the fewest of them. One that fails rests while the others take its rows; with all of
    them failing, a row waits by `retry_wait_s` and asks again, `max_retries` times.
    """

    def __init__(
        self, servers: Sequence[Callable[[], VllmSource]], capture: CaptureSpec, *, concurrency: int, max_retries: int
    ) -> None:
        """Connects; goes on without a server that does not answer until it does.

        Raises `ServerUnavailableError` when none answers, `ValueError` when they serve different models.
        """
        self.servers, self.capture, self.max_retries = (
            [StatesServer(connect) for connect in servers],
            capture,
            max_retries,
        )
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(concurrency * len(servers), thread_name_prefix="balance")
        self._finalizer = weakref.finalize(self, self.pool.shutdown, wait=False, cancel_futures=True)
        errors = [error for server in self.servers if (error := self.failure_of(server)) is not None]
        if len(errors) == len(servers):
            raise errors[0]
        for error in errors:
            logger.warning("%s; going on without this server until it answers", error)

    def failure_of(self, server: StatesServer) -> ServerUnavailableError | None:
        try:
            self.connected(server)
        except ServerUnavailableError as error:
            server.rests_until_s = time.monotonic() + REST_S
            return error
        return None

    def connected(self, server: StatesServer) -> VllmSource:
        if server.source is None:
            source = server.connect()
            names = {other.source.served.root for other in self.servers if other.source is not None}
            if names - {source.served.root}:
                raise ValueError(f"the endpoints serve different models: {sorted({*names, source.served.root})}")
            server.source = source
        return server.source

    @property
    def served(self) -> ServedModel:
        """The model, and the longest sequence that every server takes."""
        known = [server.source.served for server in self.servers if server.source is not None]
        lengths = [model.max_model_len for model in known if model.max_model_len is not None]
        return replace(known[0], max_model_len=min(lengths, default=None))

    def close(self) -> None:
        self._finalizer()
        for server in self.servers:
            if server.source is not None:
                server.source.close()

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Reads all sequences at once; returns them in order. Raises as `read_one` does."""
        return read_at_once(self.pool, self.read_one, token_ids)

    def read_one(self, token_ids: Tensor) -> VerifierStates:
        """Raises `ServerUnavailableError` after the last attempt, `InvalidResponseError` for a wrong answer."""
        for attempt in range(self.max_retries + 1):
            tried: list[StatesServer] = []
            while len(tried) < len(self.servers):
                server = self.take(tried)
                tried.append(server)
                try:
                    return self.connected(server).read_one(token_ids)
                except ServerUnavailableError as failed:
                    error = failed
                    server.rests_until_s = time.monotonic() + REST_S
                    if len(tried) < len(self.servers):
                        logger.warning("%s; asking another server", error)
                finally:
                    with self.lock:
                        server.num_in_flight -= 1
            if attempt < self.max_retries:
                wait_s = retry_wait_s(error, attempt)
                logger.warning("%s; trying all servers again in %.0f s", error, wait_s)
                time.sleep(wait_s)
        raise error

    def take(self, tried: Sequence[StatesServer]) -> StatesServer:
        """Chooses a server: of those that do not rest the one with the fewest rows."""
        with self.lock:
            left, now_s = [server for server in self.servers if server not in tried], time.monotonic()
            server = min(left, key=lambda server: (server.rests_until_s > now_s, server.num_in_flight))
            server.num_in_flight += 1
            return server
