"""Draft tokens: their ids in the verifier's vocabulary, and drawing them from a drafter's logits.

Shapes: V verifier vocabulary, D draft vocabulary (draft ids ascend with verifier ids); [..., D] logits, [...]
temperatures; B rows, K draft tokens.

No other module interprets `d2t`, which holds offsets:

    verifier_id = draft_id + d2t[draft_id]          d2t int64 [D], as vLLM reads it (llama_eagle3.py, compute_logits)
    t2d bool [V]: verifier ids that are in the draft vocabulary
Full vocabulary: both are None and ids are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from speculators.interfaces import DraftSampling
from speculators.nn.device import to_device
from speculators.utils.loading import spaced

NO_DRAFT = -1
"""In place of a token id: this slot has no draft."""
MIN_TEMPERATURE = 1e-5
MIN_NOISE = 1e-30
ALIKE, NOT_ALIKE = 0.8, 0.2
"""Cosine from which on two rows of a head, trained on or not, are of one token, and how far below it others are."""


def draft_to_verifier_ids(draft_ids: Tensor, d2t: Tensor | None) -> Tensor:
    return draft_ids if d2t is None else draft_ids + d2t[draft_ids]


def verifier_ids(d2t: Tensor) -> Tensor:
    """Verifier id of every draft id: [D]."""
    return d2t + torch.arange(d2t.shape[0], device=d2t.device)


def select_rows(weight_VH: Tensor, t2d: Tensor | None) -> Tensor:
    """Selects the rows of a verifier head that the draft head keeps, in draft order."""
    return weight_VH if t2d is None else weight_VH[t2d.to(weight_VH.device)]


def logits_over_verifier(logits_D: Tensor, t2d: Tensor | None) -> Tensor:
    """Spreads [..., D] over [..., V] by the mask that selects training targets; -inf outside the draft vocabulary."""
    if t2d is None:
        return logits_D
    out = logits_D.new_full((*logits_D.shape[:-1], t2d.shape[0]), float("-inf"))
    out[..., t2d] = logits_D
    return out


def offsets_of(kept_ids_D: Tensor) -> Tensor:
    """Computes `d2t` from an ascending list of verifier ids."""
    return kept_ids_D - torch.arange(kept_ids_D.shape[0], device=kept_ids_D.device)


def scatter_to_verifier(probs_D: Tensor, d2t: Tensor | None, vocab_size: int, fill: float = 0.0) -> Tensor:
    """Spreads [..., D] over the verifier vocabulary [..., V]; ids outside the draft vocabulary get `fill`.

    0 for probabilities (rejection sampling stays exact: such tokens come from the residual), -inf for logits.
    """
    if d2t is None:
        return probs_D
    out = probs_D.new_full((*probs_D.shape[:-1], vocab_size), fill)
    return out.index_copy_(-1, verifier_ids(d2t), probs_D)


def draft_probs(logits: Tensor, temperature: Tensor) -> Tensor:
    """Returns q per row; at temperature 0 it is a point mass on the argmax."""
    probs = (logits.float() / temperature.clamp_min(MIN_TEMPERATURE)[..., None]).softmax(-1)
    point = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where((temperature <= 0)[..., None], point, probs)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws one token per row by the exponential race: no transfer to the host, and probability 0 cannot win."""
    return winners(probs, draw_noise(probs.shape, probs, generator))


