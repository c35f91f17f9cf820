"""Loads a verifier, any Hugging Face causal LM, from safetensors or GGUF: the whole model, or only its embedding, head
and final norm, read from its files; and says what tells one verifier from another.

Shapes: V vocabulary, H hidden size.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from speculators.nn.norms import LayerNorm, RMSNorm, RMSNormPlusOne
from speculators.utils.loading import Rows, find_key, list_checkpoint_keys, load_model_layers, load_rows, spaced
from speculators.utils.names import refuse_missing_verifier
from speculators.utils.progress import doing, no_progress_bars
from speculators.utils.quantized import EXTRA, method_of, refuse_missing_packages, settings_of, source, tokenizer_source
from speculators.utils.report import human_bytes
from speculators.verifier.config import (
    LogitTransform,
    NormKind,
    first_line,
    is_head_tied,
    logit_transform,
    norm_kind,
    open_config,
    open_verifier_config,
    text_config,
)
from speculators.verifier.placement import DeviceMap, refuse_missing_device, refuse_unsplittable, spread_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
ROWS_AT_ONCE = 1024  # of two matrices that are compared
DEQUANTISED = ("compressed-tensors", "fp8", "mxfp8", "mxfp4")
"""Methods of which transformers can dequantise the weights when it loads them."""
NORM, NORM_BIAS = "model.norm.weight", "model.norm.bias"


@no_progress_bars()
def load_verifier(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    tp_size: int = 1,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Loads a causal LM in eval mode, without gradients; `dtype=None` keeps the checkpoint's own dtype.
    In place of `device`, `device_map` spreads its layers over several (`placement.read_device_map`); `tp_size` gives
    each of so many ranks a slice of every layer, and all of them call this, and every forward, together.

    The weights of a quantised model are dequantised, once, to `dtype`; activations are not rounded, whatever its scheme
    says: rounded ones have no equal texts with and without drafts.

    Raises ValueError, before any weight is read, for a path that is not there, a device that torch does not have, a
    config that transformers cannot read, an encoder-decoder and packages that a quantised model needs; after it, for
    weights that are neither safetensors nor GGUF, and for formats that need another device."""
    from transformers import AutoModelForCausalLM  # imports modelling code: only who loads a model pays for it

    name = str(name_or_path)
    refuse_missing_device(device)
    refuse_missing_verifier(name)
    config = open_verifier_config(name, trust_remote_code, revision)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name!r} is an encoder-decoder ({config.model_type}); a verifier must be a causal LM")
    where, settings = source(name), settings_of(config)
    method = method_of(settings) if settings else ""
    refuse_missing_packages(method, name)
    spreads = device_map is not None or tp_size > 1
    if spreads and (method or device is not None):
        what = f"{name!r} is quantised ({method})" if method else f"device={str(device)!r} names one"
        raise ValueError(f"a device map or ranks spread plain weights over devices, and {what}: give one of the two")
    if tp_size > 1:
        refuse_unsplittable(config, tp_size)
    # sdpa has no soft cap and transformers drops it silently there: the eager path is the trained model
    is_capped = getattr(text_config(config), "attn_logit_softcapping", None)
    try:
        with doing(loading(name)):
            model = AutoModelForCausalLM.from_pretrained(
                **where,
                config=config,
                dtype=dtype if dtype is not None else "auto",
                trust_remote_code=trust_remote_code,
                revision=revision,
                use_safetensors=True,
                **spread_by(device_map, tp_size),
                **({"attn_implementation": "eager"} if is_capped else {}),
                **dequantize_when_loading(config, is_gguf="gguf_file" in where),
            )
    except (ImportError, RuntimeError) as error:
        if not settings:
            raise
        raise ValueError(
            f"cannot load {name!r}, which is quantised ({method}): {first_line(error)}. If this names a device or its "
            f"kernels, the format runs there only; for packages, {EXTRA}"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cannot load {name!r} as a causal LM from safetensors or GGUF: {first_line(error)}"
        ) from error
    if method == "compressed-tensors":
        drop_rounding(model)
    if "gguf_file" in where:
        model.name_or_path = name  # transformers knows its directory
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def dequantize_when_loading(config: Any, *, is_gguf: bool) -> dict[str, Any]:
    """Asks transformers to dequantise weights when it loads them, not at each use: in `config`, where that is where it
    looks, else by the arguments returned."""
    import transformers

    if is_gguf and hasattr(transformers, "GgufConfig"):  # older releases do nothing else
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    settings = settings_of(config)
    if method_of(settings) in DEQUANTISED:
        rounds_cache = {"kv_cache_scheme": None} if "kv_cache_scheme" in settings else {}
        config.quantization_config = {**settings, **rounds_cache, "dequantize": True}
    return {}


