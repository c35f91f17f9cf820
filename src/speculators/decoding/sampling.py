"""The distribution that each scored position is sampled from: adjustments, penalties, temperature, filters.

Shapes: B rows, T scored columns (0 follows the last committed token, j + 1 follows draft j), V vocabulary.
The order is vLLM's: adjustments (bad words, min_tokens, biases), penalties, temperature, min-p, top-k, top-p.
Verification tests drafts against this distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from speculators.decoding.adjustments import Adjustment, BatchAdjustments
from speculators.decoding.request import ActiveRequest, TokenLogprobs
from speculators.decoding.settings import SamplingParams
from speculators.nn.device import to_device


class BatchSampling:
    """The sampling parameters of the rows of a batch, as tensors. Rebuilt when a request takes a row."""

    def __init__(
        self,
        params: list[SamplingParams],
        seeds: list[int],
        device: torch.device,
        adjustments_by_row: Sequence[Sequence[Adjustment]] = (),
    ):
        self.params = params
        self.device = device
        self.all_greedy = all(p.is_greedy for p in params)
        self.has_penalties = any(p.has_penalties for p in params)
        self.adjustments = BatchAdjustments(adjustments_by_row, device) if any(adjustments_by_row) else None
        self.is_argmax = self.all_greedy and not self.has_penalties and self.adjustments is None
        """The argmax of the raw logits decides every row."""
        temperatures = [0.0 if p.is_greedy else p.temperature for p in params]
        self.temperature_B = to_device(temperatures, device, torch.float32)
        self.host_seed_B = torch.tensor(seeds)
        self.seed_B = to_device(self.host_seed_B, device)

    def _column(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device([getattr(p, name) for p in self.params], self.device, dtype)

    @cached_property
    def _top_k_B11(self) -> Tensor | None:
        if all(p.top_k <= 0 for p in self.params):
            return None
        most = torch.iinfo(torch.int64).max
        return to_device([p.top_k if 0 < p.top_k < most else most for p in self.params], self.device)[:, None, None]

    @cached_property
    def _top_p_B11(self) -> Tensor | None:
        if all(p.top_p == 1 for p in self.params):
            return None
        # of a share that float32 has as 0, the most likely token is left, as of any small one
        return self._column("top_p").clamp(min=torch.finfo(torch.float32).tiny)[:, None, None]

    @cached_property
    def _min_p_B11(self) -> Tensor | None:
        return self._column("min_p")[:, None, None] if any(p.min_p > 0 for p in self.params) else None

    def penalised(self, logits_BTV: Tensor, seen: SeenTokens, drafted: DraftedTokens | None) -> Tensor:
        """fp32 logits after penalties; column j counts the drafts before it as emitted."""
        logits_BTV = logits_BTV.float()
        repetition, presence, frequency = (
            self._column(f"{name}_penalty")[:, None, None] for name in ("repetition", "presence", "frequency")
        )
        output_counts_BTV = seen.output_counts_BV[:, None].expand(logits_BTV.shape)
        if drafted is not None:
            output_counts_BTV = output_counts_BTV + drafted.counts(logits_BTV.shape[-1])
        is_in_output_BTV = output_counts_BTV > 0
        is_seen_BTV = is_in_output_BTV | seen.is_in_prompt_BV[:, None]
        repeated_BTV = torch.where(logits_BTV > 0, logits_BTV / repetition, logits_BTV * repetition)
        logits_BTV = torch.where(is_seen_BTV, repeated_BTV, logits_BTV)
        return logits_BTV - frequency * output_counts_BTV - presence * is_in_output_BTV

    def is_finite(self, logits_BTV: Tensor) -> Tensor:
        """bool [B, T]: `probs` has a law to give. One pass: the largest of scores with a NaN is NaN; it is -inf when no
        token is left. A best score that temperature takes out of range counts as infinite."""
        return (logits_BTV.amax(-1).float() / self.divisor_B[:, None]).isfinite()

    @cached_property
    def divisor_B(self) -> Tensor:
        return self.temperature_B.masked_fill(self.temperature_B == 0, 1.0)

    def probs(self, logits_BTV: Tensor) -> Tensor:
        """fp32 probabilities after temperature and filters; greedy rows are one-hot."""
        is_greedy_B11 = (self.temperature_B == 0)[:, None, None]
        logits_BTV = logits_BTV.float()
        probs_BTV = self._filtered((logits_BTV / self.divisor_B[:, None, None]).softmax(-1))
        if any(p.is_greedy for p in self.params):
            best_BT1 = logits_BTV.argmax(-1, keepdim=True)
            one_hot_BTV = torch.zeros_like(probs_BTV).scatter_(-1, best_BT1, 1.0)
            probs_BTV = torch.where(is_greedy_B11, one_hot_BTV, probs_BTV)
        return probs_BTV

    def _filtered(self, probs_BTV: Tensor) -> Tensor:
        if self._min_p_B11 is not None:
            floor_BT1 = self._min_p_B11 * probs_BTV.amax(-1, keepdim=True)
            probs_BTV = _renormalised(probs_BTV.masked_fill(probs_BTV < floor_BT1, 0.0))
        if self._top_k_B11 is None and self._top_p_B11 is None:
            return probs_BTV
        # stable: equal probabilities keep the lower id, on every machine
        sorted_BTV, order_BTV = probs_BTV.sort(dim=-1, descending=True, stable=True)
        if self._top_k_B11 is not None:
            rank_V = torch.arange(probs_BTV.shape[-1], device=self.device)
            sorted_BTV = _renormalised(sorted_BTV.masked_fill(rank_V >= self._top_k_B11, 0.0))
        if self._top_p_B11 is not None:
            before_BTV = sorted_BTV.cumsum(-1) - sorted_BTV  # mass of the more likely tokens; the first is always kept
            sorted_BTV = _renormalised(sorted_BTV.masked_fill(before_BTV >= self._top_p_B11, 0.0))
        return torch.zeros_like(probs_BTV).scatter_(-1, order_BTV, sorted_BTV)


def _renormalised(probs_BTV: Tensor) -> Tensor:
    return probs_BTV / probs_BTV.sum(-1, keepdim=True)


class SeenTokens:
    """Token counts of each row's committed sequence, for penalties."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device):
        self.is_in_prompt_BV = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self.output_counts_BV = torch.zeros(num_rows, vocab_size, device=device)

    def start(self, row: int, prompt: list[int]) -> None:
        self.is_in_prompt_BV[row] = False
        self.is_in_prompt_BV[row].index_fill_(0, to_device(prompt, self.is_in_prompt_BV.device), True)
        self.output_counts_BV[row] = 0

    def add(self, token_ids_by_row: dict[int, list[int]]) -> None:
        rows = [row for row, token_ids in token_ids_by_row.items() for _ in token_ids]
        tokens = [token_id for token_ids in token_ids_by_row.values() for token_id in token_ids]
        index = to_device([rows, tokens], self.output_counts_BV.device)
        one = self.output_counts_BV.new_ones(())
        self.output_counts_BV.index_put_((index[0], index[1]), one, accumulate=True)

    def rows(self, first: int, last: int) -> SeenTokens:
        view = SeenTokens.__new__(SeenTokens)
        view.is_in_prompt_BV = self.is_in_prompt_BV[first:last]
        view.output_counts_BV = self.output_counts_BV[first:last]
        return view


