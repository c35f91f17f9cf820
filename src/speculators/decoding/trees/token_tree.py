"""The shape of draft trees. `TokenTree` is a static one (Medusa, EAGLE-1); the functions below take any parents vector.

Shapes: K nodes (the root, the last committed token, is not one of them); K1 = K + 1 with the root first; L leaves.
A node is a slot of a `Proposal`. parents_K[j] is a slot or -1 for the root, and parents come before their children.

    paths     (0,)  (1,)  (0, 0)  (0, 1)       ranks among the drafter's best tokens, root to node
    slot        0     1      2       3
    parent     -1    -1      0       0
"""

from __future__ import annotations

import ast
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Path = tuple[int, ...]
LONGEST_WRITTEN_CHAIN = 64


@dataclass(frozen=True)
class TokenTree:
    """A static tree: paths of child ranks, breadth first (sorted by length, then lexicographically)."""

    paths: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Iterable[Iterable[int]]) -> TokenTree:
        """A tree of the given paths, sorted. Raises ValueError unless ranks are >= 0 and every prefix is present."""
        present = {tuple(path) for path in paths}
        if not present:
            raise ValueError("speculative_token_tree is empty; leave it out to draft a chain")
        for path in present:
            if not path or not all(isinstance(rank, int) and rank >= 0 for rank in path):
                raise ValueError(f"speculative_token_tree path {path} must be a non-empty tuple of child ranks >= 0")
        found = sorted(present, key=lambda path: (len(path), path))
        for path in found:
            if len(path) > 1 and path[:-1] not in present:
                raise ValueError(f"speculative_token_tree has {path} but not its parent {path[:-1]}; add the parent")
        return cls(tuple(found))

    @classmethod
    def parse(cls, text: str) -> TokenTree:
        """A tree from a Python literal, a list of tuples of ints. Raises ValueError for anything else."""
        try:
            paths = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"speculative_token_tree={text[:99]!r} must be a Python literal list of tuples") from error
        if not isinstance(paths, list | tuple) or not all(isinstance(path, list | tuple) for path in paths):
            raise ValueError(f"speculative_token_tree={text!r} must be a list of tuples, such as [(0,), (0, 0)]")
        return cls.of(paths)

    @classmethod
    def chain(cls, num_tokens: int) -> TokenTree:
        return cls(tuple((0,) * length for length in range(1, num_tokens + 1)))

    @classmethod
    def written_chain(cls, num_tokens: int) -> str | None:
        """A chain as text. None, which also means a chain, for a long one: its paths grow with the square of it."""
        return str(cls.chain(num_tokens)) if num_tokens <= LONGEST_WRITTEN_CHAIN else None

    @classmethod
    def best(cls, accuracy: Sequence[Sequence[float]], num_nodes: int) -> TokenTree:
        """The tree with the most expected tokens. A node's value is the product of accuracy[depth][rank] on its path.

        Greedy growth is optimal: the value of a node never exceeds its parent's.
        """
        chosen: list[Path] = []
        open_nodes: list[tuple[float, Path]] = [(-value, (rank,)) for rank, value in enumerate(accuracy[0])]
        heapq.heapify(open_nodes)
        while open_nodes and len(chosen) < num_nodes:
            negative_value, path = heapq.heappop(open_nodes)
            chosen.append(path)
            for rank, value in enumerate(accuracy[len(path)] if len(path) < len(accuracy) else ()):
                heapq.heappush(open_nodes, (negative_value * value, (*path, rank)))
        return cls.of(chosen)

    def __str__(self) -> str:
        return str(list(self.paths))

    @cached_property
    def parents(self) -> tuple[int, ...]:
        slot_of = {path: slot for slot, path in enumerate(self.paths)}
        return tuple(slot_of[path[:-1]] if len(path) > 1 else -1 for path in self.paths)

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    @property
    def is_chain(self) -> bool:
        return self.paths == TokenTree.chain(len(self.paths)).paths

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each slot's token among the best tokens after its parent."""
        return tuple(path[-1] for path in self.paths)


def depths(parents: Sequence[int]) -> list[int]:
    """Distance of each node from the root, which is added to the last committed position.

    Raises ValueError for a parent that does not come before its child."""
    found: list[int] = []
    for slot, parent in enumerate(parents):
        if not -1 <= parent < slot:
            raise ValueError(f"parents[{slot}]={parent}; parents come first, so -1..{slot - 1} are valid")
        found.append(found[parent] + 1 if parent >= 0 else 1)
    return found


def ancestor_mask(parents: Sequence[int]) -> Tensor:
    """bool [K1, K1]: [i, j] = node i attends to node j: the root, its ancestors and itself (and the whole prefix)."""
    mask = torch.eye(len(parents) + 1, dtype=torch.bool)
    for slot, parent in enumerate(parents):
        mask[slot + 1] |= mask[parent + 1]
    return mask


def expected_tokens(parents: Sequence[int], conditional: Sequence[float]) -> float:
    """Expected tokens per round: 1 + sum over nodes of the probability that the whole path is accepted.

    `conditional[j]` = P(slot j accepted | its parent accepted); at most one of several siblings is accepted.
    """
    reach: list[float] = []
    for parent, chance in zip(parents, conditional, strict=True):
        reach.append(chance * (reach[parent] if parent >= 0 else 1.0))
    return 1.0 + sum(reach)


def _children(prefix: Path, num_ranks: int) -> list[Path]:
    return [(*prefix, rank) for rank in range(num_ranks)]


EAGLE_25 = TokenTree.of(
    [
        *[*_children((), 4), *_children((0,), 3), *_children((1,), 2), *_children((2,), 2), (3, 0)],
        *[*_children((0, 0), 3), *_children((0, 1), 2), *_children((0, 2), 2), *_children((1, 0), 1)],
        *[*_children((0, 0, 0), 3), *_children((0, 0, 0, 0), 2)],
    ]
)
"""EAGLE-1's tree."""

MEDUSA_63 = TokenTree.of(
    [*_children((), 10), *_children((0,), 10), *_children((1,), 7), *_children((2,), 3), *_children((3,), 2)]
    + [(rank, 0) for rank in range(4, 10)]
    + [*_children((0, 0), 10), *_children((0, 1), 3), *_children((0, 2), 2), *_children((1, 0), 2), (2, 0, 0)]
    + [(0, rank, 0) for rank in range(3, 8)]
    + [*_children((0, 0, 0), 2)]
)
"""Medusa's mc_sim_7b_63."""


def paths_of(parents: list[int]) -> list[list[int]]:
    """The columns from the root to each leaf. Column 0 is the last committed token, node k is column k + 1."""
    parent_by_column = [-1, *(parent + 1 for parent in parents)]
    leaves = set(range(len(parent_by_column))) - set(parent_by_column)
    return [path_to(leaf, parent_by_column) for leaf in sorted(leaves)]


def path_to(column: int, parent_by_column: list[int]) -> list[int]:
    """The columns from the root, whose parent is -1, to this one."""
    path: list[int] = []
    while column >= 0:
        path.insert(0, column)
        column = parent_by_column[column]
    return path
