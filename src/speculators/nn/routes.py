"""Which route a drafter's attention takes in training: the one place that knows what each can do. A route is chosen by
argument, so that every route runs on every machine that has its operations.

    draft_attn_impl           cpu      cuda     other devices
    eager                     DENSE    DENSE    DENSE
    sdpa                      FLASH    SDPA     SDPA
    simple_flex_attention     FLASH    FLEX     SDPA
    None                      as simple_flex_attention

Every drafter that attends has all four: `nn.unrolled`, and the layouts of chains and of blocks beside their drafters.

Flex attention compiles to a kernel where masks are two ranges of keys per query.

Shapes: B rows, R queries, L keys, N query heads, G key/value heads, d head size; Q >= R and K >= L, padded to whole
blocks; QB and KB their numbers of blocks.

    query r sees     key with low[0, r] <= key < high[0, r]      its context: columns of its document, up to its own
                     key with low[1, r] <= key < high[1, r]      its own slots, where drafters have any

Every mask of a drafter is of this kind, so one graph serves all layers, steps and rows: it is compiled for sizes that
vary (`mark`), none of which is 0 or 1 (`padded_size`), and no number of Python is part of it. Nothing is compiled anew
because a row has other documents, supervised tokens or anchors. Blocks follow from the ranges without a [Q, K] mask and
without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128
"""Queries and keys per block of the kernel."""
FEWEST_BLOCKS = 2
"""Sizes 0 and 1, of blocks too, would be compiled for themselves."""


class KeyRanges(NamedTuple):
    """int64 [2, R] each: the two ranges of keys that each query sees; empty where low >= high."""

    low_2R: Tensor
    high_2R: Tensor

    @property
    def num_visible(self) -> Tensor:
        """int64 [R]: keys that each query sees; those in both ranges count once."""
        in_both_R = self.high_2R.amin(0) - self.low_2R.amax(0)
        return (self.high_2R - self.low_2R).clamp_min(0).sum(0) - in_both_R.clamp_min(0)


class BlockLists(NamedTuple):
    """Blocks as the kernel reads them: for each block of queries the keys' blocks, and the other way round; those that
    are partly and those that are wholly visible. int32, numbers [1, 1, QB] and indices [1, 1, QB, KB]."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


@dataclass(frozen=True)
class FlexMask:
    """The mask of a layer, made once per row."""

    ranges: tuple[Tensor, Tensor, Tensor, Tensor]
    """int64 [Q] each: low and high of the first range, then of the second. Padded queries see key 0: finite."""
    blocks: BlockLists
    num_queries: int
    num_keys: int

    @classmethod
    def of(cls, ranges: KeyRanges, num_keys: int) -> FlexMask:
        num_queries = ranges.low_2R.shape[1]
        padding = padded_size(num_queries) - num_queries
        low_2Q, high_2Q = F.pad(ranges.low_2R, (0, padding)), F.pad(ranges.high_2R, (0, padding))
        high_2Q[0, num_queries:] = 1
        partial_QK, full_QK = visible_blocks(low_2Q, high_2Q, padded_size(num_keys) // BLOCK)
        lists = [ordered(dense) for dense in (partial_QK, full_QK, partial_QK.T, full_QK.T)]
        split = tuple(part.contiguous() for part in (low_2Q[0], high_2Q[0], low_2Q[1], high_2Q[1]))
        mask = cls(split, BlockLists(*(part for pair in lists for part in pair)), num_queries, num_keys)  # type: ignore
        for tensor in (*mask.ranges, *mask.blocks):
            mark(tensor, *range(2, tensor.ndim) if tensor.ndim > 1 else (0,))
        return mask


Kernel = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor], BlockLists], tuple[Tensor, Tensor]]
"""(query [B, N, Q, d], key and value [B, G, K, d], ranges, blocks) -> (out [B, N, Q, d], log-sum-exp [B, N, Q])"""