@dataclass(frozen=True)
class DraftedTokens:
    """The drafts before each scored column: penalties count a drafted token as emitted."""

    token_ids_BK: Tensor
    is_ancestor_TT: Tensor
    """bool; [i, j]: column i comes after column j (or is it); column 0 is the last committed token."""

    def counts(self, vocab_size: int) -> Tensor:
        """[B, T, V]: how often each token was drafted before each column."""
        B, K = self.token_ids_BK.shape
        counts_BTV = torch.zeros(B, K + 1, vocab_size, device=self.token_ids_BK.device)
        index_BK1 = self.token_ids_BK.clamp_min(0)[..., None]
        is_drafted_BK = (self.token_ids_BK >= 0).float()
        for slot in range(K):
            after_T = self.is_ancestor_TT[:, slot + 1].float()
            added_BT1 = (is_drafted_BK[:, slot, None] * after_T)[..., None]
            counts_BTV.scatter_add_(-1, index_BK1[:, slot, None].expand(B, K + 1, 1), added_BT1)
        return counts_BTV


def logprobs_of(num_top: int, logits_TV: Tensor, token_ids: Sequence[int]) -> list[TokenLogprobs]:
    """Of the given tokens, and of the `num_top` likeliest (-1: all) of each of the T positions."""
    return logprobs_by_row({0: (num_top, range(len(token_ids)), token_ids)}, logits_TV[None])[0]


Reported = tuple[int, Sequence[int], Sequence[int]]
"""How many likeliest tokens to report, and columns with the tokens that stand there."""


def to_report(
    requests: Mapping[int, ActiveRequest],
    token_ids_by_row: Mapping[int, list[int]],
    columns_by_row: Mapping[int, list[int]],
    first_row: int,
) -> dict[int, Reported]:
    """What requests ask for of the tokens that they gained, by row of the forward."""
    return {
        row - first_row: (num_top, columns_by_row[row], token_ids)
        for row, token_ids in token_ids_by_row.items()
        if (num_top := requests[row].params.logprobs) is not None
    }


def logprobs_by_row(asked: Mapping[int, Reported], logits_BTV: Tensor) -> dict[int, list[TokenLogprobs]]:
    """The same of several rows, with one copy to the host."""
    places = [(top, row, *place) for row, (top, *reported) in asked.items() for place in zip(*reported, strict=True)]
    groups = {top: [place[1:] for place in places if place[0] == top] for top in {place[0] for place in places}}
    if not groups:
        return {row: [] for row in asked}
    found = []
    for num_top, group in groups.items():
        row_M, column_M, token_M = to_device(group, logits_BTV.device).T
        logprobs_MV = logits_BTV[row_M, column_M].float().log_softmax(-1)
        top = logprobs_MV.topk(logits_BTV.shape[-1] if num_top < 0 else num_top)
        parts = (logprobs_MV.gather(-1, token_M[:, None]), top.values, top.indices)
        found.append(torch.cat([part.double() for part in parts], -1))  # float64 holds float32 and ids as they are
    numbers = iter(torch.cat([part.flatten() for part in found]).tolist())
    logprobs: dict[int, list[TokenLogprobs]] = {row: [] for row in asked}
    for group, part in zip(groups.values(), found, strict=True):
        k = part.shape[1] // 2
        for row, *_ in group:
            own, *tops = islice(numbers, 2 * k + 1)
            logprobs[row].append(TokenLogprobs(own, dict(zip(map(int, tops[k:]), tops[:k], strict=True))))
    return logprobs
