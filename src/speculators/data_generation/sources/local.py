"""LocalSource: runs the verifier in this process on several sequences per forward.

Sequences of similar length share a right-padded batch where that pays, which the device decides. No attention mask is
needed: attention is causal, so padding after a token cannot change its state, and kernels for plain causal attention
are the fastest.

Shapes: B sequences of a batch, T tokens, A aux layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.verifier import capture_states, decoder_of, turn_of
from speculators.verifier.placement import device_of


class LocalSource:
    """A `HiddenStateSource` over a loaded verifier."""

    def __init__(self, verifier_model: nn.Module, capture: CaptureSpec, *, max_batch_tokens: int | None = None) -> None:
        """Runs at most `max_batch_tokens` positions (padding included) per forward; a longer sequence runs alone. None:
        what is fastest on the verifier's device."""
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens={max_batch_tokens}; a forward needs at least 1 token")
        self.capture = capture
        self.model = verifier_model
        self.max_batch_tokens = max_batch_tokens
        self.decoder = decoder_of(verifier_model)  # training makes its own logits

    @property
    def batching(self) -> Batching:
        """What the verifier's device computes together."""
        return batching_of(device_of(self.model), self.max_batch_tokens)

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Computes the states of each sequence, in order. Raises `ValueError` for an empty sequence or NaN states."""
        if any(len(ids) == 0 for ids in token_ids):
            raise ValueError("a sequence without tokens has no states; leave it out")
        found: list[VerifierStates | None] = [None] * len(token_ids)
        for batch in batches_by_length([len(ids) for ids in token_ids], self.batching):
            for index, states in zip(batch, self.forward([token_ids[i] for i in batch]), strict=True):
                found[index] = states
        return [states for states in found if states is not None]

    @torch.no_grad()
    def forward(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Runs one forward of the verifier over all the sequences."""
        device = device_of(self.model)
        token_ids_BT = pad_sequence([ids.to(device, torch.int64) for ids in token_ids], batch_first=True)
        # a caller's autocast would silently change the states' precision
        with (
            turn_of(self.model),
            torch.autocast(device.type, enabled=False),
            capture_states(self.model, self.capture) as captured,
        ):
            self.decoder(input_ids=token_ids_BT, use_cache=False)
        aux_BTD, last_BTH = captured.aux, captured.last_hidden
        states = [
            VerifierStates(
                token_ids_T=ids,
                aux_TD=None if aux_BTD is None else aux_BTD[row, : len(ids)],
                last_hidden_TH=None if last_BTH is None else last_BTH[row, : len(ids)],
            )
            for row, ids in enumerate(token_ids)
        ]
        for row in states:
            refuse_non_finite(row)
        return states


@dataclass(frozen=True)
class Batching:
    """What a device computes together. Unit: positions, padding included."""

    max_tokens: int
    """Most positions of a forward that has more than one row."""
    max_padding: int
    """Most positions that a forward wastes on padding: about what the next forward costs besides its own positions."""


CPU_BATCHING = Batching(max_tokens=512, max_padding=32)
"""A product of 128 rows fills the cores, one of 1,024 leaves their caches (measured by benchmarks/extract.py)."""
GPU_BATCHING = Batching(max_tokens=8192, max_padding=512)
"""Estimated, not measured: starting a forward of an 8B verifier takes as long as computing some 500 positions."""


def batching_of(device: torch.device, max_tokens: int | None = None) -> Batching:
    batching = CPU_BATCHING if device.type == "cpu" else GPU_BATCHING
    return batching if max_tokens is None else replace(batching, max_tokens=max_tokens)


def batches_by_length(lengths: Sequence[int], batching: Batching) -> list[list[int]]:
    """Groups indices, longest first, so that count x longest and the padding of each group stay within the limits."""
    batches: list[list[int]] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        padding += longest - lengths[index]
        fits = batches and longest * (len(batches[-1]) + 1) <= batching.max_tokens
        if fits and padding <= batching.max_padding:
            batches[-1].append(index)
        else:
            batches.append([index])
            padding = 0
    return batches


def refuse_non_finite(states: VerifierStates) -> None:
    for name, values in (("aux", states.aux_TD), ("last", states.last_hidden_TH)):
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(
                f"the verifier's {name} hidden states are NaN or infinite for a sequence of {len(values)} tokens "
                f"(dtype {values.dtype}); load the verifier in bfloat16 or float32"
            )


WINDOW_BATCHES = 8
"""Batches whose rows are sorted by length together, so that little is padded."""


def compute_in_order(
    model: nn.Module, capture: CaptureSpec, rows: Sequence[Tensor], todo: Sequence[int], batch_tokens: int | None = None
) -> Iterator[tuple[int, VerifierStates]]:
    """Yields each row of `todo`, in order, with its states; `batch_tokens=None` chooses by device.

    On a CPU a row at a time, so that a row's states depend on nothing else: a hundred tokens fill the cores. On a GPU
    batches of similar length.
    """
    if batch_tokens is None:
        batch_tokens = 1 if next(model.parameters()).device.type == "cpu" else GPU_BATCHING.max_tokens
    source = LocalSource(model, capture, max_batch_tokens=batch_tokens)
    window: list[int] = []
    num_tokens = 0
    for index, row in enumerate(todo, start=1):
        window.append(row)
        num_tokens += len(rows[row])
        if batch_tokens == 1 or num_tokens >= batch_tokens * WINDOW_BATCHES or index == len(todo):
            yield from zip(window, source.read([torch.as_tensor(rows[row]) for row in window]), strict=True)
            window, num_tokens = [], 0
