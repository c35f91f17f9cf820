"""Several drafters of one run: they take turns on the same rows, whose verifier states are computed once.

    row              r0            r1            r2
    verifier         states        states        states      of all the layers that any of them reads
    drafter 1        step          step          step        its own columns, optimizer, random numbers, directory
    drafter 2           step          step          step

Each draws its own random numbers, as if it were alone, so it ends with the weights that a run of its own gives. After a
resume the one that is furthest behind catches up first.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from speculators.data_generation import InvalidResponseError, ServerUnavailableError, ShardedStore
from speculators.data_generation.offline import columns_of
from speculators.data_generation.sources.cached import key_of
from speculators.interfaces import CaptureSpec, HiddenStateSource, VerifierStates
from speculators.nn.decoder import recomputes_mlps
from speculators.train.config import TrainConfig
from speculators.train.data import ArrowDataset
from speculators.train.distributed import RandomState, Ranks, own_part
from speculators.train.events import Listener, Note
from speculators.train.graceful_shutdown import GracefulShutdown, TrainingInterrupted
from speculators.train.memory import MemoryEstimate, Probe, measure_memory, weights_of
from speculators.train.records import TrainResult
from speculators.train.sources import computes_in_process
from speculators.train.trainer import RowsDone, Trainer
from speculators.train.validation import PromptDecoder


@dataclass
class Drafter:
    """One drafter of a run, built but for its verifier states."""

    config: TrainConfig
    trainer: Trainer
    datasets: list[ArrowDataset]
    """Of training and, where there is one, of validation."""
    store: ShardedStore | None
    reads_files_alone: bool
    on_event: Listener
    recipe: dict[str, Any]
    is_closed: bool
    """Trained and checked: nothing is left to do."""
    random_state: RandomState
    """With which its next step begins."""
    hidden_size: int
    """Of the verifier."""
    verifier_config: PretrainedConfig
    verifier: PreTrainedModel | None = None
    """Where it is in this process."""
    fitted: tuple[list[Probe], MemoryEstimate] | None = None
    """What was measured when it was made to fit into --max-memory."""

    @property
    def name(self) -> str:
        return self.config.speculator_type

    def memory(self) -> MemoryEstimate:
        """What the run needs, measured on short rows; within --max-memory, or refused."""
        return self.measure()[1]

    def measure(self) -> tuple[list[Probe], MemoryEstimate]:
        data, num_bytes = self.config.data, 0
        if self.verifier is not None:
            parts = [own_part(param) for param in self.verifier.parameters()]
            num_bytes = sum(part.numel() * part.element_size() for part in parts)
        elif computes_in_process(data) or self.config.trainer.eval_prompts:
            num_ranks = self.trainer.ranks.world_size if data.verifier_tp else 1
            num_bytes = weights_of(self.verifier_config, data.hidden_states_dtype, num_ranks)
        return measure_memory(self.trainer, self.config, self.datasets[0], self.hidden_size, num_bytes)

    def fit_into_memory(self) -> None:
        """Makes its steps take less than --max-memory, where that is given. Raises `ValueError` where they cannot."""
        limit, trainer = self.config.trainer.max_memory, self.trainer
        if limit is None or self.is_closed or trainer.is_finished():
            return
        self.fitted = self.measure()
        chunks = f"chunks of {trainer.chunk_elements:,} logits" if trainer.chunk_elements else "chunks as without it"
        recomputed = ", feed-forward layers recomputed" if recomputes_mlps(trainer.model) else ""
        self.on_event(Note(f"--max-memory {limit}: {chunks}{recomputed}; {self.fitted[1]}"))

    def decode_prompts(self, verifier: PreTrainedModel) -> None:
        rows, num_prompts = self.datasets[-1].rows, self.config.trainer.eval_prompts
        self.trainer.decoder = PromptDecoder.of(self.trainer.model, verifier, rows, num_prompts)


# -- the states --------------------------------------------------------------------------------------------------------


def union_of(captures: Sequence[CaptureSpec]) -> CaptureSpec:
    layers = sorted({layer for capture in captures for layer in capture.aux_layer_ids})
    return CaptureSpec(tuple(layers), last_hidden=any(capture.last_hidden for capture in captures))


def shared(source: HiddenStateSource, drafters: Sequence[Drafter]) -> list[HiddenStateSource]:
    """Returns what each drafter reads: its own layers of the states of all."""
    if len(drafters) == 1:
        return [source]
    num_rows = drafters[0].config.data.prefetch_factor + 2
    states = SharedStates(source, len(drafters), most_rows=num_rows)
    return [OwnStates(states, number, drafter.trainer.model.capture) for number, drafter in enumerate(drafters)]


@dataclass
class SharedRow:
    states: Future[tuple[list[VerifierStates], torch.cuda.Event | None]] = field(default_factory=Future)
    """With what tells other streams that they are there; None for states on the host."""
    readers: set[int] = field(default_factory=set)
    """Who has read it."""


class SharedStates:
    """Reads each packed row once for several readers. Threads may share it."""

    def __init__(self, source: HiddenStateSource, num_readers: int, *, most_rows: int) -> None:
        """Keeps a row until all have read it; no more than `most_rows`, as readers may be apart after a resume."""
        self.source, self.num_readers, self.most_rows = source, num_readers, most_rows
        self.rows: dict[tuple[bytes, ...], SharedRow] = {}
        self.lock = threading.Lock()

    def read(self, reader: int, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        key = tuple(map(key_of, token_ids))
        with self.lock:
            is_first = key not in self.rows
            row = self.rows.setdefault(key, SharedRow())
            row.readers.add(reader)
            if len(row.readers) == self.num_readers:
                del self.rows[key]
            while len(self.rows) > self.most_rows:
                del self.rows[next(iter(self.rows))]
        if is_first:
            try:
                states = self.source.read(token_ids)
                row.states.set_result((states, event_of(states)))
            except BaseException as error:
                with self.lock:  # the next reader asks again
                    self.rows.pop(key, None)
                row.states.set_exception(error)
        states, event = row.states.result()
        if event is not None:
            hand_over(states, event)
        return states


def on_device(states: Sequence[VerifierStates]) -> list[Tensor]:
    values = [values for of_row in states for values in (of_row.aux_TD, of_row.last_hidden_TH)]
    return [values_TD for values_TD in values if values_TD is not None and values_TD.is_cuda]


def event_of(states: Sequence[VerifierStates]) -> torch.cuda.Event | None:
    """The end of what computes these states on the stream of this thread."""
    values = on_device(states)
    return torch.cuda.current_stream(values[0].device).record_event() if values else None


def hand_over(states: Sequence[VerifierStates], event: torch.cuda.Event) -> None:
    """Lets this thread's stream read what another one computes: a drafter's rows are made on a stream of their own."""
    for values_TD in on_device(states):
        stream = torch.cuda.current_stream(values_TD.device)
        stream.wait_event(event)
        values_TD.record_stream(stream)


class OwnStates:
    """The `HiddenStateSource` of one reader."""

    def __init__(self, states: SharedStates, number: int, capture: CaptureSpec) -> None:
        self.states, self.number, self.capture = states, number, capture

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        layers = self.states.source.capture.aux_layer_ids
        return [columns_of(states, layers, self.capture) for states in self.states.read(self.number, token_ids)]


# -- the turns ---------------------------------------------------------------------------------------------------------


def take_turns(drafters: Sequence[Drafter], ranks: Ranks) -> list[TrainResult]:
    """Trains all to the end, the one that is furthest behind next, and returns their results.

    A signal, or the failure of one, lets the others save first; then it is raised.
    """
    if len(drafters) == 1:
        return [drafters[0].trainer.run_training()]
    failure: BaseException | None = None
    with GracefulShutdown() as shutdown:
        turns = [drafter.trainer.training(shutdown) for drafter in drafters]
        begun = [drafter.trainer.position for drafter in drafters]
        at: dict[int, RowsDone] = {number: (at.epoch, at.local_step, 0) for number, at in enumerate(begun)}
        while at:
            number = min(at, key=lambda number: at[number])
            drafter = drafters[number]
            ranks.set_random_state(drafter.random_state)
            try:
                at[number] = next(turns[number])
            except StopIteration:
                del at[number]
            except (ServerUnavailableError, InvalidResponseError) as error:
                for other in at.keys() - {number}:
                    ranks.set_random_state(drafters[other].random_state)
                    save_without_states(turns[other], error)
                raise
            except (Exception, TrainingInterrupted) as error:
                del at[number]
                failure = failure or error
                shutdown.requested = shutdown.requested or f"the end of {drafter.name}"
            drafter.random_state = ranks.random_state()
    if failure is not None:
        raise failure
    return [drafter.trainer.result() for drafter in drafters]


def save_without_states(turn: Generator[RowsDone], error: Exception) -> None:
    """Ends a drafter's turns as if it had met the error itself: it saves what it has trained."""
    with suppress(type(error)):
        turn.throw(error)
