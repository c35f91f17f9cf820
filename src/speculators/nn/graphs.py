"""Computations of fixed shapes on fixed memory, which a GPU can record once and repeat with one launch (CUDA graphs).

    off        no fixed shapes
    static     the fixed shapes, launch by launch: the slow twin of a recorded graph, on any device
    cuda       recorded as a CUDA graph when a shape is first seen, replayed afterwards
    auto       cuda on a CUDA device, off elsewhere

What is recorded repeats the same launches on the same memory, whatever the host would do now. So it reads the numbers
of a round from its own buffers, no size of it follows from them, and draws nothing at random (see `draft_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from speculators.interfaces import Committed, DraftSampling
from speculators.nn.device import read_on_host, to_device
from speculators.nn.draft_tokens import own_probs_of, recorded_sampling, sampling_inputs

GRAPHS = ("off", "static", "cuda", "auto")
WARM_UPS = 2
MIN_SLOTS = 256
"""Fewest cache slots that a computation of fixed shape reads."""

Outputs = tuple[Tensor | None, ...]
Record = Callable[[Callable[[], Outputs]], Callable[[], Outputs]]
"""Takes a computation on fixed memory and returns what repeats it."""


@runtime_checkable
class HasFixedShapes(Protocol):
    """A proposer whose rounds can run at fixed shapes."""

    def use_graphs(self, record: Record | None) -> None:
        """Draft at fixed shapes from now on; None: as shapes come."""
        ...


def launch_by_launch(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    return run


class CudaGraphs:
    """Records CUDA graphs by PyTorch's rules (https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs").

    All graphs share one memory pool, so that they hold the memory of the largest and not the sum of all. They may be
    replayed in any order: the outputs of each are held, hence no other graph gets their memory, and whatever else lies
    in the pool is read by the graph alone that wrote it. They must not run at the same time: one thread, one stream."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Records after runs that make what is made once (tables, workspaces of libraries), on a stream beside."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


def choose_record(route: str, device: torch.device) -> Record | None:
    """None: nothing is recorded. Raises ValueError for a route that is unknown or that the device does not have."""
    if route not in GRAPHS:
        raise ValueError(f"graphs={route!r} is none of {list(GRAPHS)}")
    if route == "cuda" and device.type != "cuda":
        raise ValueError(f"graphs='cuda' but the verifier is on {device}; use 'auto', or 'static' for the same shapes")
    if route == "static":
        return launch_by_launch
    return CudaGraphs() if device.type == "cuda" and route != "off" else None


class Recorded(NamedTuple):
    """A computation of one shape, and the memory that it reads."""

    inputs: list[Tensor]
    replay: Callable[[], Outputs]
    held: list[Tensor]


class FixedShapes:
    """Computations by shape, each recorded when its shape is first seen."""

    def __init__(self, record: Record):
        self.record = record
        self._by_shape: dict[Hashable, Recorded] = {}
        self._memory: tuple[object, ...] = ()

    def run(
        self,
        shape: Hashable,
        inputs: Sequence[Tensor],
        compute: Callable[..., Outputs],
        memory: Sequence[object] = (),
        tables: Callable[[], Iterable[Tensor]] = tuple,
    ) -> Outputs:
        """`compute(*inputs)`, recorded once per `shape`, which says all sizes. The outputs are copies: a replay writes
        over them. `memory`: what else it reads and writes, all shapes the same; once any of it was replaced, every
        record is dropped. `tables`: what it reads that may be replaced by an equal one later; held until then."""
        if len(memory) != len(self._memory) or any(a is not b for a, b in zip(memory, self._memory, strict=True)):
            self._by_shape.clear()
            self._memory = tuple(memory)
        recorded = self._by_shape.get(shape)
        if recorded is None:
            buffers = [x.clone() for x in inputs]
            replay = self.record(lambda: compute(*buffers))
            recorded = self._by_shape[shape] = Recorded(buffers, replay, list(tables()))
        else:
            for buffer, x in zip(recorded.inputs, inputs, strict=True):
                buffer.copy_(x)
        return tuple(None if x is None else x.clone() for x in recorded.replay())


# -- sizes and numbers of a round
#
# R rows, T columns, S cache slots: the smallest fixed shape that holds a round. Rows beyond it, and columns beyond a
# row's own, write where nobody reads before it was written anew: behind what the row keeps, or in rows of no request.


