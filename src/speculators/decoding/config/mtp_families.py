"""Draft configs for targets that ship their own MTP layers. One row per family, first match wins.

`n_predict` paths are tried in order on the config (dots descend); the last resort is `n_predict_default`. Where vLLM
0.32 renamed a row's architecture, ours keeps the contract's name and the comment gives the newer one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from speculators.decoding.config.draft import architectures_of, lookup
from speculators.verifier.config import text_config


@dataclass(frozen=True)
class MtpFamily:
    """One row: the targets that match it, and the draft config that they get."""

    model_type: str
    architecture: str | None
    types: tuple[str, ...] = ()
    """Model types that trigger the row, exactly. Its own is listed where a draft may come with it already."""
    type_part: str = ""
    """Model types that contain this trigger it too."""
    architectures: tuple[str, ...] = ()
    """Values of `architectures[0]` that trigger it."""
    n_predict: tuple[str, ...] = ("num_nextn_predict_layers",)
    n_predict_default: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    uses_text_config: bool = False
    """The draft config is the target's `text_config`, promoted."""
    adjust: Callable[[Any, Any], dict[str, Any]] | None = None
    """(original, draft config) -> further values, for what a table cannot say."""
    needs_n_predict: bool = False
    """The row applies only to configs that have MTP layers."""


def _dots3_layer_types(original: Any, draft: Any) -> dict[str, Any]:
    num_layers = lookup(original, "num_nextn_predict_layers", 1)
    layer_types = lookup(original, "mtp_layer_types", ["sliding_attention"] * num_layers)
    if len(layer_types) != num_layers:
        raise ValueError(
            f"mtp_layer_types must have one entry per MTP layer: got {len(layer_types)} for {num_layers} layers"
        )
    return {"layer_types": [*lookup(original, "layer_types", []), *layer_types]}


def _shared_index(original: Any, draft: Any) -> dict[str, Any]:
    shares = lookup(text_config(original), "index_share_for_mtp_iteration", False)
    return {"index_share_for_mtp_iteration": shares}


def _qwen4_feedback(original: Any, draft: Any) -> dict[str, Any]:
    return {"hc_mult": int(lookup(text_config(original), "hc_count", 1)), **_shared_index(original, draft)}


def _inkling_depths(original: Any, draft: Any) -> dict[str, Any]:
    mtp_config = lookup(original, "mtp_config", {})
    depths = lookup(mtp_config, "num_nextn_predict_layers", 0)
    if depths < 1:
        raise ValueError(
            "The Inkling checkpoint does not contain MTP weights (mtp_config.num_nextn_predict_layers < 1)"
        )
    return {
        "n_predict": depths,
        "num_nextn_predict_layers": depths,
        "chain_hidden_post_norm": lookup(mtp_config, "chain_hidden_post_norm", False),
        "local_layer_ids": lookup(mtp_config, "local_layer_ids", []),
    }


def _gemma_own_kv(original: Any, draft: Any) -> dict[str, Any]:
    text = text_config(draft)
    if lookup(text, "num_kv_shared_layers") is not None:
        text.num_kv_shared_layers = 0  # sharing with the target is set up after the draft is built
    return {}


def _interns_experts(original: Any, draft: Any) -> dict[str, Any]:
    text = text_config(draft)
    text.model_type = "qwen3_5_moe_text"
    text.num_experts = text.mtp_num_experts
    text.num_experts_per_tok = text.mtp_num_experts_per_tok
    return {}


_MTP_LAYERS = ("mtp_num_hidden_layers", "text_config.mtp_num_hidden_layers")
_NO_LAYERS = {"num_hidden_layers": 0}
_ONE_LAYER = {"num_hidden_layers": 0, "num_nextn_predict_layers": 1}
F = MtpFamily

