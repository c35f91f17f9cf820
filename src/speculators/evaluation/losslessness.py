"""Is the output still the verifier's? Greedy: token for token. Sampled: a two-sample test on answers drawn both ways.

Shapes: S answers drawn of one prompt (half plain, half speculative), T tokens of an answer, P permutations.
Greedy equality is a claim about fp32: in bf16 two tokens may tie, and scoring K + 1 positions at once rounds
differently from scoring one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speculators.evaluation.records import MethodRow


def count_identical(plain: Sequence[Sequence[int]], speculative: Sequence[Sequence[int]]) -> int:
    return sum(first_difference(a, b) is None for a, b in zip(plain, speculative, strict=True))


def first_difference(plain: Sequence[int], speculative: Sequence[int]) -> int | None:
    """Position of the first token that differs (a missing token differs); None when the sequences are equal."""
    for position, (a, b) in enumerate(zip(plain, speculative, strict=False)):
        if a != b:
            return position
    return None if len(plain) == len(speculative) else min(len(plain), len(speculative))


def two_sample_p_value(
    plain: Sequence[Sequence[Sequence[int]]],
    speculative: Sequence[Sequence[Sequence[int]]],
    *,
    num_permutations: int = 2000,
    seed: int = 0,
) -> float:
    """Chance of a difference this large if both were drawn from one law. [prompt][answer] -> token ids.

    A permutation test, exact for any vocabulary and any number of answers: within each prompt the labels plain and
    speculative are shuffled. The statistic is the squared mean difference under the kernel of `likeness`.
    """
    rng = np.random.default_rng(seed)
    observed, shuffled_P = 0.0, np.zeros(num_permutations)
    for ours, theirs in zip(plain, speculative, strict=True):
        likeness_SS = likeness([*ours, *theirs])
        sign_S = np.concatenate([np.full(len(ours), 1 / len(ours)), np.full(len(theirs), -1 / len(theirs))])
        signs_PS = rng.permuted(np.tile(sign_S, (num_permutations, 1)), axis=1)
        observed += sign_S @ likeness_SS @ sign_S
        shuffled_P += np.einsum("ps,st,pt->p", signs_PS, likeness_SS, signs_PS, optimize=True)
    return float((1 + (shuffled_P >= observed * (1 - 1e-9)).sum()) / (1 + num_permutations))


def likeness(answers: Sequence[Sequence[int]]) -> np.ndarray:
    """[S, S]: positions at which two answers agree, plus the length of what they begin with alike.

    The first part sees wrong frequencies of single tokens, the second wrong frequencies of sequences.
    """
    length = max(map(len, answers), default=0)
    ids_ST = np.array([[*answer, *[-1] * (length - len(answer))] for answer in answers])
    agree_SST = ids_ST[:, None] == ids_ST[None]
    return (agree_SST.sum(-1) + np.cumprod(agree_SST, axis=-1).sum(-1)).astype(np.float64)


class NotLosslessError(RuntimeError):
    """Greedy answers differ from plain decoding's, or sampled ones follow another law."""

    def __init__(self, rows: Sequence[MethodRow], dtype: str) -> None:
        found = "; ".join(f"{row.method}: {evidence(row)}" for row in rows if row.lossless is False)
        reason = "" if dtype == "float32" else f" ({dtype} has ties that rounding decides; --dtype float32 has none)"
        super().__init__(f"not lossless: {found}{reason}")


def evidence(row: MethodRow) -> str:
    if row.num_identical is not None:
        return f"{row.num_identical} of {row.num_prompts} answers are identical"
    return f"answers drawn both ways differ (p = {row.sampling_p_value:.4f})"