def drop_rounding(model: PreTrainedModel) -> None:
    """Takes compressed-tensors' wrappers off dequantised layers: they would round the activations, where a last bit
    decides between neighbours 6 % apart: drafts scored in one forward would give another text than plain decoding."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if forward is not None and inspect.unwrap(getattr(forward, "__func__", forward)) is type(module).forward:
            del module.forward
        if getattr(module, "quantization_scheme", None) is not None:
            del module.quantization_scheme
            module.weight.data = module.weight.data.to(model.dtype)  # NVFP4 gives bfloat16, whatever was asked for
            for name in {*module._parameters, *module._buffers} - {"weight", "bias"}:
                delattr(module, name)


def loading(name: str) -> str:
    """Says that a model is being loaded, with the size of its weights where they are files here."""
    folder = Path(name)
    files = folder.glob("*.safetensors") if folder.is_dir() else [folder] if folder.is_file() else []
    num_bytes = sum(file.stat().st_size for file in files)
    return f"loading {name}" + (f" ({human_bytes(num_bytes)})" if num_bytes else "")


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifierWeights:
    """The part of a verifier that stands before its first layer and after its last one."""

    name: str
    head_VH: Tensor
    embedding_VH: Tensor | None
    """None where it was not asked for."""
    norm_H: Tensor | None
    """As stored. None: not asked for, or the norm has no weight."""
    norm_bias_H: Tensor | None
    norm_kind: NormKind
    logit_transform: LogitTransform

    def fill_norm(self, norm: nn.Module) -> nn.Module:
        """The given norm with the verifier's weight and epsilon in it; another module where the verifier's norm is a
        LayerNorm. A verifier without the weight leaves ones, with a warning."""
        if self.norm_H is None:
            logger.warning("verifier '%s' has no final norm weight; its norm stays at ones", self.name)
        if self.norm_kind.is_centered and not isinstance(norm, LayerNorm):
            like: Tensor = norm.weight  # type: ignore[assignment]
            norm = LayerNorm(len(like), has_bias=self.norm_bias_H is not None).to(like).requires_grad_(False)
        for name in ("variance_epsilon", "eps"):  # ours; torch's
            if hasattr(norm, name):
                setattr(norm, name, self.norm_kind.eps)
        with torch.no_grad():
            if self.norm_H is not None:
                is_gain_stored = not self.norm_kind.has_unit_offset or isinstance(norm, RMSNormPlusOne)
                gain_H = self.norm_H if is_gain_stored else 1.0 + self.norm_H.float()
                norm.weight.copy_(gain_H)  # type: ignore[operator]
            if self.norm_bias_H is not None and isinstance(getattr(norm, "bias", None), Tensor):
                norm.bias.copy_(self.norm_bias_H)  # type: ignore[operator]
        return norm


def read_verifier_weights(
    name: str, *, vocab_size: int, hidden_size: int, needs_embedding: bool = True, needs_norm: bool = True
) -> VerifierWeights:
    """The weights of the verifier in a directory or on the hub. ValueError where it has none of that name, where they
    are not [vocab_size, hidden_size], or where a head is neither stored nor tied to the embedding."""
    refuse_missing_verifier(name)
    config, keys = open_config(name), list_checkpoint_keys(name)
    is_stored = find_key(HEAD, keys) is not None
    if any(key.endswith("lm_head.weight_packed") for key in keys):
        raise ValueError(f"the head of verifier '{name}' is packed, not read here: quantise with lm_head in `ignore`")
    if not is_stored and is_head_tied(config) is False:
        raise ValueError(
            f"verifier '{name}' has no tensor {HEAD} under any name known here, and its config does not tie the head "
            "to the embedding (tie_word_embeddings is false): the checkpoint is incomplete"
        )
    wanted = [HEAD] if is_stored else []
    wanted += [EMBEDDING] if needs_embedding or not is_stored else []
    wanted += [NORM] if needs_norm else []
    kind = norm_kind(config)
    has_bias = needs_norm and kind.is_centered and find_key(NORM_BIAS, keys) is not None
    weights = load_model_layers(wanted + ([NORM_BIAS] if has_bias else []), name)
    missing = sorted(set(wanted) - weights.keys() - {NORM})
    if missing:
        raise ValueError(f"verifier '{name}' has no tensor {missing} under any name known here")
    head_VH = weights[HEAD] if is_stored else weights[EMBEDDING]  # a tied head is stored once, as the embedding
    embedding_VH = weights[EMBEDDING] if needs_embedding else None
    for what, weight in (("embedding", embedding_VH), ("head", head_VH)):
        if weight is not None and tuple(weight.shape) != (vocab_size, hidden_size):
            raise ValueError(
                f"the {what} of verifier '{name}' is {tuple(weight.shape)}; this drafter's vocabulary and hidden size "
                f"are {(vocab_size, hidden_size)}. Use the verifier it was made for, or train a drafter for this one"
            )
    return VerifierWeights(
        name, head_VH, embedding_VH, weights.get(NORM), weights.get(NORM_BIAS), kind, logit_transform(config)
    )


def verifier_rows(tensor: str, verifier: str, rows: Sequence[int] | None = None) -> Rows | None:
    """Some rows of a verifier's matrix (None: evenly spaced ones). None when it has no such tensor (a tied head has
    none), or not on this machine: gigabytes are not fetched to look at a few rows."""
    try:
        return load_rows(tensor, verifier, rows, local_files_only=True)
    except (KeyError, OSError, ValueError, IndexError, SafetensorError):
        return None


def is_copy(tensor: Tensor, name: str, verifier: str, rows_V: Tensor | None = None) -> bool:
    """Says whether every value is the verifier's (of the rows that the bool mask `rows_V` keeps), up to rounding to the
    narrower type; a tied head is its embedding.

    Raises `ValueError` when the verifier's weights cannot be read: nothing would be proven."""
    try:
        keys = list_checkpoint_keys(verifier)
        stored = EMBEDDING if name == HEAD and find_key(HEAD, keys) is None else name
        theirs = load_model_layers([stored], verifier)[stored]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"whether {name} is the verifier's own cannot be told: the weights of {verifier!r} cannot be read "
            f"({first_line(error)}); name a verifier whose weights are there"
        ) from error
    if rows_V is not None and len(rows_V) == len(theirs) != len(tensor):
        theirs = theirs[rows_V]
    if theirs.shape != tensor.shape:
        return False
    narrow = min(tensor.dtype, theirs.dtype, key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).bits))
    limit = 2 * torch.finfo(narrow).eps
    smallest = torch.finfo(torch.float16).tiny
    blocks = zip(tensor.split(ROWS_AT_ONCE), theirs.split(ROWS_AT_ONCE), strict=True)
    return all(torch.allclose(ours.float(), own.float(), rtol=limit, atol=smallest) for ours, own in blocks)


