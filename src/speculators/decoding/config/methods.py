"""The drafting methods, ours and those of every described release of vLLM, and the facts of each, which the rest of the
config reads instead of naming methods. What one release takes is in `checkpoint/engine_profiles/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from speculators.utils.names import did_you_mean, did_you_mean_path

MtpTypeName = Literal[
    "deepseek_mtp",
    "dots3_note_mtp",
    "mimo_mtp",
    "mimo_v2_mtp",
    "glm4_moe_mtp",
    "glm4_moe_lite_mtp",
    "glm_ocr_mtp",
    "ernie_mtp",
    "nemotron_h_mtp",
    "exaone_moe_mtp",
    "exaone4_5_mtp",
    "qwen3_next_mtp",
    "qwen4_exp_mtp",
    "qwen3_5_mtp",
    "longcat_flash_mtp",
    "bailing_hybrid_mtp",
    "bailing_hybrid_v3_mtp",
    "minimax_m3_mtp",
    "kimi_k3_mtp",
    "pangu_ultra_moe_mtp",
    "step3p5_mtp",
    "step5_mtp",
    "hy_v3_mtp",
    "hy_v4_mtp",
    "gemma4_mtp",
    "inkling_mtp",
    "glm5_next_mtp",
]
"""Accepted as `method` for old files (deprecated: say `mtp`); as a draft's `model_type` they mean MTP."""


def refuse_unknown_method(value: Any) -> Any:
    """Returns a method's name as it is. Raises `ValueError`, with the nearest names, for a text that is no method."""
    if isinstance(value, str) and value not in METHODS and value not in MTP_TYPE_NAMES:
        near_path = did_you_mean_path(value) if "/" in value else ""  # any folder here is near some short word
        hint = did_you_mean(value, ["none", *METHODS]) or near_path
        raise ValueError(
            f"{value!r} is no method, and no such directory exists.{hint} There are: none, {', '.join(METHODS)}, "
            "or a speculator's directory"
        )
    return value


MethodName = Literal[
    "ngram",
    "ngram_gpu",
    "suffix",
    "custom_class",
    "early_exit",
    "extract_hidden_states",
    "draft_model",
    "medusa",
    "mlp_speculator",
    "eagle",
    "eagle3",
    "dflash",
    "dspark",
    "mtp",
    MtpTypeName,
]
Method = Annotated[MethodName, BeforeValidator(refuse_unknown_method)]

MTP_TYPE_NAMES = frozenset(get_args(MtpTypeName))


@dataclass(frozen=True)
class MethodFacts:
    """The facts of a drafting method that the config reads."""

    has_network: bool = True
    """Drafts with its own weights: a draft model config is made for it."""
    model_defaults_to_method: bool = False
    """`model` may be left out and becomes the method's name."""
    model_defaults_to_target: bool = False
    """`model` may be left out and becomes the target checkpoint."""
    own_drafter_in: frozenset[str] = frozenset()
    """Types of targets that may contain such a drafter; empty: recognised in the target's config by other means."""
    reads_states: bool = False
    """Drafts from the verifier's hidden states (vLLM: "eagle-like")."""
    reads_aux_states: bool = False
    """Among them intermediate layers, which changes the verifier's computation graph."""
    is_parallel: bool = False
    """All tokens in one pass, always."""
    detect_by_name: tuple[str, ...] = ()
    """Parts of a lower-cased model name that mean this method when none is given."""
    detect_by_model_type: frozenset[str] = frozenset()
    detect_by_architecture: frozenset[str] = frozenset()
    draft_prefix: str = ""
    """A foreign draft is served under its architecture's name behind this, as an EAGLE config."""


METHODS: dict[str, MethodFacts] = {
    "ngram": MethodFacts(has_network=False, model_defaults_to_method=True),
    "ngram_gpu": MethodFacts(has_network=False, model_defaults_to_method=True),
    "suffix": MethodFacts(has_network=False, model_defaults_to_method=True),
    "custom_class": MethodFacts(has_network=False),
    "early_exit": MethodFacts(has_network=False, model_defaults_to_method=True),
    "extract_hidden_states": MethodFacts(has_network=False, model_defaults_to_method=True, reads_aux_states=True),
    # In the order in which a draft checkpoint is recognised.
    "eagle": MethodFacts(reads_states=True, detect_by_name=("eagle-",), draft_prefix="Eagle"),
    "eagle3": MethodFacts(reads_states=True, reads_aux_states=True, detect_by_name=("eagle3",), draft_prefix="Eagle3"),
    "dflash": MethodFacts(
        reads_states=True,
        reads_aux_states=True,
        is_parallel=True,
        detect_by_name=("dflash",),
        detect_by_architecture=frozenset({"MuseGlimmerAssistantModel"}),
        draft_prefix="DFlash",
    ),
    "dspark": MethodFacts(
        model_defaults_to_target=True,
        own_drafter_in=frozenset({"deepseek_v4", "deepseek_v41"}),
        reads_states=True,
        reads_aux_states=True,
        is_parallel=True,
        detect_by_name=("dspark",),
        detect_by_architecture=frozenset({"Qwen3DSparkModel", "Qwen3OmniDSparkModel", "Gemma4DSparkModel"}),
    ),
    "medusa": MethodFacts(detect_by_model_type=frozenset({"medusa"})),
    "mlp_speculator": MethodFacts(detect_by_model_type=frozenset({"mlp_speculator"})),
    "mtp": MethodFacts(model_defaults_to_target=True, reads_states=True, detect_by_model_type=MTP_TYPE_NAMES | {"mtp"}),
    "draft_model": MethodFacts(),
}


