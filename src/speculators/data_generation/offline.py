"""One hidden-state file per row of a prepared dataset: its name, its bytes, and what may be wrong with it.

    <directory>/hs_<row>.safetensors
        hidden_states         [S, slots, H]   aux layers in order, then the last layer before the final norm
        token_ids             [S] int64
        hidden_states_scales  [S, 1, 1] f32   fp8 only: value = fp8 * scale

The header says what the file is (capture, source dtype, verifier) and holds a checksum; files of other tools lack it.
Shapes: S tokens (T in `VerifierStates`), slots = A aux layers (+ 1), H hidden size.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from speculators.data_generation.vllm_client import InvalidResponseError
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.verifier.capture import ExtractionNote

FILE_NAME = re.compile(r"hs_(\d+)\.safetensors")
REQUIRED_KEYS = ("hidden_states", "token_ids")

FORMAT = "speculators-hidden-states-1"
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 1e-12
"""Lower bound of a scale: a token whose states are all zero must not divide by zero."""

SOURCE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}

TensorDict = dict[str, Tensor]


def hidden_state_path(directory: str | Path, row: int) -> Path:
    return Path(directory) / f"hs_{row}.safetensors"


def get_existing_hidden_state_indices(directory: str | Path) -> list[int]:
    """Lists the rows that have a file, ascending; an empty list when the directory does not exist."""
    path = Path(directory)
    if not path.is_dir():
        return []
    return sorted(int(match[1]) for entry in path.iterdir() if (match := FILE_NAME.fullmatch(entry.name)))


def find_corrupt_hidden_state_indices(directory: str | Path, indices: Iterable[int]) -> dict[int, str]:
    """Returns row -> what is wrong with its file, from the header alone (a store's `audit` also reads the contents)."""
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
    """Lists this rank's rows: a contiguous share of the first `max_samples` rows, without those in `existing`.

    Raises `ValueError` unless `0 <= rank < world_size`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} of world_size={world_size}; ranks are 0..world_size-1")
    target = num_samples if max_samples is None else min(max_samples, num_samples)
    share, remainder = divmod(target, world_size)
    start = rank * share + min(rank, remainder)  # the first `remainder` ranks take one row more
    stop = start + share + (rank < remainder)
    done = set(existing)
    return [row for row in range(start, stop) if row not in done]


def check_hidden_states(data: Mapping[str, Any], tokens: Sequence[int] | Tensor | None) -> None:
    """Raises `ValueError` unless the tensors of one file fit each other and `tokens`, and are finite.

    `data`: hidden_states [S, slots, H] and token_ids [S].
    """
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
    check_scales(states, data.get("hidden_states_scales"))
    check_finite(states)


def check_scales(states: Tensor, scales: Any) -> None:
    """Raises `ValueError` unless fp8 states, and only they, have a positive finite scale per token."""
    if states.dtype != FP8:
        if scales is not None:
            raise ValueError(f"hidden_states_scales stand beside states of {states.dtype}; only fp8 states have scales")
        return
    if not isinstance(scales, Tensor):
        raise ValueError("hidden states are fp8 but there are no hidden_states_scales to restore their values with")
    expected = (len(states), *(1 for _ in states.shape[1:]))
    if tuple(scales.shape) != expected:
        raise ValueError(f"hidden_states_scales are {tuple(scales.shape)}; one per token is needed: {expected}")
    if not (torch.isfinite(scales) & (scales > 0)).all():
        raise ValueError("hidden_states_scales are not all finite and positive")


def check_finite(states: Tensor) -> None:
    """Raises `ValueError`, naming the layer slots, when a value is NaN or infinite."""
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


# -- contents ----------------------------------------------------------------------------------------------------------


class CorruptHiddenStatesError(ValueError):
    """The hidden-state file is damaged, or holds the states of another row."""


@dataclass(frozen=True)
class FileHeader:
    """The facts in a file's header; None where a file of another tool lacks them."""

    capture: CaptureSpec | None
    source_dtype: torch.dtype
    """The type to which fp8 values are restored."""
    verifier: str | None
    crc32: int | None


def num_slots(capture: CaptureSpec) -> int:
    return len(capture.aux_layer_ids) + capture.last_hidden


def columns_of(states: VerifierStates, layers: tuple[int, ...], capture: CaptureSpec) -> VerifierStates:
    """Returns what `capture` reads of the states of `layers` (ascending), which hold it."""
    aux_TD, last_TH = states.aux_TD, states.last_hidden_TH if capture.last_hidden else None
    if aux_TD is not None and capture.aux_layer_ids != layers:
        slots = [layers.index(layer) for layer in capture.aux_layer_ids]
        aux_TD = aux_TD.unflatten(-1, (len(layers), -1))[:, slots].flatten(1) if slots else None
    return VerifierStates(states.token_ids_T, aux_TD, last_TH)


def slots_of(capture: CaptureSpec, note: ExtractionNote | None, num_slots_in_file: int) -> list[int]:
    """Finds the slots of the wanted layers by the server's note; without one the file must hold exactly those layers.

    Raises `InvalidResponseError` when a layer is missing or the number of layers differs.
    """
    if note is None:
        if num_slots_in_file != num_slots(capture):
            raise InvalidResponseError(
                f"the server extracts {num_slots_in_file} layers, the drafter reads {num_slots(capture)} ({capture}), "
                "and the server left no note of its layers; start it with `speculators launch-vllm`"
            )
        return list(range(num_slots_in_file))
    wanted = [*capture.aux_layer_ids, *([note.num_layers] if capture.last_hidden else [])]
    missing = [layer for layer in wanted if layer not in note.layer_ids]
    if missing:
        asked = " ".join(map(str, capture.aux_layer_ids))
        raise InvalidResponseError(
            f"the server extracts layers {list(note.layer_ids)} of {note.num_layers}, the drafter reads {missing}: "
            f"start it with --target-layer-ids {asked or '0'} --include-last-layer"
        )
    return [note.layer_ids.index(layer) for layer in wanted]


def estimate_bytes(num_tokens: int, capture: CaptureSpec, hidden_size: int, dtype: torch.dtype) -> int:
    """Estimates the bytes on disk for `num_tokens` tokens, without headers; float8_e4m3fn includes its scales."""
    scale_bytes = torch.float32.itemsize if dtype == FP8 else 0
    return num_tokens * (num_slots(capture) * hidden_size * dtype.itemsize + scale_bytes + torch.int64.itemsize)


def to_tensors(states: VerifierStates, capture: CaptureSpec, dtype: torch.dtype | None) -> TensorDict:
    """Makes the tensors of a file; `dtype=None` keeps the states' type. Raises `ValueError` for NaN or infinity."""
    parts = []
    if states.aux_TD is not None:
        parts.append(states.aux_TD.unflatten(-1, (len(capture.aux_layer_ids), -1)))
    if states.last_hidden_TH is not None:
        parts.append(states.last_hidden_TH[:, None])
    states_TSH = torch.cat(parts, dim=1).cpu()
    check_finite(states_TSH)
    tensors = {"token_ids": states.token_ids_T.to("cpu", torch.int64).contiguous()}
    if dtype == FP8:
        tensors["hidden_states"], tensors["hidden_states_scales"] = quantise(states_TSH)
    else:
        tensors["hidden_states"] = states_TSH.to(dtype or states_TSH.dtype).contiguous()
        check_finite(tensors["hidden_states"])  # float16 overflows where bfloat16 does not
    return tensors


def quantise(states_TSH: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises to fp8 with one scale per token over all its slots.

    Saturates before the cast, which would turn values that round past 448 into NaN. Returns fp8 [T, slots, H] and
    scales [T, 1, 1].
    """
    values = states_TSH.float()
    scales_T11 = (values.abs().amax(dim=(1, 2), keepdim=True) / FP8_MAX).clamp(min=SMALLEST_SCALE)
    return (values / scales_T11).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales_T11


def from_tensors(tensors: Mapping[str, Tensor], capture: CaptureSpec, source_dtype: torch.dtype) -> VerifierStates:
    """Returns the states that `capture` asks for; ignores a last slot that a file of another tool may have."""
    states_TSH = tensors["hidden_states"]
    if "hidden_states_scales" in tensors:
        states_TSH = (states_TSH.float() * tensors["hidden_states_scales"]).to(source_dtype)
    num_aux = len(capture.aux_layer_ids)
    return VerifierStates(
        token_ids_T=tensors["token_ids"],
        aux_TD=states_TSH[:, :num_aux].flatten(1) if num_aux else None,
        last_hidden_TH=states_TSH[:, -1] if capture.last_hidden else None,
    )


def to_bytes(tensors: TensorDict, capture: CaptureSpec, source_dtype: torch.dtype, verifier: str | None) -> bytes:
    metadata = {
        "format": FORMAT,
        "aux_layer_ids": json.dumps(list(capture.aux_layer_ids)),
        "last_hidden": json.dumps(capture.last_hidden),
        "source_dtype": str(source_dtype).removeprefix("torch."),
        "crc32": str(checksum(tensors)),
    }
    if verifier is not None:
        metadata["verifier"] = verifier
    return with_sorted_header(save(tensors, metadata))


def with_sorted_header(content: bytes) -> bytes:
    """Sorts the header, which safetensors writes in random order: equal states are equal bytes, whose hashes agree."""
    num_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + num_bytes])
    in_order = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + in_order.ljust(num_bytes) + content[8 + num_bytes :]


def checksum(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for key in sorted(tensors):
        crc = zlib.crc32(tensors[key].contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return crc


def parse_header(metadata: Mapping[str, str] | None) -> FileHeader:
    if metadata is None or metadata.get("format") != FORMAT:
        return FileHeader(None, torch.bfloat16, None, None)
    return FileHeader(
        capture=CaptureSpec(tuple(json.loads(metadata["aux_layer_ids"])), json.loads(metadata["last_hidden"])),
        source_dtype=SOURCE_DTYPES[metadata["source_dtype"]],
        verifier=metadata.get("verifier"),
        crc32=int(metadata["crc32"]),
    )
