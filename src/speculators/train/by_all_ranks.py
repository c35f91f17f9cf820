"""Verifier states where every rank holds a slice of the verifier: all compute the row of each, and keep their own.

                  first forward        second forward
    rank 0        its own row          rank 1's row, forgotten
    rank 1        rank 0's, forgotten  its own row

So as many rows are computed in a step as without, each by all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from speculators.interfaces import HiddenStateSource, VerifierStates
from speculators.train.distributed import Ranks


class ByAllRanks:
    """A `HiddenStateSource`. Every rank calls `read` as often, in the thread that trains: a collective operation that
    only some of them begin, or begin in another order, would wait for ever. Packing gives all ranks as many rows.

    What `source` keeps in memory is the same on all ranks, as all read the same rows: so all compute what it lacks.
    """

    def __init__(self, source: HiddenStateSource, ranks: Ranks):
        self.source, self.ranks, self.capture = source, ranks, source.capture

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """When another rank ended, a collective raises, which `ranks_from_environment` turns into `RankError`."""
        own: list[VerifierStates] = []
        for rank, of_rank in enumerate(self.ranks.gather_objects([ids.cpu() for ids in token_ids])):
            states = self.source.read(of_rank)
            if rank == self.ranks.rank:
                own = states
        return own
