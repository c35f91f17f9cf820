"""Work with a device that is not the host: copies that do not make the host wait.

Shapes: B rows, T committed columns.
"""

from __future__ import annotations

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
