"""Work with a device that is not the host: copies that do not make the host wait, graphs that it records.

Shapes: B rows, T committed columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculators.interfaces import Committed


class CommittedOnHost(NamedTuple):
    """What the engine knows of a `Committed` on the host, so that nobody waits for the device to read it."""

    token_ids_by_row: list[list[int]]
    """Without padding."""
    num_new: list[int]
    num_committed: list[int]


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers, lists or a tensor of the host on the device. The host does not wait: what lies in ordinary memory is
    read before the call returns, and arrives in the order of the device's work."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


def read_on_host(committed: Committed) -> CommittedOnHost:
    """The counts and tokens as numbers of Python: the engine's own record of them, or else read from the device."""
    if committed.on_host is not None:
        return CommittedOnHost(*committed.on_host)
    num_new, num_committed = torch.stack((committed.num_new_B, committed.num_committed_B)).tolist()
    token_ids = committed.token_ids_BT.tolist()
    return CommittedOnHost([row[:new] for row, new in zip(token_ids, num_new, strict=True)], num_new, num_committed)


# -- what a GPU records: computations of fixed shapes on fixed memory
#
#    off        nothing
#    static     the fixed shapes, launch by launch: the slow twin of a recorded graph, on any device
#    cuda       recorded as a CUDA graph when a shape is first seen, replayed afterwards
#    auto       cuda on a CUDA device, off elsewhere

GRAPHS = ("off", "static", "cuda", "auto")
WARM_UPS = 2

Outputs = tuple[Tensor, Tensor | None]
Record = Callable[[Callable[[], Outputs]], Callable[[], Outputs]]
"""Takes a computation on fixed memory and returns what repeats it."""


def launch_by_launch(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    return run


def record_cuda_graph(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """Records after runs that make what is made once (tables, workspaces of libraries), on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
    return record_cuda_graph if device.type == "cuda" and route != "off" else None


def rounded_up(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
