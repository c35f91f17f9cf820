"""Puts prompts into the cache: chunk by chunk, and a start that several prompts share (a system prompt) only once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from speculators.decoding.request import ActiveRequest
from speculators.interfaces import Verifier, VerifierOutput

MIN_SHARED_TOKENS = 16
"""Shorter common starts are computed twice: a copy saves less than the row waits for it."""


def score_chunk(verifier: Verifier, requests: dict[int, ActiveRequest], num_tokens: int) -> VerifierOutput:
    """Score the next `num_tokens` of each prompt in one forward over neighbouring rows, with one row of logits each."""
    chunks = [q.prompt[q.num_prefilled : q.num_prefilled + num_tokens] for q in requests.values()]
    num_valid_B = torch.tensor([len(chunk) for chunk in chunks])
    T = max(len(chunk) for chunk in chunks)
    token_ids_BT = torch.tensor([chunk + [0] * (T - len(chunk)) for chunk in chunks], device=verifier.device)
    output = verifier.score(token_ids_BT, num_valid_B, first_row=next(iter(requests)), last_only=True)
    verifier.keep(torch.arange(T).expand(len(chunks), T), num_valid_B)
    for i, request in enumerate(requests.values()):
        request.num_prefilled += len(chunks[i])
        if output.states_BTD is not None:
            request.prompt_states.append(output.states_BTD[i, : len(chunks[i])])
    return output


@dataclass(frozen=True)
class SharedPrefix:
    """The row that has the start of another row's prompt."""

    from_row: int
    num_tokens: int
    is_ready: bool
    """The other row has computed it; if not, it will, and waiting is cheaper than computing it twice."""


def share_prompt_prefix(verifier: Verifier, row: int, rows: list[ActiveRequest | None]) -> bool:
    """Copy the start of a new row's prompt from a row that has computed it; True: wait, one is about to compute it."""
    shared = shared_prefix(row, rows)
    if shared is None:
        return False
    if shared.is_ready:
        request, donor = rows[row], rows[shared.from_row]
        assert request is not None and donor is not None
        verifier.share_prefix(shared.from_row, row, shared.num_tokens)
        request.copy_prefix(donor, shared.num_tokens)
    return not shared.is_ready


def shared_prefix(row: int, rows: list[ActiveRequest | None]) -> SharedPrefix | None:
    """The longest start of a new row's prompt that another row has, or (a row before it) is about to have."""
    request = rows[row]
    assert request is not None
    best: SharedPrefix | None = None
    for other_row, other in enumerate(rows):
        if other is None or other_row == row or (other.num_prefilled == 0 and other_row > row):
            continue
        # the last prompt token is always scored: its logits give the first output token
        common = min(num_common(request.prompt, other.prompt), len(request.prompt) - 1)
        num_ready = min(common, other.num_prefilled)
        is_ready = num_ready == common
        if common >= MIN_SHARED_TOKENS and (best is None or (common, is_ready) > (best.num_tokens, best.is_ready)):
            best = SharedPrefix(other_row, common, is_ready)
    return best


def num_common(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