MTP_FAMILIES: tuple[MtpFamily, ...] = (
    F("dots3_note_mtp", "Dots3NoteMTPModel", ("dots3_note",), n_predict_default=1, adjust=_dots3_layer_types),
    # vLLM 0.32: DeepseekV32MTPModel for deepseek_v32 and glm_moe_dsa
    F("deepseek_mtp", "DeepSeekMTPModel", ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "deepseek_mtp")),
    F("deepseek_mtp", "DeepSeekV4MTPModel", ("deepseek_v4",)),
    F("deepseek_mtp", None, ("deepseek_v41",)),
    F("pangu_ultra_moe_mtp", "OpenPanguMTPModel", ("pangu_ultra_moe", "pangu_ultra_moe_mtp")),
    F(
        "kimi_k3_mtp",
        "KimiK3MTPModel",
        ("kimi_k3",),
        n_predict=("text_config.num_nextn_predict_layers", "num_nextn_predict_layers"),
    ),
    F("mimo_mtp", "MiMoMTPModel", architectures=("MiMoForCausalLM",), extra=_NO_LAYERS),
    F(
        "mimo_v2_mtp",
        "MiMoV2MTPModel",
        architectures=("MiMoV2ForCausalLM", "MiMoV2ProForCausalLM", "MiMoV2FlashForCausalLM"),
        n_predict=(),
        n_predict_default=1,
        extra=_ONE_LAYER,
    ),
    F(
        "mimo_v2_mtp",
        "MiMoV2OmniMTPModel",
        architectures=("MiMoV2OmniForCausalLM",),
        n_predict=(),
        n_predict_default=1,
        extra=_ONE_LAYER,
    ),
    F("glm4_moe_mtp", "Glm4MoeMTPModel", architectures=("Glm4MoeForCausalLM",)),
    F("glm4_moe_lite_mtp", "Glm4MoeLiteMTPModel", architectures=("Glm4MoeLiteForCausalLM",), extra=_NO_LAYERS),
    F("glm_ocr_mtp", "GlmOcrMTPModel", architectures=("GlmOcrForConditionalGeneration",), extra=_NO_LAYERS),
    F("ernie_mtp", "ErnieMTPModel", ("ernie4_5_moe", "ernie_mtp")),
    F(
        "nemotron_h_mtp",
        "NemotronHMTPModel",
        ("nemotron_h", "nemotron_h_puzzle", "nemotron_h_mtp"),
        n_predict_default=1,
        needs_n_predict=True,
    ),
    F("qwen3_next_mtp", "Qwen3NextMTP", ("qwen3_next", "qwen3_next_mtp")),
    F(
        "qwen4_exp_mtp",
        "Qwen4ExpMTP",
        ("qwen4_exp", "qwen4_exp_text", "qwen4_exp_mtp"),
        n_predict=(*_MTP_LAYERS, "num_nextn_predict_layers", "text_config.num_nextn_predict_layers"),
        adjust=_qwen4_feedback,
    ),
    F(
        "bailing_hybrid_v3_mtp",
        "BailingMoeV3MTPModel",
        architectures=("BailingMoeV3VLForConditionalGeneration",),
        uses_text_config=True,
    ),
    F(
        "bailing_hybrid_v3_mtp",
        "BailingMoeV3MTPModel",
        ("bailing_hybrid_v3_mtp",),
        architectures=("BailingMoeV3ForCausalLM",),
    ),
    F(
        "bailing_hybrid_mtp",
        "BailingMoeV25MTPModel",
        ("bailing_hybrid", "bailing_hybrid_mtp"),
        architectures=("BailingMoeV2_5ForCausalLM",),
    ),
    F("exaone_moe_mtp", "ExaoneMoeMTP", ("exaone_moe", "exaone_moe_mtp")),
    F("exaone4_5_mtp", "Exaone4_5_MTP", type_part="exaone4_5"),
    F("qwen3_5_mtp", "Qwen3_5MTP", ("qwen3_5", "qwen3_5_text"), n_predict=_MTP_LAYERS),
    F("qwen3_5_mtp", "Qwen3_5MoeMTP", ("qwen3_5_moe", "qwen3_5_moe_text"), n_predict=_MTP_LAYERS),
    F("qwen3_5_mtp", "InternS2MobiusMTP", ("interns2_mobius",), n_predict=_MTP_LAYERS[1:], adjust=_interns_experts),
    F("longcat_flash_mtp", "LongCatFlashMTPModel", ("longcat_flash",), n_predict_default=1),
    F(
        "step3p5_mtp",
        "Step3p5MTP",
        ("step3p5", "step3p7"),
        architectures=("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),
        n_predict_default=1,
        uses_text_config=True,
    ),
    F(  # vLLM 0.33
        "step5_mtp",
        "Step5MTP",
        ("step5", "step5_vl"),
        architectures=("Step5ForCausalLM", "Step5ForConditionalGeneration"),
        n_predict_default=1,
        uses_text_config=True,
    ),
    F("hy_v3_mtp", "HYV3MTPModel", ("hy_v3",)),
    F("hy_v4_mtp", "HYV4MTPModel", ("hy_v4",)),
    F(
        "inkling_mtp",
        "InklingMTPModel",
        ("inkling_mm_model", "inkling_model"),
        uses_text_config=True,
        adjust=_inkling_depths,
    ),
    F(
        "gemma4_mtp",
        "Gemma4MTPModel",
        ("gemma4_assistant", "gemma4_unified_assistant"),
        n_predict=(),
        n_predict_default=1,
        adjust=_gemma_own_kv,
    ),
    F(
        "minimax_m3_mtp",
        "MiniMaxM3MTP",
        ("minimax_m3_vl",),
        architectures=("MiniMaxM3SparseForConditionalGeneration",),
        n_predict=("num_mtp_modules",),
        n_predict_default=1,
        uses_text_config=True,
    ),
    F(
        "minimax_m3_mtp",
        "MiniMaxM3MTP",
        ("minimax_m3_mtp",),
        architectures=("MiniMaxM3MTP",),
        n_predict=("num_mtp_modules",),
        n_predict_default=1,
    ),
    F(
        "glm5_next_mtp",
        "Glm5NextMTPModel",
        ("glm5_next",),
        n_predict=("text_config.num_nextn_predict_layers", "num_nextn_predict_layers"),
        adjust=_shared_index,
    ),
)

