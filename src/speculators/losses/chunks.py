"""Chunks of draft rows and of the target rows they are compared with: how they are cut, computed and scored.

Shapes: N draft rows, T target rows, U of them in use, K uses of a target row, C rows of a chunk, H hidden size, X width
of a row, V draft vocabulary, O verifier tokens outside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators.losses.closed_form import AutogradKernel, LogitRows, LossKernel, TargetRows, TokenRows
from speculators.losses.registry import KERNELS, LossFunction

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits per chunk, by device: on a CPU they fit its cache, on a GPU products are worth launching."""
CHOSEN_ELEMENTS: ContextVar[int | None] = ContextVar("CHOSEN_ELEMENTS", default=None)
"""See `chunks_of`."""
FEWEST_ROWS = 16
MIN_FILL = 0.5
"""A column of the table that fills at least this share of a chunk is padded; sparser ones are gathered."""


class Targets(Protocol):
    """What draft rows are compared with: computes the target distributions of chosen rows on demand."""

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows: ...

    def outside(self, rows_C: Tensor, target: TargetRows, dtype: torch.dtype) -> OutsideRows | None:
        """The tokens outside the draft vocabulary, of these rows. None: there are none."""
        ...


class OutsideRows(NamedTuple):
    """What the verifier gives to the tokens outside the draft vocabulary."""

    is_best_C: Tensor
    """Bool: the most likely token is one of them."""
    log_weight_C: Tensor
    """log sum exp of their logits."""

    def take(self, index: Tensor) -> OutsideRows:
        return OutsideRows(*(part[index] for part in self))


class OutsideHead(NamedTuple):
    """The rows of the verifier's head that a reduced draft vocabulary leaves out. No loss reads them; they tell where
    the verifier's token cannot be drafted, and how often."""

    weight_OH: Tensor
    token_ids_O: Tensor
    """Verifier ids, ascending, of the rows."""
    kept_ids_V: Tensor
    """Verifier ids of the draft vocabulary, ascending."""


def elements_per_chunk(device: torch.device) -> int:
    return CHOSEN_ELEMENTS.get() or CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])


@contextmanager
def chunks_of(elements: int | None) -> Iterator[None]:
    """Losses inside are computed in chunks of so many logits (at least 16 rows); None: as the device likes them. Their
    sums are rounded otherwise, and nothing else changes."""
    token = CHOSEN_ELEMENTS.set(elements)
    try:
        yield
    finally:
        CHOSEN_ELEMENTS.reset(token)


