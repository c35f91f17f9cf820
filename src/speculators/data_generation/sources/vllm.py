"""VllmSource: asks a vLLM server that extracts verifier states (`speculators launch-vllm`). Threads may share it.

    tokens -> request -> path of a file -> wait for its writer -> read, check, delete -> VerifierStates

Several servers of one model: `servers.BalancedSource`. Shapes: T tokens, S slots (layers in the file), H hidden size.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from torch import Tensor

from speculators.data_generation.configs import DEFAULT_CONCURRENCY, DEFAULT_STATES_DIRECTORY
from speculators.data_generation.offline import slots_of
from speculators.data_generation.sources.served_files import DamagedStatesError, read_and_delete
from speculators.data_generation.vllm_client import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT_S,
    InvalidResponseError,
    ServedModel,
    ServerUnavailableError,
    generate_hidden_states,
    make_client,
    name_of_served_file,
    served_model,
)
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.verifier.capture import ExtractionNote

logger = logging.getLogger(__name__)

DEFAULT_VALIDATION_RETRIES = 2


@dataclass
class Counts:
    """Counts the requests of a source, so that failures are seen."""

    num_read: int = 0
    num_retried: int = 0
    """Requests repeated because the file was damaged."""
    num_failed: int = 0


def close_connections(pool: ThreadPoolExecutor, client: httpx.Client) -> None:
    # Does not wait: the last reference may go in a thread of the pool, which cannot wait for itself.
    pool.shutdown(wait=False, cancel_futures=True)
    client.close()


def read_at_once(
    pool: ThreadPoolExecutor, read_one: Callable[[Tensor], VerifierStates], token_ids: Sequence[Tensor]
) -> list[VerifierStates]:
    """Reads sequences in a pool's threads; returns them in order. Where one fails, those that wait are not begun."""
    if any(len(ids) == 0 for ids in token_ids):
        raise ValueError("a sequence without tokens has no states; leave it out")
    futures = [pool.submit(read_one, ids) for ids in token_ids]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


