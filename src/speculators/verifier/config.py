"""Reads a verifier's config: its text part, layers, final norm, logit transform, and what a drafter takes over from it.

Facts come from transformers' own reading of config.json, never from the file's keys: a key that the file leaves out has
the default of the verifier's class (Cohere's `logit_scale` is 0.0625, not 1).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.proposals import GreedyTokenProposalConfig
from speculators.utils.quantized import quantization_of, source
from speculators.utils.util import reading, refuse_huge

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# Families whose norms multiply by 1 + w: their stored norm weights are gains minus one.
UNIT_OFFSET_FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "minimax_m3_vl_text",
        "muse_glimmer_text",
        "nemotron",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp_text",
        "recurrent_gemma",
        "step3p5",
        "vaultgemma",
    }
)
# A family says by the name of its epsilon which norm it has, but for these.
EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
LAYER_NORM_FAMILIES = frozenset({"cohere2_moe", "olmo", "opt", "phimoe", "xglm"})
RMS_NORM_FAMILIES = frozenset({"falcon_mamba", "lfm2", "lfm2_moe", "mamba", "mamba2", "nemotron_h", "xlstm"})
RMS_EPS, LAYER_EPS = 1e-6, 1e-5
"""Of families without a key for it."""

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISOR = "logits_scaling"  # Granite
MULTIPLIES_BY_DIVISOR = frozenset({"hyperclovax"})  # muP: the same key, the other way round
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
IGNORES_ITS_SCALE = frozenset({"mpt"})  # transformers' class has the key and does not use it

MLP_RATIO_OF_MOE = 3
"""An MoE verifier has no dense width to copy: 3 x hidden is the common ratio of gated MLPs."""


def text_config(config: Any) -> Any:
    """The language model's part of a config object or of a config.json's dict: itself where it has no other parts."""
    if isinstance(config, PretrainedConfig):
        return config.get_text_config(decoder=True)
    thinker, text = (
        config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
        for part in ("thinker_config", "text_config")
    )
    if thinker is not None:  # Qwen-Omni
        return text_config(thinker)
    return config if text is None else text


SAME_LAYERS = {"mimo": "qwen2"}
"""Families that transformers does not know -> those with the same layers (MiMo's MTP layers stand beside them)."""


def open_config(
    name: str, *, revision: str | None = None, code_revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """A model's config with its class's defaults. Of a model type that transformers does not know: a record of the
    file's keys. Raises OSError where there is no config.json."""
    values, _ = PretrainedConfig.get_config_dict(**source(name), revision=revision)
    refuse_huge(values, name)
    if model_type_of(values) in CONFIG_MAPPING or (trust_remote_code and values.get("auto_map")):
        with reading(f"the config of {name}"):
            return AutoConfig.from_pretrained(
                **source(name), revision=revision, code_revision=code_revision, trust_remote_code=trust_remote_code
            )
    with reading(f"the config of {name}"):
        return plain_config(values)


def precision_of(name: str, config: Any) -> str | None:
    """Names how the weights of a verifier are quantised; None for plain floating point. `config`: its whole one."""
    return quantization_of(name, config) or quantization_of(name, text_config(config))


def model_type_of(values: Mapping[str, Any]) -> str:
    """Empty where the key is missing or holds no name."""
    name = values.get("model_type")
    return name if isinstance(name, str) else ""


def plain_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """A record of the keys of a config.json."""
    config: Any = PretrainedConfig.from_dict(dict(values))
    config.model_type = model_type_of(values)  # the class has one of its own
    text = text_config(values)
    if text is not values and isinstance(text, Mapping):
        config.text_config = plain_config(text)
    return config


def open_verifier_config(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """The whole config of a verifier, all parts of it. ValueError where none of a known model type can be read."""
    try:
        with reading("its config.json"):
            if not trust_remote_code and (known := known_under_another_name(name, revision)) is not None:
                return known
            return AutoConfig.from_pretrained(**source(name), trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(
                f"{name} comes with code of its own, which is not run unasked; if you trust it, pass "
                "trust_remote_code=True (--trust-remote-code)"
            ) from error
        raise ValueError(
            f"{name}: no model config can be read there ({first_line(error)}); give the directory of a saved causal "
            "LM, or a model id of the Hugging Face hub"
        ) from error


def known_under_another_name(name: str, revision: str | None) -> PretrainedConfig | None:
    """Reads the config of a family that transformers has under another name; None for the rest."""
    values, _ = PretrainedConfig.get_config_dict(**source(name), revision=revision)
    family = SAME_LAYERS.get(model_type_of(values))
    if family is None or model_type_of(values) in CONFIG_MAPPING:
        return None
    return CONFIG_MAPPING[family](
        **{key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    )


def get_verifier_config(name_or_path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a verifier's language model."""
    return text_config(open_verifier_config(name_or_path, trust_remote_code))


def end_token_ids(name_or_path: str, tokenizer: Any, trust_remote_code: bool = False) -> frozenset[int]:
    """Finds the tokens that end an answer: of the generation config or else of the config, and the tokenizer's own."""
    try:
        found = GenerationConfig.from_pretrained(source(name_or_path)["pretrained_model_name_or_path"]).eos_token_id
    except OSError:  # a model without one
        found = None
    if found is None:
        found = getattr(get_verifier_config(name_or_path, trust_remote_code), "eos_token_id", None)
    listed = found if isinstance(found, list | tuple) else [found]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_head_tied(config: PretrainedConfig) -> bool | None:
    """Whether the head is the embedding; None where neither config nor class says."""
    said = [getattr(part, "tie_word_embeddings", None) for part in (config, text_config(config))]
    return None if said == [None, None] else any(said)


# -- layers ------------------------------------------------------------------------------------------------------------


def resolve_target_layer_ids(
    target_layer_ids: Sequence[int] | None, verifier: str | PretrainedConfig, trust_remote_code: bool = False
) -> list[int]:
    """The checked aux layer ids, or the default of an n-layer verifier.

    Id i is the residual stream after i layers: 0 the embeddings, n the last layer before the final norm.
    ValueError for ids that are empty, repeated or outside 0..n."""
    config = verifier
    if not isinstance(config, PretrainedConfig):
        config = get_verifier_config(str(verifier), trust_remote_code)
    num_layers: int = text_config(config).num_hidden_layers
    rule = f"ids count finished layers, so distinct ones in 0..{num_layers} are valid"
    if target_layer_ids is None:
        ids = default_target_layer_ids(num_layers)
        logger.warning("target_layer_ids not given: using %s for a verifier of %d layers", ids, num_layers)
        return ids
    ids = [int(layer) for layer in target_layer_ids]
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) > num_layers:
        raise ValueError(f"target_layer_ids={ids} but the verifier has {num_layers} layers; {rule}")
    # serving engines sort the ids, and the columns of `fc` follow them (vLLM, aux_hidden_state_layers)
    return sorted(ids)


def default_target_layer_ids(num_layers: int) -> list[int]:
    """`[2, n // 2, n - 3]`; of fewer than seven layers, where those meet, three that differ."""
    low, high = (2, num_layers - 3) if num_layers >= 7 else (1, num_layers - 1)
    ids = [low, num_layers // 2, high]
    return ids if num_layers > 3 else list(range(num_layers + 1))[:3]


# -- final norm and logits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormKind:
    """Says which norm a verifier applies before its head."""

    eps: float
    has_unit_offset: bool = False
    """It multiplies by 1 + w."""
    is_centered: bool = False
    """A LayerNorm: it subtracts the mean, and may add a bias."""


def norm_kind(config: PretrainedConfig) -> NormKind:
    """The verifier's final norm, by its family and the name of its epsilon."""
    text = text_config(config)
    families = {config.model_type, text.model_type}
    key = next((name for name in EPS_KEYS if getattr(text, name, None) is not None), None)
    is_layer_norm = key not in (None, EPS_KEYS[0]) and not families & RMS_NORM_FAMILIES
    is_layer_norm = is_layer_norm or bool(families & LAYER_NORM_FAMILIES)
    eps = getattr(text, key) if key is not None else LAYER_EPS if is_layer_norm else RMS_EPS
    return NormKind(float(eps), bool(families & UNIT_OFFSET_FAMILIES), is_layer_norm)


class LogitTransform(NamedTuple):
    """Computes what a verifier does to the numbers its head gives: logits = softcap(scale * head(state))."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """The verifier's own, class defaults included."""
    text = text_config(config)
    scale = 1.0
    if text.model_type not in IGNORES_ITS_SCALE:
        for name in MULTIPLIERS:
            scale *= float(getattr(text, name, None) or 1.0)
        divisor = float(getattr(text, DIVISOR, None) or 1.0)
        scale = scale * divisor if text.model_type in MULTIPLIES_BY_DIVISOR else scale / divisor
    softcap = next((cap for name in SOFT_CAPS if (cap := getattr(text, name, None)) is not None), None)
    return LogitTransform(scale, None if softcap is None else float(softcap))


# -- what a drafter takes over -----------------------------------------------------------------------------------------


def resolve_draft_intermediate_size(verifier_config: PretrainedConfig) -> int:
    """MLP width of a draft layer: the verifier's, or 3 x hidden when the verifier has experts instead of one MLP."""
    size = getattr(verifier_config, "intermediate_size", None)
    expert_counts = ("num_experts", "num_local_experts", "n_routed_experts")
    if size and not any(getattr(verifier_config, name, None) for name in expert_counts):
        return int(size)
    size = MLP_RATIO_OF_MOE * verifier_config.hidden_size
    logger.warning("the verifier has no dense MLP to copy: the draft layers get intermediate_size=%d", size)
    return size


def flatten_rope_parameters(rope_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """One set of rope parameters out of one per layer type; draft layers take the sliding layers' set."""
    if not rope_parameters or not all(isinstance(value, dict) for value in rope_parameters.values()):
        return rope_parameters
    return rope_parameters.get("sliding_attention") or next(iter(rope_parameters.values()))


def make_speculators_config(
    algorithm: str, num_tokens: int, verifier: str | None, trust_remote_code: bool = False
) -> SpeculatorsConfig | None:
    """The record of a new drafter: greedy drafts of `num_tokens` per round for `verifier`. None without a verifier."""
    if verifier is None:
        return None
    return SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=num_tokens)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(verifier, trust_remote_code=trust_remote_code),
    )
