"""Drafting with a causal LM, greedily or by drawing from its distribution: a smaller model of the same vocabulary, one
of another vocabulary (`TokenIntersection`), or the verifier's own first layers (`first_layers`).

Shapes: B rows, K draft tokens, V vocabulary of the verifier, U vocabulary of the draft, T new tokens.

    sequence   x0 .. x[L-1]  x[L]          committed; the draft's cache holds a prefix of it, and last round's drafts
    fed        the tokens committed since the last call, at their own positions: drafts beyond them are overwritten
    drafted    x[L+1]' from the last fed token, then one token per step
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators.decoding.verifiers.hf_verifier import HFVerifier
from speculators.decoding.verifiers.recurrent_verifier import make_verifier
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal
from speculators.nn import draft_tokens
from speculators.nn.device import read_on_host, to_device
from speculators.nn.graphs import Record
from speculators.verifier import verifier_parts

ALONE_FROM = 32
"""A row with this many new tokens or more (a prompt) is fed alone: padding other rows to it would cost more."""
MAX_FED_TOKENS = 512
"""Tokens of one prompt per forward."""
SPACE_MARKERS = ("Ġ", "▁")
"""How byte-level BPE and SentencePiece write a leading space."""


class DraftModelProposer:
    """Any causal LM with the verifier's vocabulary, or with a `TokenIntersection` (greedy only)."""

    def __init__(self, model: PreTrainedModel, *, max_batch_size: int, intersection: TokenIntersection | None = None):
        self.capture = CaptureSpec()
        self.lm: Any = make_verifier(model, max_batch_size)
        self.intersection = intersection

    def use_graphs(self, record: Record | None) -> None:
        """See `nn.graphs.HasFixedShapes`. A round is one recorded forward per token."""
        if isinstance(self.lm, HFVerifier):
            self.lm.use_graphs(record)

    def __enter__(self) -> DraftModelProposer:
        self.lm.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.lm.__exit__(*exc)

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        with self:
            logits_BV, is_active_B = self.feed(committed)
            tokens, probs, confidence = [], [], []
            lengths = list(self.lm.length_by_row)
            for step in range(num_tokens):
                token_B, probs_BV = self._draw(logits_BV, sampling)
                if sampling.wants_confidence:
                    confidence.append(logits_BV.float().softmax(-1).amax(-1))
                own_id_B = token_B if self.intersection is None else self.intersection.to_draft(token_B)
                draft_tokens.add_own_probs(sampling, logits_BV, own_id_B)
                tokens.append(token_B)
                probs.append(probs_BV)
                if step < num_tokens - 1:
                    logits_BV = self._step(token_B)
            self.lm.length_by_row[:] = lengths  # drafts are not committed: the next call overwrites them
        token_ids_BK = torch.stack(tokens, 1).masked_fill(~is_active_B[:, None], -1)
        return Proposal(
            token_ids_BK,
            torch.stack(probs, 1) if sampling.probabilistic else None,  # type: ignore[arg-type]
            confidence_BK=torch.stack(confidence, 1) if confidence else None,
        )

    def feed(self, committed: Committed) -> tuple[Tensor, Tensor]:
        """Bring every row's cache up to its committed tokens. Returns logits after the last one, [B, V], and the active
        rows, bool [B]."""
        known = read_on_host(committed)
        num_new, num_committed = known.num_new, known.num_committed
        token_ids_BT = committed.token_ids_BT
        if self.intersection is not None:
            token_ids_BT = self.intersection.to_draft(token_ids_BT)
        B = len(num_new)
        for row in range(B):
            self.lm.truncate(row, num_committed[row] - num_new[row] if num_new[row] else 0)
        alone = [row for row in range(B) if num_new[row] >= ALONE_FROM]
        together = [0 if row in alone else new for row, new in enumerate(num_new)]
        logits_BV = torch.zeros(B, self.lm.vocab_size, device=token_ids_BT.device)
        if any(together):
            width, num_valid_B = max(together), torch.tensor(together)
            logits_BV = self._last_logits(token_ids_BT, width, num_valid_B).float()
            self.lm.keep(torch.arange(width).expand(B, width), num_valid_B)
        for row in alone:
            logits_BV[row] = self._feed_alone(row, token_ids_BT[row : row + 1, : num_new[row]])
        return logits_BV, committed.num_new_B > 0

    def _last_logits(self, token_ids_BT: Tensor, width: int, num_valid_B: Tensor) -> Tensor:
        """Logits [B, V] after each row's last valid token. At a fixed shape, logits of all columns are computed."""
        if not (isinstance(self.lm, HFVerifier) and self.lm.has_fixed_shapes):
            return self.lm.score(token_ids_BT[:, :width], num_valid_B, last_only=True).logits_BTV[:, 0]
        logits_BTV = self.lm.score(token_ids_BT[:, :width], num_valid_B).logits_BTV
        last_B = to_device((num_valid_B - 1).clamp_min(0), logits_BTV.device)
        return logits_BTV[torch.arange(len(last_B), device=last_B.device), last_B]

    def _feed_alone(self, row: int, token_ids_1T: Tensor) -> Tensor:
        for chunk_1T in token_ids_1T.split(MAX_FED_TOKENS, dim=1):
            num_valid_1 = torch.tensor([chunk_1T.shape[1]])
            output = self.lm.score(chunk_1T, num_valid_1, first_row=row, last_only=True)
            self.lm.keep(torch.arange(chunk_1T.shape[1])[None], num_valid_1)
        return output.logits_BTV[0, 0].float()

    def _step(self, token_B: Tensor) -> Tensor:
        if self.intersection is not None:
            token_B = self.intersection.to_draft(token_B)
        num_valid_B = torch.ones(len(token_B), dtype=torch.int64)
        logits_BTV = self.lm.score(token_B[:, None], num_valid_B).logits_BTV
        self.lm.keep(torch.zeros(len(token_B), 1, dtype=torch.int64), num_valid_B)
        return logits_BTV[:, 0]

    def _draw(self, logits_BV: Tensor, sampling: DraftSampling) -> tuple[Tensor, Tensor | None]:
        if self.intersection is not None:
            return self.intersection.best(logits_BV), None
        if not sampling.probabilistic:
            return logits_BV.argmax(-1), None
        probs_BV = draft_probs(logits_BV, sampling.temperature_B)
        return draw(probs_BV, sampling.generator), probs_BV


