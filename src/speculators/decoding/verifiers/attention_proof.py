"""Proves, when a verifier is made, that rows decoded together say what the model's own forward says of each alone.

Some attentions know place by something else than the position ids they are given: local windows or ALiBi that follow
the columns of the cache, for example. Rows of different lengths or nodes of a tree then have other logits, and nothing
else shows it. So a trial does what decoding does (rows of two lengths and an idle one between them, beyond every
window; drafts that are dropped; a tree whose second branch is kept) and compares with plain forwards without a cache.

It runs on a small random copy of the model with short windows, and then on the model itself with few tokens: seven
forwards. What is wrong in one way is tried in the next: trees path by path, then one row at a time with the model's own
masks. A model in half precision that has a copy is not tried itself: its rounding is as large as what is looked for.

Shapes: B rows, T columns, K nodes, V vocabulary, D width of captured states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from speculators.decoding.trees.token_tree import paths_of
from speculators.decoding.verifiers.hf_verifier import HFVerifier
from speculators.decoding.verifiers.trial import (
    NUM_LATER,
    SHORT,
    TOLERANCE_BY_DTYPE,
    AnotherText,
    Trial,
    small_copy,
    windows_of,
)
from speculators.interfaces import CaptureSpec, Verifier, VerifierOutput
from speculators.utils.progress import no_notices
from speculators.utils.util import NestedContext
from speculators.verifier.config import text_config

LONG_ON_COPY, LONG_ON_MODEL, MOST_LONG = 300, 24, 512
"""Tokens of the longer prompt. On the copy they go beyond windows that the config does not name, too; a model without a
copy gets as many as its windows need, up to the third number."""

Make = Callable[[PreTrainedModel, int, CaptureSpec | None], Verifier]


@dataclass(frozen=True)
class Way:
    """How a model is decoded. `said`: what a user is told of it."""

    make: Make
    said: str = ""
    has_trees: bool = True


def with_plain_masks(model: PreTrainedModel, num_rows: int, capture: CaptureSpec | None) -> Verifier:
    return HFVerifier(model, num_rows, capture, lean=False, masks="plain")


def path_by_path(model: PreTrainedModel, num_rows: int, capture: CaptureSpec | None) -> Verifier:
    return SplitVerifier(HFVerifier(model, num_rows, capture, lean=False, masks="plain"), by_row=False)


def row_by_row(model: PreTrainedModel, num_rows: int, capture: CaptureSpec | None) -> Verifier:
    return SplitVerifier(HFVerifier(model, num_rows, capture, lean=False, masks="own"), by_row=True)


ATTENTION_WAYS = (
    Way(HFVerifier),
    Way(with_plain_masks),
    Way(path_by_path, "decoded with draft trees scored path by path"),
    Way(row_by_row, "decoded one row at a time, draft trees path by path"),
)
"""The fastest first."""


@dataclass(frozen=True)
class Found:
    """The first way that is right so far, by its index, and what was wrong with the one before."""

    way: int
    reason: str = ""


def make_proven_verifier(
    model: PreTrainedModel, num_rows: int, capture: CaptureSpec | None, ways: Sequence[Way] = ATTENTION_WAYS
) -> Verifier:
    """The verifier that decodes the model in the first of the ways that is right; warns where it is a later one.

    Raises ValueError for a model that none of them reproduces."""
    copied = found_on_copy(CopySource.of(model), tuple(ways))
    found = copied or Found(0)
    if copied is None or model.dtype in TOLERANCE_BY_DTYPE:
        found = first_right(model, ways, num_long_tokens(model.config, has_copy=copied is not None), found)
    if found.way == len(ways):
        raise ValueError(
            f"{type(model).__name__} cannot be decoded here: {found.reason}; decode it with transformers' generate"
        )
    if ways[found.way].said:
        warnings.warn(f"{type(model).__name__} is {ways[found.way].said}: {found.reason}", stacklevel=3)
    return ways[found.way].make(model, num_rows, capture)


def first_right(model: PreTrainedModel, ways: Sequence[Way], num_long: int, start: Found) -> Found:
    found = start
    while found.way < len(ways):
        try:
            way = ways[found.way]
            Trial(model, way.make(model, 3, None), has_trees=way.has_trees).run(num_long)
        except AnotherText as difference:
            found = Found(found.way + 1, str(difference))
        except Exception as error:  # whatever a model's forward raises on this cache closes the way
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            found = Found(found.way + 1, f"its forward on this cache raises {what}")
        else:
            break
    return found


# -- what is tried


@dataclass(frozen=True)
class CopySource:
    """What a small copy depends on."""

    model_class: type[PreTrainedModel]
    settings: str
    attention: str | None
    config: PretrainedConfig = field(compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> CopySource:
        config: Any = model.config
        return cls(type(model), config.to_json_string(use_diff=False), config._attn_implementation, config)


@lru_cache(maxsize=64)
@no_notices()
def found_on_copy(source: CopySource, ways: tuple[Way, ...]) -> Found | None:
    """None: no small copy of this model can be made and run."""
    try:
        model = small_copy(source.model_class, source.config)
        with torch.inference_mode():
            model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception:  # sizes that depend on one another in an unknown way: the model itself is tried
        return None
    return first_right(model, ways, num_long_tokens(model.config, has_copy=True, most=LONG_ON_COPY), Found(0))


def num_long_tokens(config: PretrainedConfig, *, has_copy: bool, most: int = LONG_ON_MODEL) -> int:
    """The length of the longer prompt. Warns where a window is not reached."""
    window = 0 if has_copy else max(windows_of(config), default=0)
    if window > MOST_LONG:
        warnings.warn(
            f"{config.model_type}: no small copy of it can be made, so its attention is not proven beyond its window "
            f"of {window} tokens; compare a long answer with transformers' generate",
            stacklevel=4,
        )
        window = 0
    num_positions = getattr(text_config(config), "max_position_embeddings", None) or sum((most, window, NUM_LATER))
    return min(max(most, window + SHORT), num_positions - NUM_LATER)


# -- the other ways


class SplitVerifier(NestedContext):
    """A `Verifier` around another: scores in several forwards what a model does not get right in one.

    `by_row`: every row has a forward of its own. Trees always run path by path:

        parents (-1, -1, 1)      columns 0, 1, 2, 3      paths of columns (0, 1) and (0, 2, 3): chains, scored at the
                                                         same place of the cache; what is kept is scored once more
    """

    def __init__(self, inner: HFVerifier, *, by_row: bool):
        self.inner, self.by_row = inner, by_row
        self.vocab_size, self.device = inner.vocab_size, inner.device
        self._first_row = 0
        self._tree_tokens_BT: Tensor | None = None
        self._last_path: list[int] = []

    @property
    def length_by_row(self) -> list[int]:
        return self.inner.length_by_row

    @property
    def forward_reason(self) -> str:
        return self.inner.forward_reason

    def set_up(self, stack: ExitStack) -> None:
        stack.enter_context(self.inner)

    # -- the methods of `interfaces.Verifier`

    def score(
        self,
        token_ids_BT: Tensor,
        num_valid_B: Tensor,
        parents_K: Tensor | None = None,
        *,
        first_row: int = 0,
        last_only: bool = False,
    ) -> VerifierOutput:
        self._first_row, self._tree_tokens_BT = first_row, None
        if parents_K is None:
            return self._chains(token_ids_BT, num_valid_B, first_row, last_only)
        is_active_B = num_valid_B > 0
        logits_BTV: Tensor | None = None
        states_BTD: Tensor | None = None
        for path in paths_of(parents_K.tolist()):
            output = self._chains(token_ids_BT[:, path], is_active_B * len(path), first_row, False)
            logits_BTV = filled(logits_BTV, output.logits_BTV, path, token_ids_BT.shape[1])
            if output.states_BTD is not None:
                states_BTD = filled(states_BTD, output.states_BTD, path, token_ids_BT.shape[1])
            self._last_path = path
        self._tree_tokens_BT = token_ids_BT
        assert logits_BTV is not None
        return VerifierOutput(logits_BTV, states_BTD)

    def keep(self, columns_BT: Tensor, num_kept_B: Tensor) -> None:
        """Kept paths of a tree that are not the start of the path scored last are scored again."""
        num_kept = num_kept_B.tolist()
        if self._tree_tokens_BT is not None:
            kept = [row[:n] for row, n in zip(columns_BT.tolist(), num_kept, strict=True)]
            if any(columns != self._last_path[: len(columns)] for columns in kept):
                token_ids_BT = self._tree_tokens_BT.gather(1, columns_BT.to(self.device))
                self._chains(token_ids_BT, num_kept_B.to(self.device), self._first_row, True)
        for i, n in enumerate(num_kept):
            self.inner.length_by_row[self._first_row + i] += n

    def truncate(self, row: int, length: int) -> None:
        self.inner.truncate(row, length)

    def share_prefix(self, from_row: int, to_row: int, length: int) -> None:
        self.inner.share_prefix(from_row, to_row, length)

    def clear_unused(self) -> None:
        self.inner.clear_unused()

    # -- forwards

    def _chains(self, token_ids_BT: Tensor, num_valid_B: Tensor, first_row: int, last_only: bool) -> VerifierOutput:
        if not self.by_row:
            return self.inner.score(token_ids_BT, num_valid_B, first_row=first_row, last_only=last_only)
        B, T = token_ids_BT.shape
        logits_BTV = torch.zeros(B, 1 if last_only else T, self.vocab_size, device=self.device)
        states_BTD: Tensor | None = None
        for i, num_valid in enumerate(num_valid_B.tolist()):
            # drafts past the model's last position are never kept, so they need no logits
            n = min(num_valid, self.inner.num_positions_left(first_row + i))
            if n == 0:
                continue
            row_1T = token_ids_BT[i : i + 1, :n]
            output = self.inner.score(row_1T, torch.tensor([n]), first_row=first_row + i, last_only=last_only)
            logits_BTV[i, : output.logits_BTV.shape[1]] = output.logits_BTV[0]
            if output.states_BTD is not None:
                if states_BTD is None:
                    states_BTD = output.states_BTD.new_zeros(B, T, output.states_BTD.shape[-1])
                states_BTD[i, :n] = output.states_BTD[0]
        return VerifierOutput(logits_BTV, states_BTD)


def filled(values_BTX: Tensor | None, path_BPX: Tensor, path: list[int], num_columns: int) -> Tensor:
    """Write the columns of one path into those of the tree."""
    if values_BTX is None:
        values_BTX = path_BPX.new_zeros(len(path_BPX), num_columns, path_BPX.shape[-1])
    values_BTX[:, path] = path_BPX
    return values_BTX
