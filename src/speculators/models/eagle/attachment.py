"""An EAGLE drafter attached to its verifier: what it borrows of it, and what it then can do as a model of transformers,
`generate` and `forward` over whole sequences.

    detached      nothing is attached
    train_only    embedding, head and final norm (read from the verifier's files), rope
    full          the same modules of a loaded verifier, and the verifier itself: needed to generate

None of these belong to the drafter: modules of a loaded verifier are not registered (so not cast, moved or trained),
and `state_dict` leaves all of them out.

`generate` imports the engine by name. Algorithms may not import decoding (it is above them: it finds algorithms through
the registry), and the registries use a name in the other direction too (`SpeculatorModel.auto_package`). A subclass may
name another module with an `Engine` and `SamplingParams`.

`run_sequences` computes logits under padding masks and with a cache of transformers.

Shapes: B rows, T columns, P prompt columns (in `run_sequences`: columns in the cache), L = P + T keys, N query heads,
G key/value heads, d head size.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.models.eagle.network import EagleNetwork
from speculators.nn.attention import dense_attention
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope
from speculators.verifier.capture import fitting_embedding, verifier_parts
from speculators.verifier.config import LogitTransform, logit_transform
from speculators.verifier.loading import load_verifier, read_verifier_weights

DETACHED, TRAIN_ONLY, FULL = "detached", "train_only", "full"
BORROWED = ("embed_tokens", "rotary_emb", "lm_head", "verifier_norm")
DEFAULT_NEW_TOKENS = 20
"""The default of transformers."""
SAMPLED = ("temperature", "top_k", "top_p", "min_p")
ALWAYS = ("repetition_penalty", "seed")

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class VerifierAttachment(_Base):
    """A mixin for the drafter's class; list it before the model base."""

    config: Any
    verifier_attachment_mode: str = DETACHED

    def detach_all(self) -> None:
        for name in (*BORROWED, "verifier"):
            self.set_unregistered(name, None)
        self.target_transform = LogitTransform()
        self.verifier_attachment_mode = DETACHED
        self.is_attached_for_loading = False

    def set_unregistered(self, name: str, value: Any) -> None:
        """Sets an attribute without registering it as a module of the drafter."""
        self._modules.pop(name, None)
        self.__dict__[name] = value

    def attach_verifier(self, verifier: Any, mode: str | None = None) -> PreTrainedModel:
        """Attaches a verifier (a model, its path or id), all of it or the part that training needs; returns it."""
        mode = mode or FULL
        if self.verifier_attachment_mode != DETACHED and not self.is_attached_for_loading:
            raise RuntimeError("a verifier is attached already; call detach_verifier() first")
        if mode not in (FULL, TRAIN_ONLY):
            raise ValueError(f"verifier_attachment_mode={mode!r} is neither 'full' nor 'train_only'")
        if not verifier and not isinstance(verifier, nn.Module):
            raise ValueError(f"verifier={verifier!r}: give a model, or the path or id of one")
        if isinstance(verifier, (str, os.PathLike)):
            verifier = load_verifier(os.fspath(verifier))
        if not isinstance(verifier, PreTrainedModel):
            raise TypeError(
                f"verifier is a {type(verifier).__name__}; give a PreTrainedModel, or the path or id of one"
            )
        parts = verifier_parts(verifier)
        self.detach_all()
        nested = self.config.transformer_layer_config
        fitting_embedding(verifier, nested.vocab_size, nested.hidden_size)
        decoder = getattr(verifier, "model", verifier)
        self.set_unregistered("embed_tokens", verifier.get_input_embeddings())
        self.set_unregistered("lm_head", parts.head)
        self.set_unregistered("verifier_norm", parts.final_norm)
        self.set_unregistered("rotary_emb", getattr(decoder, "rotary_emb", None) or Rope(nested))
        if mode == FULL:
            self.set_unregistered("verifier", verifier)
        self.target_transform = logit_transform(verifier.config)
        self.verifier_attachment_mode = mode
        return verifier

    def detach_verifier(self) -> None:
        if self.verifier_attachment_mode == DETACHED:
            raise RuntimeError("no verifier is attached")
        self.detach_all()

    def attach_files(self, path: str) -> None:
        """Loads what training needs from the verifier's files, as frozen modules: the verifier is not loaded."""
        nested = self.config.transformer_layer_config
        weights = read_verifier_weights(path, vocab_size=nested.vocab_size, hidden_size=nested.hidden_size)
        assert weights.embedding_VH is not None
        self.detach_all()
        like = next(self.parameters())
        embedding = nn.Embedding(nested.vocab_size, nested.hidden_size, device="meta")
        norm = weights.fill_norm(RMSNorm(nested.hidden_size))
        self.add_frozen("embed_tokens", embedding, weights.embedding_VH, like)
        self.add_frozen("lm_head", head_of(weights.head_VH), weights.head_VH, like)
        self.add_frozen("verifier_norm", norm.to(like), cast("Tensor", norm.weight), like)
        self.set_unregistered("rotary_emb", Rope(nested))
        self.target_transform = weights.logit_transform
        self.verifier_attachment_mode, self.is_attached_for_loading = TRAIN_ONLY, True

    def add_frozen(self, name: str, module: nn.Module, weight: Tensor, like: Tensor) -> None:
        module.weight = nn.Parameter(weight.to(like), requires_grad=False)
        self.__dict__.pop(name, None)
        self.add_module(name, module)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The drafter's tensors, without the verifier's weights."""
        tensors = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        owned = tuple(f"{prefix}{name}." for name in (*BORROWED, "verifier"))
        for name in [name for name in tensors if name.startswith(owned)]:
            del tensors[name]
        return tensors


def head_of(weight_VH: Tensor) -> nn.Linear:
    """Builds a head that shares a weight."""
    V, H = weight_VH.shape
    linear = nn.Linear(H, V, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_VH.detach(), requires_grad=False)
    return linear


def no_grad_weight(module: Any) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()


class Generating(VerifierAttachment):
    """Adds `generate` to a drafter that has its whole verifier attached."""

    decoding_module: ClassVar[str] = "speculators.decoding"
    """Module with the `Engine` and `SamplingParams` that `generate` uses."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        num_speculative_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Returns prompts and the verifier's continuations, [B, T], right padded; this model drafts. Greedy, or sampled
        with `do_sample` (temperature, top_k, top_p, min_p, seed)."""
        if self.is_attached_for_loading and self.config.recorded_verifier is not None:
            self.attach_verifier(self.config.recorded_verifier)
        if self.verifier_attachment_mode != FULL:
            raise ValueError(
                f"generate needs the whole verifier and this drafter is {self.verifier_attachment_mode!r}; call "
                "attach_verifier(verifier) (mode 'full')"
            )
        return generate(
            self,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            do_sample=do_sample,
            num_speculative_tokens=num_speculative_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **sampling,
        )


def generate(
    model: Any,
    input_ids_BP: Tensor,
    attention_mask_BP: Tensor | None,
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    do_sample: bool,
    num_speculative_tokens: int | None,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None,
    **sampling: Any,
) -> Tensor:
    unknown = sorted(sampling.keys() - {*SAMPLED, *ALWAYS})
    if unknown:
        raise ValueError(f"generate has no arguments {unknown}; it takes {sorted((*SAMPLED, *ALWAYS))}")
    decoding: Any = importlib.import_module(model.decoding_module)
    verifier: Any = model.verifier
    num_prompt = input_ids_BP.shape[1]
    if max_new_tokens is None:
        max_new_tokens = DEFAULT_NEW_TOKENS if max_length is None else max_length - num_prompt
    if max_new_tokens < 1:
        raise ValueError(f"max_length={max_length} leaves no room behind a prompt of {num_prompt} tokens")
    if eos_token_id is None:
        eos_token_id = getattr(verifier.generation_config, "eos_token_id", None)
    stops = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    chosen = {name: sampling[name] for name in ALWAYS if sampling.get(name) is not None}
    if do_sample:
        chosen |= {"temperature": 1.0} | {name: sampling[name] for name in SAMPLED if sampling.get(name) is not None}
    params = decoding.SamplingParams(max_tokens=max_new_tokens, stop_token_ids=tuple(stops), ignore_eos=True, **chosen)
    if num_speculative_tokens is None:
        num_speculative_tokens = model.num_speculative_tokens
    if attention_mask_BP is None:
        attention_mask_BP = torch.ones_like(input_ids_BP)
    prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids_BP, attention_mask_BP, strict=True)]
    batch_size, length = len(prompts), num_prompt + max_new_tokens + num_speculative_tokens
    proposer = model.make_proposer(verifier, max_batch_size=batch_size, max_length=length)
    engine = decoding.Engine(
        verifier, proposer, num_speculative_tokens=num_speculative_tokens, max_batch_size=batch_size, max_length=length
    )
    outputs = [output.token_ids for output in engine.generate(prompts, params)]
    return padded(input_ids_BP, outputs, stops[0] if pad_token_id is None and stops else pad_token_id or 0)


def padded(input_ids_BP: Tensor, outputs: list[list[int]], pad_token_id: int) -> Tensor:
    """Appends the generated tokens to the prompts, right padded."""
    width = max(len(output) for output in outputs)
    rows = [output + [pad_token_id] * (width - len(output)) for output in outputs]
    return torch.cat((input_ids_BP, torch.tensor(rows, dtype=input_ids_BP.dtype, device=input_ids_BP.device)), dim=1)


class SequenceAttention:
    """Causal attention over the cache (anything with transformers' `update`) and this call's columns."""

    def __init__(self, past: Any, visible_BTL: Tensor):
        self.past, self.visible_BTL = past, visible_BTL

    def select_queries(self, hidden_BTH: Tensor) -> Tensor:
        return hidden_BTH

    def __call__(self, query_BTNd: Tensor, key_BTGd: Tensor, value_BTGd: Tensor) -> Tensor:
        if self.past is not None:
            key_BGLd, value_BGLd = self.past.update(key_BTGd.transpose(1, 2), value_BTGd.transpose(1, 2), 0)
            key_BTGd, value_BTGd = key_BGLd.transpose(1, 2), value_BGLd.transpose(1, 2)
        return dense_attention(query_BTNd, key_BTGd, value_BTGd, self.visible_BTL[:, None, None])


def run_sequences(
    network: EagleNetwork,
    input_ids_BT: Tensor,
    features_BTH: Tensor,
    attention_mask: Tensor | None,
    position_ids_BT: Tensor | None,
    past: Any,
) -> Tensor:
    """Returns logits [B, T, V] after each column."""
    B, T = input_ids_BT.shape
    num_past = 0 if past is None else past.get_seq_length()
    device = input_ids_BT.device
    if position_ids_BT is None:
        position_ids_BT = torch.arange(num_past, num_past + T, device=device).expand(B, T)
    visible_BTL = visible(attention_mask, num_past, T, device).expand(B, T, num_past + T)
    window = network.windows[0]
    if window is not None:
        keys_L = torch.arange(num_past + T, device=device)
        visible_BTL = visible_BTL & (keys_L > keys_L[num_past:, None] - window)
    rope = network.rope.at(position_ids_BT, torch.float32)
    attention = SequenceAttention(past, visible_BTL)
    return network.lm_head(network.step(input_ids_BT, features_BTH, rope, [attention]).normed_BRH)


def visible(attention_mask: Tensor | None, num_past: int, T: int, device: torch.device) -> Tensor:
    """bool [B or 1, T, L] of a mask [B, L] (1 = a token), an additive or boolean mask [B, 1, T, L], or none."""
    if attention_mask is not None and attention_mask.ndim == 4:
        mask = attention_mask[:, 0]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    index_L = torch.arange(num_past + T, device=device)
    causal_TL = index_L <= index_L[num_past:, None]
    if attention_mask is None:
        return causal_TL[None]
    itself_TL = index_L == index_L[num_past:, None]  # padding sees itself: its softmax stays finite
    return (causal_TL & attention_mask[:, None].bool()) | itself_TL