def draft_probs(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """q of each row, [B, V]: softmax(logits / temperature); a greedy row is a point mass on its argmax."""
    is_greedy_B1 = (temperature_B == 0)[:, None]
    probs_BV = (logits_BV.float() / temperature_B[:, None].masked_fill(is_greedy_B1, 1.0)).softmax(-1)
    one_hot_BV = torch.zeros_like(probs_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    return torch.where(is_greedy_B1, one_hot_BV, probs_BV)


def draw(probs_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    """int64 [B]: one token per row; any token where the probabilities are NaN (the engine leaves that draft out)."""
    return draft_tokens.draw(torch.where(probs_BV.amax(-1, keepdim=True).isfinite(), probs_BV, 1.0), generator)


class TokenIntersection:
    """The tokens that two vocabularies spell the same way, with their ids in both.

    Other draft tokens are never drafted; other committed tokens are fed to the draft as its unknown token."""

    def __init__(
        self,
        verifier_tokenizer: PreTrainedTokenizerBase,
        draft_tokenizer: PreTrainedTokenizerBase,
        *,
        num_verifier: int,
        num_draft: int,
    ):
        verifier_ids = {normalised(token): i for token, i in verifier_tokenizer.get_vocab().items() if i < num_verifier}
        draft_ids = {normalised(token): i for token, i in draft_tokenizer.get_vocab().items() if i < num_draft}
        shared = sorted(verifier_ids.keys() & draft_ids.keys())
        if not shared:
            raise ValueError("verifier and draft tokenizers have no token in common; choose another draft model")
        unknown = (
            draft_tokenizer.unk_token_id if draft_tokenizer.unk_token_id is not None else draft_tokenizer.eos_token_id
        )
        self.draft_id_V = torch.full((num_verifier,), unknown or 0, dtype=torch.int64)
        self.verifier_id_U = torch.full((num_draft,), -1, dtype=torch.int64)
        for token in shared:
            self.draft_id_V[verifier_ids[token]] = draft_ids[token]
            self.verifier_id_U[draft_ids[token]] = verifier_ids[token]

    def to_draft(self, token_ids: Tensor) -> Tensor:
        if self.draft_id_V.device != token_ids.device:
            self.draft_id_V = to_device(self.draft_id_V, token_ids.device)
        return self.draft_id_V[token_ids]

    def best(self, logits_BU: Tensor) -> Tensor:
        """The likeliest shared token of each row, as a verifier id."""
        if self.verifier_id_U.device != logits_BU.device:
            self.verifier_id_U = to_device(self.verifier_id_U, logits_BU.device)
        return self.verifier_id_U[logits_BU.masked_fill(self.verifier_id_U < 0, -torch.inf).argmax(-1)]


def normalised(token: str) -> str:
    for marker in SPACE_MARKERS:
        token = token.replace(marker, " ")
    return token


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A causal LM of the first layers of `model` with its norm and head: a drafter without training.

    It shares every module and weight; nothing is copied. Raises ValueError for a number that is not below the total."""
    parts = verifier_parts(model)
    total = len(parts.layers)
    if not 1 <= num_layers < total:
        raise ValueError(f"early_exit_layer={num_layers} must be in 1..{total - 1}: the verifier has {total} layers")
    config = copy.deepcopy(parts.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    return _with_replaced(model, parts.layers, nn.ModuleList(list(parts.layers)[:num_layers]), parts.config, config)


def _with_replaced(module: Any, layers: nn.Module, kept: nn.Module, config: Any, shorter: Any) -> Any:
    """A shallow copy of the modules that contain `layers`; all other modules are shared."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    if getattr(module, "config", None) is config:
        twin.config = shorter
    for name, child in module.named_children():
        if child is layers:
            twin._modules[name] = kept
        elif any(inner is layers for inner in child.modules()):
            twin._modules[name] = _with_replaced(child, layers, kept, config, shorter)
    return twin