PROMOTED_WRAPPERS = ("NemotronH_Super_Omni_Reasoning_V3", "NemotronH_Omni_Reasoning_V3")
"""Architectures that are looked up by their `text_config`."""
RENAMED_ARCHITECTURES = {"MistralLarge3ForCausalLM": "EagleMistralLarge3ForCausalLM"}


def hf_config_override(hf_config: Any) -> Any:
    """The draft config of a target (or draft) config: changed in place, or its promoted `text_config`."""
    architectures = architectures_of(hf_config)
    if not architectures:
        raise ValueError(
            f"the draft's config (model_type={lookup(hf_config, 'model_type')!r}) has no `architectures`; its first "
            f"entry decides how the draft is built, so add it to config.json"
        )
    if architectures[0] in RENAMED_ARCHITECTURES:
        hf_config.architectures = [RENAMED_ARCHITECTURES[architectures[0]]]
        return hf_config
    if architectures[0] in PROMOTED_WRAPPERS:
        hf_config = text_config(hf_config)
    if _is_interns_preview(hf_config):
        return _apply(_interns_preview_row(hf_config), hf_config)
    for family in MTP_FAMILIES:
        if _matches(family, hf_config, architectures[0]):
            return _apply(family, hf_config)
    return hf_config


def n_predict_of(family: MtpFamily, hf_config: Any) -> int | None:
    for path in family.n_predict:
        value = lookup(hf_config, path)
        if value is not None:
            return value
    return family.n_predict_default


def _matches(family: MtpFamily, hf_config: Any, architecture: str) -> bool:
    model_type = lookup(hf_config, "model_type", "")
    if family.needs_n_predict and model_type != family.model_type and not lookup(hf_config, family.n_predict[0]):
        return False
    is_part = bool(family.type_part) and family.type_part in model_type
    return is_part or model_type in family.types or architecture in family.architectures


def _apply(family: MtpFamily, hf_config: Any) -> Any:
    draft = text_config(hf_config) if family.uses_text_config else hf_config
    if draft is not hf_config and lookup(draft, "quantization_config") is None:
        quantization = lookup(hf_config, "quantization_config")
        if quantization is not None:
            draft.quantization_config = quantization
    values = {"n_predict": n_predict_of(family, draft), **family.extra}
    values |= family.adjust(hf_config, draft) if family.adjust else {}
    draft.model_type = family.model_type
    if family.architecture is not None:
        draft.architectures = [family.architecture]
    for name, value in values.items():
        setattr(draft, name, value)
    return draft


def _is_interns_preview(hf_config: Any) -> bool:
    return lookup(hf_config, "model_type") == "intern_s2_preview"


def _interns_preview_row(hf_config: Any) -> MtpFamily:
    is_moe = lookup(hf_config, "text_config.model_type") == "qwen3_5_moe_text"
    return F("qwen3_5_mtp", "Qwen3_5MoeMTP" if is_moe else "Qwen3_5MTP", n_predict=_MTP_LAYERS[1:])