def attend(query: Tensor, key: Tensor, value: Tensor, ranges, blocks: BlockLists) -> tuple[Tensor, Tensor]:
    """What is compiled. The block mask is made inside, so that its sizes are those of the tensors."""
    low_Q, high_Q, own_low_Q, own_high_Q = ranges

    def visible(batch, head, q, k):
        return ((k >= low_Q[q]) & (k < high_Q[q])) | ((k >= own_low_Q[q]) & (k < own_high_Q[q]))

    sizes = (query.shape[2], key.shape[2])
    mask = BlockMask(seq_lengths=sizes, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible, **blocks._asdict())
    out, aux = flex_attention(query, key, value, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    return out, aux.lse


def compiled(backend: str | Callable = "inductor") -> Kernel:
    """`attend`, compiled when it is first called. So is `torch.compile`: it imports the compiler, a second of every
    command, and only training on a GPU needs it."""

    @cache
    def kernel() -> Kernel:
        return torch.compile(attend, backend=backend)

    return lambda *inputs: kernel()(*inputs)


def flex(
    kernel: Kernel, query_BRNd: Tensor, key_BLGd: Tensor, value_BLGd: Tensor, mask: FlexMask
) -> tuple[Tensor, Tensor]:
    """out [B, N, R, d] and log-sum-exp [B, N, R] (natural logarithm), differentiable."""
    assert (query_BRNd.shape[1], key_BLGd.shape[1]) == (mask.num_queries, mask.num_keys)
    query, key, value = (to_whole_blocks(x) for x in (query_BRNd, key_BLGd, value_BLGd))
    out, lse = kernel(query, key, value, mask.ranges, mask.blocks)
    return out[:, :, : mask.num_queries], lse[:, :, : mask.num_queries]


def to_whole_blocks(x_BLNd: Tensor) -> Tensor:
    """[B, N, whole blocks, d], always in the same memory layout: another one would be compiled for itself."""
    length = x_BLNd.shape[1]
    padding = padded_size(length) - length
    x_BKNd = F.pad(x_BLNd, (0, 0, 0, 0, 0, padding)) if padding else x_BLNd.contiguous()
    x_BNKd = x_BKNd.transpose(1, 2)
    mark(x_BNKd, 2)
    return x_BNKd


def padded_size(size: int) -> int:
    return max(FEWEST_BLOCKS, -(-size // BLOCK)) * BLOCK


def mark(tensor: Tensor, *dims: int) -> None:
    """Says that these sizes vary, each on its own. Only a hint: where a kernel needs one size it is compiled for it."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def visible_blocks(low_2Q: Tensor, high_2Q: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """bool [QB, KB] each: blocks of which some pairs are visible, and blocks of which all are."""
    first_K = torch.arange(num_key_blocks, device=low_2Q.device) * BLOCK
    low, high = low_2Q[..., None], high_2Q[..., None]
    touched_QK = ((low < high) & (low < first_K + BLOCK) & (high > first_K)).any(0)
    covered_QK = ((low <= first_K) & (high >= first_K + BLOCK)).any(0)
    some_QK = touched_QK.unflatten(0, (-1, BLOCK)).any(1)
    full_QK = covered_QK.unflatten(0, (-1, BLOCK)).all(1)
    return some_QK & ~full_QK, full_QK


def ordered(dense_QK: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which first) of the blocks of each row."""
    indices_QK = dense_QK.int().argsort(dim=-1, descending=True, stable=True)
    return dense_QK.sum(-1, dtype=torch.int32)[None, None], indices_QK.int().contiguous()[None, None]


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    name: str
    computes_chosen_queries: bool
    """Whether an unrolled drafter passes the columns that carry loss alone after step 0; else all columns, always."""
    smallest_head: int = 1
    kernel: Kernel | None = None
    """Of flex attention: compiled, or any function of the same result."""


DENSE = Route("dense", False)
"""Reference: every score is written down."""
SDPA = Route("sdpa", False)
"""The same mask through `scaled_dot_product_attention`: any device, memory of the mask only."""
FLASH = Route("flash", True)
"""Rectangles through the flash kernels of the CPU."""
FLEX = Route("flex", True, smallest_head=16, kernel=compiled())
"""Block-sparse flex attention. Its products take heads of 16 numbers or more."""

OTHER = "other"
ROUTES = {
    "eager": {"cpu": DENSE, "cuda": DENSE, OTHER: DENSE},
    "sdpa": {"cpu": FLASH, "cuda": SDPA, OTHER: SDPA},
    "simple_flex_attention": {"cpu": FLASH, "cuda": FLEX, OTHER: SDPA},
}
FASTEST = "simple_flex_attention"


def choose_route(implementation: str | None, device_kind: str, head_size: int) -> Route:
    """`implementation`: the contract's `draft_attn_impl`; None = the fastest. Raises ValueError for a pair that cannot
    run."""
    name = implementation or FASTEST
    if name not in ROUTES:
        raise ValueError(
            f"draft_attn_impl={name!r} is no attention that drafters train with; set --draft-attn-impl to one of "
            f"{sorted(ROUTES)}"
        )
    route = ROUTES[name].get(device_kind, ROUTES[name][OTHER])
    if head_size < route.smallest_head:
        raise ValueError(
            f"draft_attn_impl={name!r} on {device_kind} takes heads of {route.smallest_head} numbers or more, the "
            f"drafter's have {head_size}; use --draft-attn-impl sdpa, or a draft config with a larger head_dim"
        )
    return route