class VllmSource:
    """A `HiddenStateSource`. Asks the server once when it is made, so that a wrong address fails at once."""

    def __init__(
        self,
        endpoint: str,
        capture: CaptureSpec,
        *,
        directory: str | os.PathLike[str] = DEFAULT_STATES_DIRECTORY,
        model: str | None = None,
        layer_ids: Sequence[int] | None = None,
        hidden_size: int | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        validation_retries: int = DEFAULT_VALIDATION_RETRIES,
    ) -> None:
        """`directory`: where the server writes; its files are read and deleted there and nowhere else. `layer_ids`:
        layers that it extracts if `launch-vllm` (which leaves a note) did not start it, ascending, including the last
        layer. `hidden_size`: the verifier's, to detect another model.

        Raises `ServerUnavailableError` when the server does not answer, `ValueError` for a wrong setting.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency}; at least one request at a time is needed")
        self.endpoint = endpoint
        self.directory = Path(directory).expanduser()
        self.capture = capture
        self.hidden_size = hidden_size
        self.layer_ids = None if layer_ids is None else tuple(layer_ids)
        self.timeout_s, self.max_retries, self.validation_retries = timeout_s, max_retries, validation_retries
        self.counts = Counts()
        self.client: httpx.Client = make_client(endpoint, timeout_s=timeout_s, num_connections=concurrency)
        self.pool = ThreadPoolExecutor(concurrency, thread_name_prefix="extract")
        # Whoever forgets to call `close` leaves no connections open.
        self._finalizer = weakref.finalize(self, close_connections, self.pool, self.client)
        self.served: ServedModel = served_model(self.client, max_retries=max_retries)
        self.model = model or self.served.name
        self.lock = threading.Lock()
        self.slots: list[int] | None = None
        """Slots of the wanted layers in a file; known after the first file, beside which the server's note is."""

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self._finalizer()

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Requests the states of all sequences at once; returns them in order. Raises as `read_one` does."""
        return read_at_once(self.pool, self.read_one, token_ids)

    def read_one(self, token_ids: Tensor) -> VerifierStates:
        """Reads the states of one sequence; requests a damaged file again.

        Raises `ServerUnavailableError` after the last attempt, `InvalidResponseError` for a wrong answer.
        """
        ids_T = token_ids.to("cpu", torch.int64)
        for attempt in range(self.validation_retries + 1):
            try:
                states = self.request(ids_T)
            except DamagedStatesError as error:
                if attempt == self.validation_retries:
                    self.count(num_failed=1)
                    raise ServerUnavailableError(f"{error}: {attempt + 1} requests of {len(ids_T)} tokens") from error
                logger.warning("%s; requesting it again", error)
                self.count(num_retried=1)
            except (ServerUnavailableError, InvalidResponseError):
                self.count(num_failed=1)
                raise
            else:
                self.count(num_read=1)
                return states
        raise AssertionError("the last request returns or raises")

    def count(self, *, num_read: int = 0, num_retried: int = 0, num_failed: int = 0) -> None:
        with self.lock:
            self.counts.num_read += num_read
            self.counts.num_retried += num_retried
            self.counts.num_failed += num_failed

    def request(self, ids_T: Tensor) -> VerifierStates:
        handle, _ = generate_hidden_states(
            self.client, self.model, {"input_ids": ids_T.tolist()}, timeout=self.timeout_s, max_retries=self.max_retries
        )
        name = name_of_served_file(handle, self.directory)
        states_TSH = read_and_delete(self.directory, name, ids_T, self.timeout_s)
        if self.hidden_size is not None and states_TSH.shape[2] != self.hidden_size:
            raise InvalidResponseError(
                f"{self.endpoint} serves {self.served.root}, whose hidden size is {states_TSH.shape[2]}; "
                f"the verifier's is {self.hidden_size}: it is another model"
            )
        slots = self.find_slots(states_TSH.shape[1])
        num_aux = len(self.capture.aux_layer_ids)
        return VerifierStates(
            token_ids_T=ids_T,
            aux_TD=states_TSH[:, slots[:num_aux]].flatten(1) if num_aux else None,
            last_hidden_TH=states_TSH[:, slots[-1]] if self.capture.last_hidden else None,
        )

    def find_slots(self, num_slots_in_file: int) -> list[int]:
        """Finds the slots of a file that hold the layers that the drafter reads, in its order."""
        with self.lock:
            if self.slots is None:
                note = ExtractionNote.read(self.directory)
                if note is None and self.layer_ids is not None:
                    note = ExtractionNote(self.served.root, self.layer_ids, max(self.layer_ids))
                self.slots = slots_of(self.capture, note, num_slots_in_file)
                self.num_slots_in_file = num_slots_in_file if note is None else len(note.layer_ids)
        if num_slots_in_file != self.num_slots_in_file:
            raise InvalidResponseError(
                f"the server's files hold {num_slots_in_file} layers, its note in {self.directory} says "
                f"{self.num_slots_in_file}: another server wrote to it; give each its own --hidden-states-path"
            )
        return self.slots


def what_the_server_extracts(
    endpoint: str, directory: Path, *, timeout_s: float = DEFAULT_TIMEOUT_S, max_retries: int = DEFAULT_MAX_RETRIES
) -> ExtractionNote | None:
    """Finds the note that `launch-vllm` left, by requesting the states of one token; None when there is no note."""
    with make_client(endpoint, timeout_s=timeout_s) as client:
        model = served_model(client, max_retries=max_retries).name
        handle, _ = generate_hidden_states(
            client, model, {"input_ids": [0]}, timeout=timeout_s, max_retries=max_retries
        )
    read_and_delete(directory, name_of_served_file(handle, directory), torch.tensor([0]), timeout_s)
    return ExtractionNote.read(directory)