def resolve_verifier_norm_class(verifier: str) -> type[RMSNorm]:
    """The norm that computes what the verifier's norms compute with the weights it stores."""
    kind = norm_kind(open_config(verifier))
    if kind.is_centered:
        return LayerNorm
    return RMSNormPlusOne if kind.has_unit_offset else RMSNorm


# -- what tells one verifier from another


def layer_matrices(name: str, count: int) -> list[str]:
    """Names some matrices of a verifier's layers, first to last; none when its files are not on this machine."""
    try:
        keys = list_checkpoint_keys(name, local_files_only=True)
    except (OSError, ValueError):
        return []
    inside = [key for key in keys if key.endswith("proj.weight") and any(part.isdigit() for part in key.split("."))]
    return [sorted(inside)[i] for i in spaced(len(inside), count)]


def tokenizer_facts(name: str) -> dict[str, Any] | None:
    """Hashes token -> id; None when no tokenizer can be read here."""
    from transformers import AutoTokenizer  # imports modelling code: only who reads a tokenizer pays for it

    try:
        tokenizer = AutoTokenizer.from_pretrained(**tokenizer_source(name))
    except (OSError, ValueError, KeyError, ImportError):
        return None
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = json.dumps(vocabulary, ensure_ascii=True)
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "num_tokens": len(vocabulary)}