def rows_per_chunk(device: torch.device, width: int, elements: int | None = None) -> int:
    """Rows of a chunk of logits over `width` tokens."""
    return max(FEWEST_ROWS, (elements or elements_per_chunk(device)) // width)


@dataclass(frozen=True)
class HeadTargets:
    """The verifier's own distributions: its head on its (normed) hidden rows, then its logit transform."""

    hidden_TH: Tensor
    weight_VH: Tensor
    scale: float = 1.0
    """Factor on the logits (`logit_scale`; 1 / `logits_scaling`)."""
    softcap: float | None = None
    """`final_logit_softcapping`: cap * tanh(logits / cap)."""
    outside_head: OutsideHead | None = None
    """None: `weight_VH` is the verifier's whole head."""

    def logits(self, rows_C: Tensor, dtype: torch.dtype, weight_VH: Tensor | None = None) -> Tensor:
        weight_VH = self.weight_VH.to(dtype) if weight_VH is None else weight_VH
        logits_CV = F.linear(self.hidden_TH[rows_C].to(dtype), weight_VH)
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        return logits_CV if self.softcap is None else self.softcap * torch.tanh(logits_CV / self.softcap)

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows:
        return LogitRows(self.logits(rows_C, dtype))

    @torch.no_grad()
    def outside(self, rows_C: Tensor, target: TargetRows, dtype: torch.dtype) -> OutsideRows | None:
        """The rest of the head, in pieces of a chunk: a small draft vocabulary makes chunks of many rows."""
        if self.outside_head is None:
            return None
        weight_OH, token_ids_O, kept_ids_V = self.outside_head
        weight_OH, pieces = weight_OH.to(dtype), []
        for rows in rows_C.split(rows_per_chunk(rows_C.device, len(weight_OH))):
            rival = LogitRows(self.logits(rows, dtype, weight_OH))
            best_N = rival.logits_NV.gather(1, rival.token_ids_N[:, None])[:, 0]
            pieces.append((best_N, rival.token_ids_N, rival.logits_NV.logsumexp(-1)))
        rival_C, rival_ids_C, log_weight_C = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        assert isinstance(target, LogitRows)
        best_C = target.logits_NV.gather(1, target.token_ids_N[:, None])[:, 0]
        comes_first_C = token_ids_O[rival_ids_C] < kept_ids_V[target.token_ids_N]  # ties: the smallest id
        return OutsideRows((rival_C > best_C) | ((rival_C == best_C) & comes_first_C), log_weight_C)


@dataclass(frozen=True)
class TokenTargets:
    """Hard labels; only `ce` makes sense with them."""

    token_ids_T: Tensor

    def at(self, rows_C: Tensor, dtype: torch.dtype) -> TargetRows:
        return TokenRows(self.token_ids_T[rows_C])

    def outside(self, rows_C: Tensor, target: TargetRows, dtype: torch.dtype) -> OutsideRows | None:
        return None


class Group(NamedTuple):
    """Draft rows of a chunk that are scored together."""

    draft_rows: Tensor
    """One per target row (missing ones repeat a row), or only those that exist."""
    real: Tensor | None
    """Indices of the rows that are not repetitions; None = all."""
    target_index: Tensor | None
    """Target rows of the chunk to gather; None = all, in order."""

    def to(self, device: torch.device) -> Group:
        return Group(*(part if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore


@dataclass(frozen=True)
class Pairing:
    """Says which draft rows share which target rows, cut into chunks of target rows."""

    target_rows_U: Tensor
    table_UK: Tensor
    """Draft row of the k-th use of a target row, -1 = none."""
    counts: list[list[int]]
    """[chunk][k]: rows of column k that exist."""
    chunk_rows: int
    num_rows: int
    device: torch.device
    """Where the rows are. All that is kept here is on the host: cutting chunks waits for no device."""

    @classmethod
    def of(cls, target_index_N: Tensor, chunk_rows: int, device: torch.device) -> Pairing:
        target_index_N = target_index_N.cpu()
        order_N = target_index_N.argsort(stable=True)
        sorted_N = target_index_N[order_N]
        target_rows_U, group_N, uses_U = sorted_N.unique_consecutive(return_inverse=True, return_counts=True)
        first_U = uses_U.cumsum(0) - uses_U
        use_N = torch.arange(len(order_N), device=order_N.device) - first_U[group_N]
        num_uses = int(uses_U.max()) if len(uses_U) else 0
        table_UK = order_N.new_full((len(target_rows_U), num_uses), -1)
        table_UK[group_N, use_N] = order_N
        exists = F.pad((table_UK >= 0).long(), (0, 0, 0, -len(target_rows_U) % chunk_rows))
        counts = exists.unflatten(0, (-1, chunk_rows)).sum(1).tolist() if num_uses else []
        return cls(target_rows_U, table_UK, counts, chunk_rows, len(order_N), device)

    def chunks(self) -> Iterator[tuple[Tensor, list[Group]]]:
        for i, counts in enumerate(self.counts):
            span = slice(i * self.chunk_rows, (i + 1) * self.chunk_rows)
            target_rows_C = self.target_rows_U[span]
            columns = self.table_UK[span].unbind(1)
            size = len(target_rows_C)
            pairs = [(rows, n) for rows, n in zip(columns, counts, strict=True) if n]
            groups = [dense_group(rows, n == size) for rows, n in pairs if n >= MIN_FILL * size]
            sparse = [rows for rows, n in pairs if n < MIN_FILL * size]
            groups += gathered_groups(torch.stack(sparse), self.chunk_rows) if sparse else []
            yield target_rows_C.to(self.device, non_blocking=True), [group.to(self.device) for group in groups]


def dense_group(draft_rows_C: Tensor, is_full: bool) -> Group:
    if is_full:
        return Group(draft_rows_C, None, None)
    return Group(draft_rows_C.clamp_min(0), (draft_rows_C >= 0).nonzero().squeeze(1), None)


def gathered_groups(draft_rows_KC: Tensor, most: int) -> list[Group]:
    """Puts the rows that exist into few groups, whichever use they are: a product of few rows costs as much as one of
    many."""
    use_M, place_M = (draft_rows_KC >= 0).nonzero().unbind(1)
    pieces = zip(draft_rows_KC[use_M, place_M].split(most), place_M.split(most), strict=True)
    return [Group(rows, None, places) for rows, places in pieces]


class Chunk(NamedTuple):
    """Results of one group of draft rows."""

    group: Group
    losses: list[Tensor]
    grad_logits: Tensor | None
    """Of the weighted sum of the terms."""
    draft_ids: Tensor
    target_ids: Tensor
    """In the draft vocabulary."""
    outside: OutsideRows | None
    """None too where nobody asked."""

    def write(self, out_N: Tensor, values: Tensor) -> None:
        """Writes the values of the group's real rows into `out_N`."""
        rows, real = self.group.draft_rows, self.group.real
        if real is None:
            out_N[rows] = values
        else:
            out_N[rows[real]] = values[real]


Terms = list[tuple["LossKernel | WholeVocabulary", float]]


def iterate_chunks(
    rows_NX: Tensor,
    head_VX: Tensor,
    targets: Targets,
    pairing: Pairing,
    terms: Terms,
    *,
    wants_grad: bool,
    wants_outside: bool,
) -> Iterator[Chunk]:
    """Computes target logits once per chunk, then scores the draft rows that share them, group by group. Nothing of one
    group is held while the next is computed: a caller that deletes its chunk too has the logits of one at a time."""
    for target_rows_C, groups in pairing.chunks():
        target = targets.at(target_rows_C, head_VX.dtype)
        outside_C = targets.outside(target_rows_C, target, head_VX.dtype) if wants_outside else None
        for group in groups:
            yield score_group(
                group, LogitRows(F.linear(rows_NX[group.draft_rows], head_VX)), target, outside_C, terms, wants_grad
            )
        del target  # its logits, before those of the next chunk are made


def score_group(
    group: Group, draft: LogitRows, target: TargetRows, outside: OutsideRows | None, terms: Terms, wants_grad: bool
) -> Chunk:
    if group.target_index is not None:
        target = target.take(group.target_index)
        outside = None if outside is None else outside.take(group.target_index)
    losses, grad_logits = [], None
    for kernel, weight in terms:
        if isinstance(kernel, WholeVocabulary):
            losses.append(kernel.measure(draft, target, outside))
            continue
        loss, grad = kernel(draft, target, wants_grad and weight != 0.0)
        losses.append(loss)
        if grad is not None:
            grad = grad if weight == 1.0 else grad.mul_(weight)
            grad_logits = grad if grad_logits is None else grad_logits.add_(grad)
    if wants_grad and grad_logits is None:
        grad_logits = torch.zeros_like(draft.probs_NV)
    return Chunk(group, losses, grad_logits, draft.token_ids_N, target.token_ids_N, outside)


@dataclass(frozen=True)
class WholeVocabulary:
    """Measures a loss over the verifier's whole vocabulary: the tokens outside the draft vocabulary are one more token,
    which is never drafted. It teaches nothing: a term of weight 0."""

    function: LossFunction

    def measure(self, draft: LogitRows, target: TargetRows, outside: OutsideRows | None) -> Tensor:
        if outside is not None:
            assert isinstance(target, LogitRows)
            never_N1 = torch.full_like(outside.log_weight_C, -torch.inf)[:, None]
            draft = LogitRows(torch.cat([draft.logits_NV, never_N1], -1))
            target = LogitRows(torch.cat([target.logits_NV, outside.log_weight_C[:, None]], -1))
        kernel = kernel_of(self.function)
        assert not isinstance(kernel, WholeVocabulary)
        return kernel(draft, target, False)[0]


def kernel_of(function: LossFunction | WholeVocabulary) -> LossKernel | WholeVocabulary:
    """Returns the closed form of a known loss; autograd differentiates any other function within the chunk."""
    if isinstance(function, WholeVocabulary):
        return function
    return KERNELS[function] if function in KERNELS else AutogradKernel(function)
