"""Hidden-state files on disk, by row: which exist, which are damaged, which are still to be made.

    <directory>/hs_<row>.safetensors    hidden_states [S, slots, H], token_ids [S], and for fp8 hidden_states_scales

The last slot is the verifier's last layer before the final norm, the others are the aux layers in order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FILE_NAME = re.compile(r"hs_(\d+)\.safetensors")
REQUIRED_KEYS = ("hidden_states", "token_ids")


def hidden_state_path(directory: str | Path, row: int) -> Path:
    return Path(directory) / f"hs_{row}.safetensors"


def get_existing_hidden_state_indices(directory: str | Path) -> list[int]:
    """Rows that have a file, ascending; a directory that does not exist has none."""
    path = Path(directory)
    if not path.is_dir():
        return []
    return sorted(int(match[1]) for entry in path.iterdir() if (match := FILE_NAME.fullmatch(entry.name)))


def find_corrupt_hidden_state_indices(directory: str | Path, indices: Iterable[int]) -> dict[int, str]:
    """Row -> what is wrong with its file, from the headers alone (a store's `audit` also checks the contents)."""
    problems = ((row, header_problem(hidden_state_path(directory, row))) for row in indices)
    return {row: problem for row, problem in problems if problem is not None}


def header_problem(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            missing = [key for key in REQUIRED_KEYS if key not in keys]
            if missing:
                return f"has no {' and no '.join(missing)}"
            states, tokens = (list(file.get_slice(key).get_shape()) for key in REQUIRED_KEYS)
    except (OSError, SafetensorError) as error:
        return f"cannot be opened: {error}"
    if len(states) != 3 or tokens != states[:1]:
        return f"hidden_states {states} and token_ids {tokens} do not fit together ([S, slots, H] and [S])"
    return None


def get_indices_to_process(
    num_samples: int, max_samples: int | None, existing: Collection[int], world_size: int = 1, rank: int = 0
) -> list[int]:
    """This rank's rows: a contiguous share of the first `max_samples` rows, less those that exist."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} of world_size={world_size}; ranks are 0..world_size-1")
    target = num_samples if max_samples is None else min(max_samples, num_samples)
    share, remainder = divmod(target, world_size)
    start = rank * share + min(rank, remainder)  # the first `remainder` ranks take one row more
    stop = start + share + (rank < remainder)
    done = set(existing)
    return [row for row in range(start, stop) if row not in done]


def check_hidden_states(data: Mapping[str, Any], tokens: Sequence[int] | Tensor | None) -> None:
    """`ValueError` unless the tensors of one file belong together, to these tokens, and are finite."""
    missing = [key for key in REQUIRED_KEYS if key not in data]
    if missing:
        raise ValueError(f"hidden-state data has no {' and no '.join(missing)}; it has {sorted(data)}")
    not_tensors = [key for key in REQUIRED_KEYS if not isinstance(data[key], Tensor)]
    if not_tensors:
        raise ValueError(f"{not_tensors[0]} is a {type(data[not_tensors[0]]).__name__}, not a tensor")
    states, token_ids = data["hidden_states"], data["token_ids"]
    if tokens is not None and token_ids.tolist() != torch.as_tensor(tokens).tolist():
        raise ValueError(
            f"token_ids mismatch: the {len(token_ids)} tokens beside the hidden states are not the {len(tokens)} "
            "tokens of the row; the states were made from other data"
        )
    if len(states) != len(token_ids):
        raise ValueError(f"length mismatch: {len(states)} hidden states for {len(token_ids)} tokens")
    check_finite(states)


def check_finite(states: Tensor) -> None:
    readable = states.float() if states.dtype == torch.float8_e4m3fn else states
    finite = torch.isfinite(readable)
    if finite.all():
        return
    slots = [] if states.dim() < 2 else [i for i in range(states.shape[1]) if not finite[:, i].all()]
    valid = readable[finite]
    low, high = (valid.min().item(), valid.max().item()) if len(valid) else (float("nan"), float("nan"))
    raise ValueError(
        f"hidden states are not finite: shape={tuple(states.shape)}, {int((~finite).sum())} values are NaN or "
        f"infinite, affected layer slots={slots}, finite values min={low:.4g} max={high:.4g}"
    )