def facts_of(method: str) -> MethodFacts:
    return METHODS["mtp" if method in MTP_TYPE_NAMES else method]


RENAMED_DRAFTS = {("qwen3", "DSparkDraftModel"): "Qwen3DSparkModel"}
"""(model_type, architecture) of drafts whose architecture has been renamed, with the new name."""
TARGETS_WITHOUT_MTP = {"deepseek_v41": "dspark"}
"""Model types of targets that seem to ship MTP layers but do not, with the method that drafts with what they ship."""
LAYER_FOR_EACH_TOKEN = frozenset({"step3p5_mtp", "step5_mtp", "inkling_mtp"})
"""MTP drafts that have a separate layer for each token."""

METHODS_WITH_A_MODEL_TYPE = frozenset({"medusa", "mlp_speculator", "mtp"})
"""Given explicitly, these need a draft of their own `model_type`."""

SPECULATORS_METHODS: dict[str, dict[str, object]] = {
    "eagle": {"method": "eagle"},
    "eagle3": {"method": "eagle3"},
    "peagle": {"method": "eagle3", "parallel_drafting": True},
    "dflash": {"method": "dflash"},
    "dflash2": {"method": "dflash"},
    "dspark": {"method": "dspark"},
    "mtp": {"method": "mtp"},
    "mlp": {"method": "mlp_speculator"},
    "medusa": {"method": "medusa"},
}
"""`speculators_model_type` of a checkpoint -> the method that drafts with it."""

ATTENTION_BACKENDS = (
    "FLASH_ATTN",
    "FLASH_ATTN_DIFFKV",
    "TRITON_ATTN",
    "TRITON_ATTN_DIFFKV",
    "TRITON_FLASH_ATTN",
    "ROCM_ATTN",
    "ROCM_SEGMENTED_ATTN",
    "ROCM_AITER_MLA",
    "ROCM_AITER_TRITON_MLA",
    "ROCM_AITER_FA",
    "ROCM_AITER_MLA_SPARSE",
    "XPU_MLA_SPARSE",
    "TORCH_SDPA",
    "FLASHINFER",
    "TRITON_FLASHINFER",
    "FLASHINFER_MLA",
    "TOKENSPEED_MLA",
    "FLASHINFER_MLA_SPARSE",
    "FLASHINFER_MLA_SPARSE_SM120",
    "FLASHINFER_MLA_SPARSE_SM90",
    "TRITON_MLA",
    "CUTLASS_MLA",
    "FLASHMLA",
    "FLASHMLA_SPARSE",
    "FLASHMLA_SPARSE_DSV4",
    "FLASHINFER_MLA_SPARSE_DSV4",
    "ROCM_FLASHMLA_SPARSE_DSV4",
    "FLASHMLA_SPARSE_DSV41",
    "FLASHINFER_MLA_SPARSE_DSV41",
    "FLASHMLA_MEGA_ATTN_DSV41",
    "B12X",
    "FLASH_ATTN_MLA",
    "FLASH_ATTN_MLA_SPARSE",
    "MINIMAX_M3_SPARSE",
    "CUTLASS_MSA",
    "TRITON_MSA",
    "NO_ATTENTION",
    "FLEX_ATTENTION",
    "HPC_ATTN",
    "ROCM_AITER_UNIFIED_ATTN",
    "CPU_ATTN",
    "CPU_MLA",
    "AMX_MLA",
    "TURBOQUANT",
    "ULTRAQUANT",
    "CUSTOM",
)
"""Names that vLLM 0.32 knows; ours ignores the setting."""

METHODS_THAT_NEED_AUX_STATES = ("eagle3", "extract_hidden_states", "dflash")
