"""Targets with their own MTP layers become the draft configs that the contract's table lists."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from speculators.decoding.config import hf_config_override


def config(model_type, architecture="XForCausalLM", **values) -> SimpleNamespace:
    return SimpleNamespace(model_type=model_type, architectures=[architecture], **values)


NEXTN = {"num_nextn_predict_layers": 2}


@pytest.mark.parametrize(
    ("original", "model_type", "architecture", "n_predict"),
    [
        (config("deepseek_v3", **NEXTN), "deepseek_mtp", "DeepSeekMTPModel", 2),
        (config("deepseek_v32", **NEXTN), "deepseek_mtp", "DeepSeekMTPModel", 2),
        (config("glm_moe_dsa"), "deepseek_mtp", "DeepSeekMTPModel", None),
        (config("deepseek_mtp", **NEXTN), "deepseek_mtp", "DeepSeekMTPModel", 2),
        (config("deepseek_v4", **NEXTN), "deepseek_mtp", "DeepSeekV4MTPModel", 2),
        (config("deepseek_v41", **NEXTN), "deepseek_mtp", "XForCausalLM", 2),
        (config("pangu_ultra_moe", **NEXTN), "pangu_ultra_moe_mtp", "OpenPanguMTPModel", 2),
        (config("pangu_ultra_moe_mtp", **NEXTN), "pangu_ultra_moe_mtp", "OpenPanguMTPModel", 2),
        (config("qwen2", "MiMoForCausalLM", **NEXTN), "mimo_mtp", "MiMoMTPModel", 2),
        (config("mimo", "MiMoV2ProForCausalLM"), "mimo_v2_mtp", "MiMoV2MTPModel", 1),
        (config("mimo", "MiMoV2OmniForCausalLM"), "mimo_v2_mtp", "MiMoV2OmniMTPModel", 1),
        (config("mimo", "MiMoV2FlashForCausalLM"), "mimo_v2_mtp", "MiMoV2MTPModel", 1),
        (config("glm4_moe", "Glm4MoeForCausalLM", **NEXTN), "glm4_moe_mtp", "Glm4MoeMTPModel", 2),
        (config("glm4", "Glm4MoeLiteForCausalLM", **NEXTN), "glm4_moe_lite_mtp", "Glm4MoeLiteMTPModel", 2),
        (config("glm_ocr", "GlmOcrForConditionalGeneration", **NEXTN), "glm_ocr_mtp", "GlmOcrMTPModel", 2),
        (config("ernie4_5_moe", **NEXTN), "ernie_mtp", "ErnieMTPModel", 2),
        (config("nemotron_h", **NEXTN), "nemotron_h_mtp", "NemotronHMTPModel", 2),
        (config("nemotron_h_mtp"), "nemotron_h_mtp", "NemotronHMTPModel", 1),
        (config("qwen3_next", **NEXTN), "qwen3_next_mtp", "Qwen3NextMTP", 2),
        (config("exaone_moe", **NEXTN), "exaone_moe_mtp", "ExaoneMoeMTP", 2),
        (config("exaone4_5_vl", **NEXTN), "exaone4_5_mtp", "Exaone4_5_MTP", 2),
        (config("qwen3_5", mtp_num_hidden_layers=3), "qwen3_5_mtp", "Qwen3_5MTP", 3),
        (config("qwen3_5_moe", mtp_num_hidden_layers=3), "qwen3_5_mtp", "Qwen3_5MoeMTP", 3),
        (config("qwen3_5", text_config=SimpleNamespace(mtp_num_hidden_layers=4)), "qwen3_5_mtp", "Qwen3_5MTP", 4),
        (config("longcat_flash"), "longcat_flash_mtp", "LongCatFlashMTPModel", 1),
        (config("step3p5"), "step3p5_mtp", "Step3p5MTP", 1),
        (config("hy_v3", **NEXTN), "hy_v3_mtp", "HYV3MTPModel", 2),
        (config("hy_v4", **NEXTN), "hy_v4_mtp", "HYV4MTPModel", 2),
        (config("bailing_hybrid", **NEXTN), "bailing_hybrid_mtp", "BailingMoeV25MTPModel", 2),
        (config("b", "BailingMoeV3ForCausalLM", **NEXTN), "bailing_hybrid_v3_mtp", "BailingMoeV3MTPModel", 2),
        (config("gemma4_assistant"), "gemma4_mtp", "Gemma4MTPModel", 1),
        (config("minimax_m3_mtp"), "minimax_m3_mtp", "MiniMaxM3MTP", 1),
        (config("kimi_k3", text_config=SimpleNamespace(**NEXTN)), "kimi_k3_mtp", "KimiK3MTPModel", 2),
        (config("dots3_note", layer_types=["full"]), "dots3_note_mtp", "Dots3NoteMTPModel", 1),
        (config("inkling_model", mtp_config={"num_nextn_predict_layers": 3}), "inkling_mtp", "InklingMTPModel", 3),
    ],
)
def test_each_family_becomes_its_draft(original, model_type, architecture, n_predict):
    draft = hf_config_override(original)
    assert (draft.model_type, draft.architectures, draft.n_predict) == (model_type, [architecture], n_predict)


@pytest.mark.parametrize("original", [config("llama"), config("nemotron_h"), config("pangu"), config("qwen3")])
def test_other_configs_are_left_alone(original):
    before = dict(vars(original))
    assert vars(hf_config_override(original)) == before


def test_extras_are_written():
    mimo = hf_config_override(config("qwen2", "MiMoForCausalLM", num_hidden_layers=36, **NEXTN))
    assert mimo.num_hidden_layers == 0
    pro = hf_config_override(config("mimo", "MiMoV2ProForCausalLM", num_hidden_layers=36))
    assert (pro.num_hidden_layers, pro.num_nextn_predict_layers) == (0, 1)
    mistral = hf_config_override(config("mistral", "MistralLarge3ForCausalLM"))
    assert (mistral.model_type, mistral.architectures) == ("mistral", ["EagleMistralLarge3ForCausalLM"])
    dots = config("dots3_note", layer_types=["full"], mtp_layer_types=["a", "b"], num_nextn_predict_layers=2)
    assert hf_config_override(dots).layer_types == ["full", "a", "b"]


def test_wrappers_give_their_text_config():
    inner = config("nemotron_h", "NemotronHForCausalLM", **NEXTN)
    wrapped = config("nemotron_vl", "NemotronH_Super_Omni_Reasoning_V3", text_config=inner)
    assert hf_config_override(wrapped) is inner
    assert inner.model_type == "nemotron_h_mtp"
    step = config("step3p7", text_config=SimpleNamespace(**NEXTN), quantization_config={"bits": 8})
    draft = hf_config_override(step)
    assert (draft.n_predict, draft.quantization_config) == (2, {"bits": 8})


def test_configs_that_cannot_be_drafted_with_say_why():
    with pytest.raises(ValueError, match="has no `architectures`"):
        hf_config_override(SimpleNamespace(model_type="llama", architectures=None))
    with pytest.raises(ValueError, match="must have one entry per MTP layer: got 1 for 2"):
        hf_config_override(config("dots3_note", layer_types=[], mtp_layer_types=["a"], **NEXTN))
    with pytest.raises(ValueError, match="does not contain MTP weights"):
        hf_config_override(config("inkling_model", mtp_config={}))
