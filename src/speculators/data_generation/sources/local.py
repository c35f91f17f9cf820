"""LocalSource: runs the verifier in this process on several sequences per forward.

Sequences of similar length share a right-padded batch. No attention mask is needed: attention is causal, so padding
after a token cannot change its state, and kernels for plain causal attention are the fastest.

Shapes: B sequences of a batch, T tokens, A aux layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.verifier import capture_states


class LocalSource:
    """A `HiddenStateSource` over a loaded verifier."""

    def __init__(self, verifier_model: nn.Module, capture: CaptureSpec, *, max_batch_tokens: int = 8192) -> None:
        """Runs at most `max_batch_tokens` positions (padding included) per forward; a longer sequence runs alone."""
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens={max_batch_tokens}; a forward needs at least 1 token")
        self.capture = capture
        self.model = verifier_model
        self.max_batch_tokens = max_batch_tokens
        # runs the decoder alone: training makes its own logits, and [B, T, V] is the largest tensor of a forward
        get_decoder: Any = getattr(verifier_model, "get_decoder", None)
        self.decoder: nn.Module = verifier_model if get_decoder is None else get_decoder()

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Computes the states of each sequence, in order. Raises `ValueError` for an empty sequence or NaN states."""
        if any(len(ids) == 0 for ids in token_ids):
            raise ValueError("a sequence without tokens has no states; leave it out")
        found: list[VerifierStates | None] = [None] * len(token_ids)
        for batch in batches_by_length([len(ids) for ids in token_ids], self.max_batch_tokens):
            for index, states in zip(batch, self.forward([token_ids[i] for i in batch]), strict=True):
                found[index] = states
        return [states for states in found if states is not None]

    @torch.no_grad()
    def forward(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """Runs one forward of the verifier over all the sequences."""
        device = next(self.model.parameters()).device
        token_ids_BT = pad_sequence([ids.to(device, torch.int64) for ids in token_ids], batch_first=True)
        # a caller's autocast would silently change the states' precision
        with torch.autocast(device.type, enabled=False), capture_states(self.model, self.capture) as captured:
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


def batches_by_length(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Groups indices, longest first, so that count x longest stays within the limit."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def refuse_non_finite(states: VerifierStates) -> None:
    for name, values in (("aux", states.aux_TD), ("last", states.last_hidden_TH)):
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(
                f"the verifier's {name} hidden states are NaN or infinite for a sequence of {len(values)} tokens "
                f"(dtype {values.dtype}); load the verifier in bfloat16 or float32"
            )
