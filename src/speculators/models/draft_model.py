"""Shared by drafters made of decoder layers: the nested decoder config as engines read it, and the base of those that
have an embedding, a head and perhaps a vocabulary of their own.

Shapes: V verifier vocabulary, H hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PreTrainedModel
from typing_extensions import Self

from speculators.draft_vocab import DraftVocabMixin, was_never_loaded
from speculators.model import SpeculatorModel
from speculators.nn.attention import FAMILIES, attention_shape
from speculators.nn.draft_tokens import select_rows
from speculators.nn.rope import head_dim, rope_parameters, with_older_rope
from speculators.utils.quantized import tokenizer_source
from speculators.verifier.capture import fitting_embedding
from speculators.verifier.config import get_verifier_config

logger = logging.getLogger(__name__)

# vLLM builds a generic config from the dict: no class defaults stand behind a missing key.
COMPLETED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "use_sliding_window": False,
}


LLAMA_LAYERS = ("mistral", "mixtral", "phi3", "qwen2")
"""Families of verifiers whose published EAGLE heads are llama layers under the verifier's own config."""
NEUTRAL = {
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "qk_layernorm": False,
    "residual_multiplier": 1,
    "rope_interleave": False,
    "use_parallel_residual": False,
    "use_qk_norm": False,
}
"""Keys of config.json by which other layers compute something else, and the value with which they compute as ours."""
BIASED = {"attention_bias": "self_attn.{}_proj", "mlp_bias": "mlp.{}_proj"}


def layer_config_of(values: Mapping[str, Any], left_out: Collection[str], **assumed: Any) -> Any:
    """Reads the decoder config from a foreign config.json that mixes it with the drafter's keys (`left_out`).

    `assumed`: values for absent keys. Raises `ValueError` for an option that draft layers here do not compute with.
    """
    kept = {**assumed, **{key: value for key, value in values.items() if key not in left_out}}
    odd = {key: kept[key] for key, neutral in NEUTRAL.items() if kept.get(key) not in (None, neutral)}
    if odd:
        raise ValueError(
            f"config.json says {odd}, which draft layers here do not compute with: another function would be served; "
            "decode it with the project that it comes from"
        )
    if kept["model_type"] not in LLAMA_LAYERS:
        return AutoConfig.for_model(**kept)
    own = AutoConfig.for_model(**kept).to_dict()
    part = (own.get("rope_parameters") or {}).get("partial_rotary_factor") or 1
    if part != 1:
        raise ValueError(
            f"config.json says model_type={kept['model_type']!r} with partial_rotary_factor={part}, and llama layers, "
            "as published heads for it have, rotate all of a head: write 1 if the head was trained so"
        )
    known = {key: own[key] for key in LlamaConfig().to_dict() if own.get(key) is not None and key != "model_type"}
    return LlamaConfig(**known)