def rounded_up(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def rows_for(num_rows: int, most: int) -> int:
    """Rows of the fixed shape that `num_rows` rows run in."""
    return min(rounded_up(num_rows), most)


def slots_for(num_slots: int) -> int:
    """Cache slots of the fixed shape that reads the first `num_slots`."""
    return rounded_up(max(num_slots, MIN_SLOTS))


def columns_for(num_new: Sequence[int], num_tokens: int) -> int:
    """Columns of the fixed shape that reads these entries: what a round of `num_tokens` drafts can commit, or more."""
    most = max(num_new)
    return num_tokens + 1 if most <= num_tokens + 1 else rounded_up(most)


class Entries(NamedTuple):
    """New entries of a drafter's cache at a fixed shape. The first `count_R` columns of a row are true."""

    start_R: Tensor
    """Where the first of them goes."""
    count_R: Tensor
    last_R: Tensor
    """The last token of each row."""
    tokens_RT: Tensor
    states_RTD: Tensor


def entries_of(
    committed: Committed, starts: Sequence[int], counts: Sequence[int], num_rows: int, num_columns: int
) -> Entries:
    """The last `counts` columns of what was committed. One copy to the device, and no wait for it."""
    assert committed.states_BTD is not None
    numbers = []
    for row, token_ids in enumerate(read_on_host(committed).token_ids_by_row):
        first, last = len(token_ids) - counts[row], max(len(token_ids) - 1, 0)
        tokens = token_ids[first:] + [0] * (num_columns - counts[row])
        columns = [min(first + column, last) for column in range(num_columns)]
        numbers.append([row, starts[row], counts[row], token_ids[-1] if token_ids else 0, *tokens, *columns])
    numbers += [[0] * (4 + 2 * num_columns)] * (num_rows - len(numbers))
    numbers_RN = to_device(numbers, committed.token_ids_BT.device)
    row_R1, start_R1, count_R1, last_R1, tokens_RT, column_RT = numbers_RN.split((1, 1, 1, 1, *[num_columns] * 2), 1)
    states_RTD = committed.states_BTD[row_R1, column_RT]
    return Entries(start_R1[:, 0], count_R1[:, 0], last_R1[:, 0], tokens_RT, states_RTD)


Drafts = tuple[Tensor, Tensor | None, Tensor | None]
"""(verifier ids [B, K], q [B, K, V] or None, the drafter's own chance of each draft to be accepted [B, K] or None)"""


def draft_at(
    shapes: FixedShapes,
    shape: tuple[int, ...],
    draft: Callable[..., Drafts],
    inputs: Sequence[Tensor],
    sampling: DraftSampling,
    noise_shapes: Sequence[tuple[int, ...]],
    **reads: Any,
) -> Drafts:
    """Runs `draft(*inputs, sampling)` as the recorded computation of this shape, and returns the rows that draft: those
    of `sampling`, the first of the inputs'. `noise_shapes`: of what it draws, in order. `reads`: see `FixedShapes.run`.
    """
    B, R = len(sampling.temperature_B), len(inputs[0])

    def compute(*numbers: Tensor) -> Outputs:
        recorded = recorded_sampling(sampling, *numbers[len(inputs) :])
        return *draft(*numbers[: len(inputs)], recorded), own_probs_of(recorded)

    asked = (sampling.probabilistic, sampling.wants_confidence, sampling.own_probs is not None)
    numbers = (*inputs, *sampling_inputs(sampling, noise_shapes, R))
    draft_ids_RK, probs_RKV, confidence_RK, own_probs_RK = shapes.run((*shape, R, *asked), numbers, compute, **reads)
    assert draft_ids_RK is not None
    if sampling.own_probs is not None and own_probs_RK is not None:
        sampling.own_probs.append(own_probs_RK[:B])
    probs_BKV, confidence_BK = (None if part is None else part[:B] for part in (probs_RKV, confidence_RK))
    return draft_ids_RK[:B], probs_BKV, confidence_BK


class FixedRounds:
    """Base of proposers that have a cache: a round's entries and drafts as one computation of fixed shape."""

    shapes: FixedShapes | None = None
    cache: Any
    """A `DraftCache`."""
    network: Any
    device: torch.device
    dtype: torch.dtype

    def use_graphs(self, record: Record | None) -> None:
        """See `HasFixedShapes`."""
        self.shapes = FixedShapes(record) if record is not None else None

    def noise_shapes(self, num_rows: int, num_tokens: int) -> list[tuple[int, ...]]:
        """The shapes of what is drawn, in order."""
        raise NotImplementedError

    def compute_drafts(self, entries: Entries, num_slots: int, num_tokens: int, sampling: DraftSampling) -> Drafts:
        """Writes the entries and drafts behind them; reads `num_slots` slots of each row. Takes no number from the
        host and gives it none."""
        raise NotImplementedError

    def draft_round(
        self,
        shapes: FixedShapes,
        committed: Committed,
        starts: list[int],
        counts: list[int],
        num_tokens: int,
        sampling: DraftSampling,
    ) -> Drafts:
        """Drafts behind the last `counts` columns of what was committed, which are written from `starts` on."""
        B = len(counts)
        R, T = rows_for(B, len(self.cache.lengths)), columns_for(counts, num_tokens)
        S = slots_for(max(starts) + T + num_tokens + 1)
        self.cache.reserve(S)
        self.cache.lengths[:B] = [start + count for start, count in zip(starts, counts, strict=True)]
        entries = entries_of(committed, starts, counts, R, T)

        def draft(*numbers: Any) -> Drafts:
            *new, recorded = numbers
            return self.compute_drafts(Entries(*new), S, num_tokens, recorded)

        return draft_at(
            *(shapes, (T, S, num_tokens), draft, entries, sampling, self.noise_shapes(B, num_tokens)),
            memory=(self.cache.storage,),
            tables=lambda: self.network.rope.tables(S, self.device, self.dtype),
        )
