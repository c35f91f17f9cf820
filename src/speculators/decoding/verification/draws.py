"""The randomness of verification: two streams of uniforms, one pair per slot.

Shapes: B sequences, N slots or columns, V verifier vocabulary; K1 = K + 1 columns for K draft slots.

A rule never draws: it asks its `Draws` for decisions of given probabilities. That keeps a rule pure, and a test can
make every combination of decisions in turn and add up the exact law (tests/verification).

    stream   column j is used to                        key under a request's seed
    accept   test the draft in slot j                   (seed, first position of the round, j)
    pick     draw the token emitted at column j         (seed, absolute position of the token)

Pick columns beyond the emitted token are never read, so the next round may use those positions again. Accept columns
are read beyond the cut by block verification (all slots are tested), hence the round in their key: using them again
would condition the next round on this one. Drafts need a third stream (`DRAFT_STREAM`), keyed like accept.
Sample-and-match (strict, and every point-mass draft) needs the pick stream alone: with keyed draws its output is the
same for any K, for any drafter, and without a drafter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.interfaces import Draws

ACCEPT_STREAM, PICK_STREAM, DRAFT_STREAM = 1, 2, 3


@dataclass(frozen=True)
class UniformDraws:
    """Decisions made from float64 uniforms in [0, 1)."""

    accept_BN: Tensor
    pick_BN: Tensor

    def accept(self, probs_BN: Tensor, first_slot: int = 0) -> Tensor:
        # u < 0 never holds and u < 1 always does: certain decisions are certain.
        return self.accept_BN[:, first_slot : first_slot + probs_BN.shape[1]] < probs_BN

    def pick(self, probs_BNV: Tensor, columns_BN: Tensor) -> Tensor:
        return inverse_cdf(probs_BNV, self.pick_BN.gather(1, columns_BN))


def uniform_draws(num_rows: int, num_columns: int, generator: torch.Generator | None, device: torch.device) -> Draws:
    """Fresh uniforms from one generator for the whole batch (drawn on the generator's device, then moved)."""
    made_on = generator.device if generator is not None else device
    uniform_2BN = torch.rand((2, num_rows, num_columns), dtype=torch.float64, generator=generator, device=made_on)
    accept_BN, pick_BN = uniform_2BN.to(device, non_blocking=True)
    return UniformDraws(accept_BN, pick_BN)


def keyed_draws(seed_B: Tensor, first_position_B: Tensor, num_columns: int) -> Draws:
    """Uniforms that depend only on each row's seed and the absolute position of its first new token."""
    column_N = torch.arange(num_columns, device=seed_B.device)
    start_B1 = first_position_B[:, None]
    accept_BN = keyed_uniform(seed_B[:, None], ACCEPT_STREAM, start_B1, column_N)
    pick_BN = keyed_uniform(seed_B[:, None], PICK_STREAM, start_B1 + column_N)
    return UniformDraws(accept_BN, pick_BN)


def seed_drafts(generator: torch.Generator, seed_B: Tensor, position_B: Tensor) -> None:
    """Seed the generator of drafts by seeds and positions alone, from a stream that verification does not use. Both are
    on the host."""
    uniform_B = keyed_uniform(seed_B, DRAFT_STREAM, position_B)
    generator.manual_seed(hash(tuple(uniform_B.tolist())) & (2**63 - 1))


def keyed_uniform(seed: Tensor, *key: Tensor | int) -> Tensor:
    """float64 uniforms in [0, 1) from int64 seeds and keys, broadcast together: a hash, no state."""
    state = _mix(seed)
    for part in key:
        # a number stays on the host, where it mixes with tensors of any device
        state = _mix(state ^ _mix(torch.as_tensor(part, dtype=torch.int64) + _GOLDEN))
    return ((state >> 11) & _MASK_53).to(torch.float64) * 2.0**-53


def as_draws(source: torch.Generator | Draws | None, target_probs_BK1V: Tensor) -> Draws:
    """The draws of a rule's `generator` argument: a generator (None: torch's global one) gives fresh uniforms."""
    if source is None or isinstance(source, torch.Generator):
        num_rows, num_columns, _ = target_probs_BK1V.shape
        return uniform_draws(num_rows, num_columns, source, target_probs_BK1V.device)
    return source


def inverse_cdf(probs_BNV: Tensor, uniform_BN: Tensor) -> Tensor:
    """int64 [B, N]: the token whose slice of the cumulative distribution holds the uniform; never of probability 0."""
    # float64: in fp32 the sum of 150k terms would blur tokens below 1e-7 into their neighbours.
    cdf_BNV = probs_BNV.cumsum(-1, dtype=torch.float64)
    total_BN1 = cdf_BNV[..., -1:].contiguous()
    token_BN1 = torch.searchsorted(cdf_BNV, uniform_BN[..., None] * total_BN1, right=True)
    last_possible_BN1 = torch.searchsorted(cdf_BNV, total_BN1)  # u * total may round up to total
    return torch.minimum(token_BN1, last_possible_BN1)[..., 0].clamp_(max=probs_BNV.shape[-1] - 1)  # V: a total of NaN


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MASK_53 = (1 << 53) - 1


def _mix(state: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) on wrapping int64."""
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)  # logical: >> on int64 repeats the sign
