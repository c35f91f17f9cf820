"""Reads a loaded verifier's residual stream and makes its logits from it; notes which layers a server extracts.

Shapes: B sequences, T tokens, H hidden size, A aux layers, V vocabulary.

    aux id        0        1              n-1        n
    stream   embed -> layer 0 -> ... -> layer n-2 -> layer n-1 -> | final norm -> head
                  ^ input of layer 0        ^ input of layer n-1  ^ input of the norm

`output_hidden_states` is not used: it keeps every layer, and its last entry is taken after the norm.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from speculators.interfaces import CaptureSpec
from speculators.utils.files import atomic_write, read_json_object
from speculators.verifier.config import logit_transform, text_config
from speculators.verifier.placement import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class VerifierParts:
    """The modules of a causal LM that the rest of the library needs by role."""

    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module
    config: PreTrainedConfig
    """The config (of a multimodal wrapper: its language model's part)."""


def decoder_of(model: nn.Module) -> nn.Module:
    """Returns what a forward runs where nobody reads the logits: they are its largest tensor."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    return model if get_decoder is None else get_decoder()


def verifier_parts(model: nn.Module) -> VerifierParts:
    """Find decoder layers, final norm and head by what they are, not by the architecture's name."""
    config = text_config(model.config)
    for parent in decoder_of(model).modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                return VerifierParts(child, _final_norm(parent, model), _head(model), config)
    raise ValueError(
        f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers; its hidden states and "
        "logits cannot be read"
    )


class CapturedStates:
    """States of the forward just run, in the order of the spec. Each forward replaces them."""

    def __init__(self, spec: CaptureSpec):
        self.spec = spec
        self.stream_by_id: dict[int, Tensor] = {}
        self.last_hidden: Tensor | None = None
        """[B, T, H], before the final norm."""

    @property
    def aux(self) -> Tensor | None:
        """[B, T, A * H], where the last of them lies; None when no aux layer was asked for."""
        if not self.spec.aux_layer_ids:
            return None
        device = self.stream_by_id[self.spec.aux_layer_ids[-1]].device
        return torch.cat([self.stream_by_id[i].to(device) for i in self.spec.aux_layer_ids], dim=-1)

    @property
    def drafter_input(self) -> Tensor | None:
        """Returns what a drafter with this spec reads: the aux states, or without them the last state."""
        return self.aux if self.spec.aux_layer_ids else self.last_hidden


TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
CHOOSING = threading.Lock()


def turn_of(model: nn.Module) -> threading.RLock:
    """The lock of whoever runs this model: hooks see every forward, those of other threads too."""
    with CHOOSING:
        return TURNS.setdefault(model, threading.RLock())


@contextmanager
def capture_states(model: nn.Module, spec: CaptureSpec) -> Iterator[CapturedStates]:
    """Inside, every forward of `model` leaves the asked states in the yielded object. Only those layers are hooked."""
    parts = verifier_parts(model)
    num_layers = len(parts.layers)
    bad = [i for i in spec.aux_layer_ids if not 0 <= i <= num_layers]
    if bad:
        raise ValueError(
            f"aux_layer_ids={list(spec.aux_layer_ids)} but the verifier has {num_layers} layers; ids count finished "
            f"layers, so 0..{num_layers} are valid"
        )
    states = CapturedStates(spec)

    def keep(layer_id: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            if layer_id == num_layers and spec.last_hidden:
                states.last_hidden = stream
            states.stream_by_id[layer_id] = stream

        return hook

    wanted = set(spec.aux_layer_ids) | ({num_layers} if spec.last_hidden else set())
    hooks = [
        (parts.layers[i] if i < num_layers else parts.final_norm).register_forward_pre_hook(keep(i), with_kwargs=True)
        for i in sorted(wanted)
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def logits_from_last_hidden(model: nn.Module, last_hidden_BTH: Tensor) -> Tensor:
    """The verifier's logits from the stream before its final norm: its own norm, head, scale and soft cap."""
    parts = verifier_parts(model)
    return logit_transform(parts.config).apply(parts.head(parts.final_norm(last_hidden_BTH)))


def fitting_embedding(verifier_model: PreTrainedModel, vocab_size: int, hidden_size: int) -> Tensor:
    """The verifier's embedding [V, H]. ValueError when it has not the sizes a drafter was trained for."""
    weight = cast("Tensor", verifier_model.get_input_embeddings().weight)
    expected = (vocab_size, hidden_size)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"the verifier's embedding is {tuple(weight.shape)} and this drafter was trained for {expected} "
            "(vocabulary, hidden size); use the verifier it was trained for"
        )
    return weight


@torch.no_grad()
def check_reproduces_logits(model: nn.Module) -> None:
    """Prove on a few tokens that captured states give the model's own logits, or say how far they are apart.

    A wrong norm (1 + w against w), a missed scale or soft cap would otherwise train a drafter on wrong targets.
    """
    parts = verifier_parts(model)
    device = device_of(model)
    token_ids_BT = torch.arange(1, 9, device=device)[None] % parts.config.vocab_size
    with capture_states(model, CaptureSpec(last_hidden=True)) as states:
        logits_BTV = model(input_ids=token_ids_BT, use_cache=False).logits
    assert states.last_hidden is not None
    ours_BTV = logits_from_last_hidden(model, states.last_hidden).to(logits_BTV.device)
    if ours_BTV.shape != logits_BTV.shape:
        raise ValueError(
            f"the head of {type(model).__name__} gives logits of shape {tuple(ours_BTV.shape)}, the model gives "
            f"{tuple(logits_BTV.shape)}: its logits cannot be rebuilt from hidden states"
        )
    difference = (ours_BTV.float() - logits_BTV.float()).abs().max().item()
    scale = logits_BTV.float().abs().max().item()
    tolerance = 1e-4 if logits_BTV.dtype == torch.float32 else 2e-2
    if not difference <= tolerance * max(scale, 1.0):
        raise ValueError(
            f"final norm and head of {type(model).__name__} do not reproduce its logits (largest difference "
            f"{difference:.3g} at logits up to {scale:.3g}); it transforms logits in a way this library does not know"
        )


def _final_norm(parent: nn.Module, model: nn.Module) -> nn.Module:
    named = [(name, child) for name, child in parent.named_children() if "norm" in type(child).__name__.lower()]
    norms = [child for name, child in named if not any(part in name for part in ("embed", "embd", "projection"))]
    if not norms and len(named) == 1:
        norms = [named[0][1]]  # Lfm2 calls the norm before its head `embedding_norm`
    if len(norms) != 1:
        found = [type(norm).__name__ for norm in norms]
        raise ValueError(f"{type(model).__name__} has {len(norms)} candidates for the final norm {found}; expected one")
    return norms[0]


def _head(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head; a verifier must be a causal LM")
    return head


# -- states captured by a server ---------------------------------------------------------------------------------------

NOTE_NAME = "extraction.json"
NOTE_FORMAT = 1


@dataclass(frozen=True)
class ExtractionNote:
    """Which layers one server extracts, written beside its files, which hold [T, slots, H] and do not say it:

    <directory>/extraction.json    {"format": 1, "model": ..., "layer_ids": [2, 4, 5, 8], "num_layers": 8}"""

    model: str
    """Hub id, or absolute path of a directory."""
    layer_ids: tuple[int, ...]
    """Slot i holds the residual stream after `layer_ids[i]` layers; `num_layers` is the last, before the final norm."""
    num_layers: int

    def write(self, directory: Path) -> Path:
        with atomic_write(directory / NOTE_NAME) as file:
            json.dump({"format": NOTE_FORMAT, **asdict(self)}, file, indent=2)
            file.write("\n")
        return directory / NOTE_NAME

    @classmethod
    def read(cls, directory: Path) -> ExtractionNote | None:
        """None when the server was started by other means and left none."""
        path = directory / NOTE_NAME
        if not path.exists():
            return None
        values = read_json_object(path, "start the extraction server again")
        if values.pop("format", None) != NOTE_FORMAT:
            raise ValueError(f"{path} is not of format {NOTE_FORMAT}; start the extraction server with this version")
        layer_ids: Any = values.get("layer_ids")
        num_layers: Any = values.get("num_layers")
        is_count = type(num_layers) is int and isinstance(layer_ids, list)
        if not is_count or not all(type(i) is int and 0 <= i <= num_layers for i in layer_ids):
            raise ValueError(
                f"{path} names the layers {layer_ids} of {num_layers}, which are not layers of a model; start the "
                "extraction server again"
            )
        return cls(str(values.get("model")), tuple(layer_ids), num_layers)