def with_biases(nested: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tells `nested` of biases that config.json does not mention, and adds zeros for those of their group that the file
    lacks: llama layers have all biases of a group or none, others (`qkv_bias`) only some."""
    completed = dict(tensors)
    for key, module in BIASED.items():
        own = {"attention_bias": "qkvo" if FAMILIES[nested.model_type].output_bias else "qkv"}
        parts = own.get(key, ("gate", "up", "down") if nested.model_type == "llama" else ())
        names = [module.format(part) for part in parts]
        if getattr(nested, key, False) or not any(name.endswith(f"{part}.bias") for name in tensors for part in names):
            continue
        setattr(nested, key, True)
        for name, weight in tensors.items():
            if name.endswith(tuple(f"{part}.weight" for part in names)):
                completed.setdefault(f"{name.removesuffix('weight')}bias", weight.new_zeros(len(weight)))
    return completed


def read_window(nested: Any, own: Mapping[str, Any]) -> None:
    """Reads the window as `dflash_config` of SpecForge says it: `use_swa`, `swa_window_size`. It holds for the layers
    that `layer_types` calls sliding, for all without the list (SGLang's and TensorRT-LLM's reading)."""
    if not own.get("use_swa"):
        return
    size = own.get("swa_window_size")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"use_swa is true, with swa_window_size={size!r}: it must be at least 1")
    if getattr(nested, "layer_types", None) is None or "sliding_attention" not in nested.layer_types:
        nested.layer_types = ["sliding_attention"] * nested.num_hidden_layers
    nested.sliding_window, nested.use_sliding_window = size, True


def layer_values(config: Any) -> dict[str, Any]:
    """Returns the values of a decoder config as such a config.json holds them, with rope in both spellings."""
    return with_older_rope({key: value for key, value in config.to_dict().items() if key != "_name_or_path"})


def complete_layer_config(config: Any) -> Any:
    """Returns a copy with every key that an engine reads."""
    config = copy.deepcopy(config)
    attention_shape(config)  # refuses families without layers here
    config.tie_word_embeddings = False
    config.head_dim = head_dim(config)
    config.rope_parameters = rope_parameters(config)
    for key, value in COMPLETED.items():
        if not hasattr(config, key):
            setattr(config, key, value)
    if config.model_type == "llama":
        config.mlp_bias = bool(getattr(config, "mlp_bias", False))
    layer_types = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    if len(layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(layer_types)} entries for num_hidden_layers={config.num_hidden_layers}; "
            "give one for each draft layer"
        )
    config.layer_types = layer_types
    return config


class DraftModel(DraftVocabMixin, SpeculatorModel):  # type: ignore[misc]
    """Subclasses define `fc`, which reads the verifier's states."""

    takes_routes = True
    uses_every_weight = True
    columns_on_host = ("document_ids", "loss_mask")
    fc: nn.Linear

    def beside(self, verifier_model: PreTrainedModel) -> Self:
        """This drafter in the verifier's dtype, on its device, complete with its embedding and head."""
        source = fitting_embedding(verifier_model, self.verifier_vocab_size, self.hidden_size)
        model = self
        if self.fc.weight.dtype != source.dtype or self.fc.weight.device != source.device:
            model = copy.deepcopy(self)  # training keeps its own
            model.to(device=source.device, dtype=source.dtype)  # type: ignore[call-arg]
        if was_never_loaded(model.embed_tokens.weight):
            model.embed_tokens.weight.data.copy_(source)
        if was_never_loaded(model.lm_head.weight):
            model.lm_head.weight.data.copy_(select_rows(verifier_model.get_output_embeddings().weight, model.t2d))
        return model


def resolve_mask_token_id(mask_token_id: int | None, verifier: str, vocab_size: int, trust_remote_code: bool) -> int:
    """The token of masked slots: the given one, the tokenizer's mask token, the first row of the embedding that no
    token uses, or (with a warning) a special token of the verifier."""
    from transformers import AutoTokenizer  # imports modelling code, which a config's reader need not wait for

    if mask_token_id is not None:
        if not 0 <= mask_token_id < vocab_size:
            raise ValueError(
                f"mask_token_id={mask_token_id} is no row of the verifier's embedding; give one in 0..{vocab_size - 1}"
            )
        return mask_token_id
    special: list[int | None] = []
    try:
        tokenizer = AutoTokenizer.from_pretrained(**tokenizer_source(verifier), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        config = get_verifier_config(verifier, trust_remote_code)
        eos: int | list[int] | None = getattr(config, "eos_token_id", None)
        special = [getattr(config, "pad_token_id", None), eos[0] if isinstance(eos, list) else eos]
    else:
        if tokenizer.mask_token_id is not None:
            return int(tokenizer.mask_token_id)
        first_unused = max(tokenizer.get_vocab().values(), default=-1) + 1
        if first_unused < vocab_size:
            return first_unused
        special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    found = next((token for token in special if token is not None), None)
    if found is None:
        raise ValueError(
            f"verifier '{verifier}' has no mask token, no spare embedding row and no pad, eos or unk token; "
            "choose a token that does not occur in text with --mask-token-id"
        )
    logger.warning("masked slots are marked with token %d, which also has another meaning; see --mask-token-id", found)
    return int(found)


def mask_token_of(config: Any) -> int:
    """Returns the token of masked slots. Raises `ValueError` where there is none, or it is no row of the embedding."""
    token, vocab_size = config.mask_token_id, config.target_vocab_size
    if token is None:
        raise ValueError("mask_token_id is not set, so masked slots have no token; set it in config.json")
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"mask_token_id={token} is no row of the verifier's embedding (0..{vocab_size - 1}); write the id that the "
            "drafter was trained with into config.json"
        )
    return token