def draw_noise(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """What `draw` draws for probabilities of this shape."""
    noise = torch.empty(shape, dtype=like.dtype, device=like.device)
    return noise.exponential_(generator=generator).clamp_min_(MIN_NOISE)


def winners(probs: Tensor, noise: Tensor) -> Tensor:
    return (probs / noise).argmax(-1)


def add_own_probs(sampling: DraftSampling, logits: Tensor, draft_ids: Tensor) -> None:
    """Adds the drafter's probability of its drafts, where it is asked for; [..., D] logits, [...] draft ids."""
    if sampling.own_probs is not None:
        sampling.own_probs.append(logits.float().softmax(-1).gather(-1, draft_ids[..., None])[..., 0])


def own_probs_of(sampling: DraftSampling) -> Tensor | None:
    """What was added, [B, K]; None: nothing."""
    if not sampling.own_probs:
        return None
    return torch.cat([probs.view(len(probs), -1) for probs in sampling.own_probs], 1)


def draw_as(probs: Tensor, sampling: DraftSampling) -> Tensor:
    """Draws with the randomness of `sampling`."""
    if isinstance(sampling, RecordedSampling):
        return winners(probs, next(sampling.noise))
    return draw(probs, sampling.generator)


def draft_from(logits: Tensor, sampling: DraftSampling) -> tuple[Tensor, Tensor | None]:
    """Drafts one token from each of [B, D] or [B, K, D] logits. Returns draft ids and, if they were drawn, the
    distributions q that they were drawn from; adds the drafter's own probabilities where they are asked for."""
    probs = None
    if sampling.probabilistic:
        probs = draft_probs(logits, sampling.temperature_B.view(-1, *[1] * (logits.dim() - 2)))
    draft_ids = logits.argmax(-1) if probs is None else draw_as(probs, sampling)
    add_own_probs(sampling, logits, draft_ids)
    return draft_ids, probs


# -- drafting at fixed shapes (`nn.graphs`): a recorded computation draws nothing itself


@dataclass(frozen=True)
class RecordedSampling(DraftSampling):
    """A sampling whose randomness was drawn before."""

    noise: Iterator[Tensor] = field(kw_only=True)
    """Of one draw after the other."""


def sampling_inputs(sampling: DraftSampling, shapes: Sequence[Sequence[int]], num_rows: int) -> tuple[Tensor, ...]:
    """Temperatures of `num_rows` rows, and the noise of the draws (of the given shapes) that follow: what a recorded
    computation reads of a `DraftSampling`. The draws are those of the same rows without fixed shapes."""
    temperature_B = sampling.temperature_B
    num_more = num_rows - len(temperature_B)
    noise = [draw_noise(shape, temperature_B, sampling.generator) for shape in shapes] if sampling.probabilistic else []
    padded = [pad(part, (0, 0) * (part.dim() - 1) + (0, num_more), value=1.0) for part in noise]
    return pad(temperature_B, (0, num_more)), *padded


def recorded_sampling(sampling: DraftSampling, temperature_R: Tensor, *noise: Tensor) -> DraftSampling:
    """The same sampling with the numbers of `sampling_inputs`."""
    own_probs: list[Tensor] | None = None if sampling.own_probs is None else []
    return RecordedSampling(
        temperature_R, None, sampling.probabilistic, sampling.wants_confidence, own_probs, noise=iter(noise)
    )


def without_idle(draft_ids_BK: Tensor, drafts_B: list[bool]) -> Tensor:
    """No drafts in the rows that do not draft."""
    if all(drafts_B):
        return draft_ids_BK
    idle_B1 = ~to_device(drafts_B, draft_ids_BK.device, torch.bool)[:, None]
    return draft_ids_BK.masked_fill(idle_B1, NO_DRAFT)


def draft_slots(
    logits_BKV: Tensor, sampling: DraftSampling, d2t: Tensor | None, verifier_vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """Drafts slots that do not see each other's tokens. Returns verifier ids [B, K] and, if they were drawn, q over the
    verifier's vocabulary: q of a slot does not depend on the other drafts, so their product is a proposal."""
    draft_ids_BK, probs_BKV = draft_from(logits_BKV, sampling)
    if probs_BKV is not None:
        probs_BKV = scatter_to_verifier(probs_BKV, d2t, verifier_vocab_size)
    return draft_to_verifier_ids(draft_ids_BK, d2t), probs_BKV


def stand_for_others(head_DH: Tensor, theirs_VH: Tensor, mapped_DH: Tensor) -> bool:
    """Says whether most rows of a head are like the verifier's rows of other tokens than those of the map."""
    rows = spaced(len(head_DH))
    own_RH, mapped_RH = (normalize(head[rows].float(), dim=-1) for head in (head_DH, mapped_DH))
    likest_R = (own_RH @ normalize(theirs_VH, dim=-1).T).amax(-1)
    is_other_R = (likest_R > ALIKE) & ((own_RH * mapped_RH).sum(-1) < likest_R - NOT_ALIKE)
    return bool(is_other_R.float().mean() > 0.5)
