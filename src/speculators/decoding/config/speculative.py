"""`SpeculativeConfig`: what to draft with and how to verify. Life cycle, in this order, as in vLLM:

    1. types and ranges of the fields (unknown keys are errors)
    2. inference: method, model, defaults, draft config      (`infer.py`, in `model_post_init`)
    3. checks of the whole                                   (`checks.py`)

A config can be made without engine objects; `with_target` resolves the same user input against a verifier. A
`ValueError` reaches the caller as pydantic's `ValidationError`, which is one. The meaning of each field follows vLLM;
fields that only a server can honour are carried so that a JSON written for vLLM passes through unchanged.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from speculators.decoding.config import engine_settings, mtp_families
from speculators.decoding.config.checks import BatchSizeRange, check, scheduled_num_tokens
from speculators.decoding.config.draft import lookup, naming_the_guess
from speculators.decoding.config.infer import infer
from speculators.decoding.config.methods import METHODS, Method
from speculators.decoding.trees.dynamic_tree import DynamicTreeShape
from speculators.decoding.trees.token_tree import TokenTree
from speculators.decoding.verification import resolve_rule
from speculators.interfaces import AcceptanceRule
from speculators.utils.readable import ReadableModel
from speculators.utils.util import reading

RejectionSampleMethod = Literal["strict", "probabilistic", "standard", "block", "synthetic", "fly"]


class SpeculativeConfig(ReadableModel):
    """Configures drafting. See the module's docstring for what happens when."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    retired_keys: ClassVar = engine_settings.RETIRED_SETTINGS

    # What to draft with
    num_speculative_tokens: int | None = Field(default=None, gt=0, le=65_536)
    """Draft tokens per round (K). None: derived from the draft (its n_predict or proposal method) where it says."""
    model: str | None = None
    """Draft model, head or weights: a path or hub id; a speculators checkpoint says its own method and K."""
    method: Method | None = None
    """None: recognised from `model`."""
    parallel_drafting: bool = False
    """All K tokens in one pass (P-EAGLE, PARD); always so for the block drafters."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Sequences longer than this get no drafts."""
    revision: str | None = None
    code_revision: str | None = None
    quantization: str | None = None
    use_heterogeneous_vocab: bool = False
    """Draft model with another tokenizer: drafts are restricted to the tokens both have."""
    early_exit_layer: int | None = Field(default=None, ge=1)
    """method `early_exit`: how many of the verifier's first layers draft. Ours alone."""
    num_speculative_tokens_per_batch_size: list[BatchSizeRange] | None = None
    """(first batch size, last batch size, K), inclusive: K by how many requests run."""
    enable_adaptive_verification: bool = False
    """Choose how many drafts to verify each round from their confidence and the measured cost."""

    # How to verify
    rejection_sample_method: RejectionSampleMethod = "strict"
    """strict: a draft must equal the verifier's own sample; probabilistic or standard: rejection sampling; block: block
    verification; synthetic: prescribed acceptance, fly: vLLM's (both lossy). `probabilistic` draws the drafts too."""
    draft_sample_method: Literal["greedy", "probabilistic"] = "greedy"
    """How drafts are chosen: the draft's argmax (a point mass), or drawn from its distribution."""
    synthetic_acceptance_rates: list[float] | None = None
    """r_i = P(drafts 0..i all accepted), non-increasing."""
    synthetic_acceptance_length: float | None = None
    """Mean acceptance length instead, in [1, K + 1]; turned into rates of least variance."""
    speculative_token_tree: str | None = None
    """Tree of draft tokens as a Python literal: paths of child ranks. None: a chain. It gives `num_speculative_tokens`
    where that is left out: its depth."""
    dynamic_tree: DynamicTreeShape | None = None
    """EAGLE-2: grow the tree anew each round from what the draft finds likely. true: its defaults. Ours alone."""
    verifier_accept_k: int | None = Field(default=None, ge=1)
    accept_tolerance: float | None = Field(default=None, ge=0)
    """Leniency of greedy decoding, NOT lossless (unless k = 1 or tolerance = 0): accept drafts among the verifier's k
    best, at most this far below its best in log-likelihood. Ours alone, and only when set here: a checkpoint's own
    values are not applied by themselves."""

    # n-gram and suffix drafters
    prompt_lookup_max: int | None = Field(default=None, ge=1)
    prompt_lookup_min: int | None = Field(default=None, ge=1)
    suffix_decoding_max_tree_depth: int = 24
    """Longest match plus draft that is remembered."""
    suffix_decoding_max_cached_requests: int = 10000
    """Past responses kept, oldest dropped first; 0: only the request's own text."""
    suffix_decoding_max_spec_factor: float = 1.0
    """Draft at most this times the length of the match."""
    suffix_decoding_min_token_prob: float = 0.1

    # For servers
    enforce_eager: bool | None = None
    draft_tensor_parallel_size: int | None = Field(default=None, ge=1)
    tensor_parallel_size: int | None = None
    """Refused: the setting is `draft_tensor_parallel_size`."""
    moe_backend: str | None = None
    attention_backend: str | None = None
    kv_cache_dtype: str | None = None
    disable_padded_drafter_batch: bool = False
    disable_eagle_block_drop: bool = False
    use_local_argmax_reduction: bool = False
    index_share_for_mtp_iteration: bool | None = None
    dspark_draft_topk: int | None = Field(default=None, ge=1)
    xpress_topc: int | None = Field(default=None, ge=0)
    fly_window_size: int | None = Field(default=None, ge=1)
    fly_entropy_threshold: float = Field(default=0.3, ge=0)
    fly_entropy_top_k: int = Field(default=3, ge=1)
    draft_lm_head_quantization: Literal["fp8", "nvfp4"] | None = None
    disable_lookahead_block_hashes: bool = False
    draft_load_config: Any = None

    # Supplied by the engine, or derived
    target_model_config: Any = Field(default=None, repr=False, exclude=True)
    target_parallel_config: Any = Field(default=None, repr=False, exclude=True)
    draft_model_config: Any = Field(default=None, repr=False, exclude=True)
    draft_parallel_config: Any = Field(default=None, repr=False, exclude=True)

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("dynamic_tree", mode="before")
    @classmethod
    def _parse_dynamic_tree(cls, value: Any) -> Any:
        return (DynamicTreeShape() if value else None) if isinstance(value, bool) else value

    @field_validator("attention_backend", mode="before")
    @classmethod
    def _parse_attention_backend(cls, value: Any) -> Any:
        return engine_settings.attention_backend(value)

    def model_post_init(self, context: Any) -> None:
        given = {name: getattr(self, name) for name in self.model_fields_set}
        self._given = {name: value for name, value in given.items() if value is not None}
        reading("the speculative config or its draft")(infer)(self)

    @model_validator(mode="after")
    def _verify_args(self) -> SpeculativeConfig:
        for rules in (check, engine_settings.check_engine_settings):
            with naming_the_guess(self), reading("the speculative config or its draft"):
                rules(self)
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The user's settings, before anything was inferred."""
        return dict(self._given)

    @classmethod
    def from_vllm_json(cls, text: str, **engine: Any) -> SpeculativeConfig:
        """From the value of `--speculative-config`; `engine` may give target_model_config and the like."""
        return cls(**engine_settings.parse_settings(text), **engine)

    def with_target(self, target_model_config: Any, target_parallel_config: Any = None) -> SpeculativeConfig:
        """The same user input resolved against a verifier."""
        given = {name: value for name, value in self._given.items() if not name.startswith("target_")}
        return type(self)(
            **given, target_model_config=target_model_config, target_parallel_config=target_parallel_config
        )

    def to_vllm_json(self, version: str | None = None, *, drop_unsupported: bool = False) -> str:
        """The value for `vllm serve --speculative-config` of a release ("0.33"; None: the newest that our tests run).

        What it would not accept is an error that names each setting; with `drop_unsupported` it is left out.
        """
        settings, unsupported = engine_settings.vllm_settings(self, version)
        if unsupported and not drop_unsupported:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in unsupported.items())
            raise ValueError(f"vLLM would not accept {reasons}. Pass drop_unsupported=True to leave these out")
        return json.dumps(settings)

    def vllm_unsupported(self, version: str | None = None) -> dict[str, str]:
        """Settings that a release of vLLM would not accept, and why."""
        return engine_settings.vllm_settings(self, version)[1]

    def acceptance_rule(self) -> AcceptanceRule:
        """The rule that this config verifies with."""
        if self.is_lenient:
            leniency = {"verifier_accept_k": self.verifier_accept_k, "accept_tolerance": self.accept_tolerance}
            return resolve_rule("tolerance", **leniency)
        if self.rejection_sample_method == "synthetic":
            return resolve_rule("synthetic", acceptance_rates=tuple(self.synthetic_acceptance_rates or ()))
        if self.rejection_sample_method == "fly":
            raise ValueError("rejection_sample_method='fly' is lossy, and vLLM's alone; decode here with 'standard'")
        return resolve_rule(self.rejection_sample_method)

    @property
    def is_lenient(self) -> bool:
        """Whether tokens other than the verifier's best are accepted; if not, sampled requests can be decoded too."""
        return (self.verifier_accept_k or 1) > 1 and (self.accept_tolerance or 0.0) > 0

    @property
    def draws_drafts(self) -> bool:
        """Whether drafts are drawn from the draft's distribution (else its argmax)."""
        if self.rejection_sample_method in ("strict", "probabilistic"):
            return self.rejection_sample_method == "probabilistic"
        return self.draft_sample_method == "probabilistic"

    @property
    def token_tree(self) -> TokenTree | None:
        """The user's tree; None: a chain."""
        tree = self.given.get("speculative_token_tree")
        tree = TokenTree.parse(tree) if tree is not None else None
        return None if tree is None or tree.is_chain else tree

    @property
    def max_depth(self) -> int:
        """Draft tokens on the longest path of a round."""
        assert self.num_speculative_tokens is not None
        if self.dynamic_tree is not None:
            return min(self.num_speculative_tokens, self.dynamic_tree.max_depth)
        tree = self.given.get("speculative_token_tree")
        return min(self.num_speculative_tokens, TokenTree.parse(tree).depth) if tree else self.num_speculative_tokens

    def num_tokens_at(self, batch_size: int) -> int:
        """K at a batch size, by the schedule if there is one."""
        if self.num_speculative_tokens_per_batch_size is None:
            return self.max_depth
        return scheduled_num_tokens(self.num_speculative_tokens_per_batch_size, batch_size, self.max_depth)

    hf_config_override = staticmethod(mtp_families.hf_config_override)

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """Positions a request needs for drafting beyond those of its own tokens."""
        assert self.num_speculative_tokens is not None
        slots = self.num_speculative_tokens - 1 if self.parallel_drafting else 0
        return slots + 1 if self.uses_draft_model() else slots

    def use_eagle(self) -> bool:
        return self.method is not None and METHODS[self.method].reads_states

    def use_eagle_block_drop(self) -> bool:
        return self.use_eagle() and not self.disable_eagle_block_drop

    def use_dflash(self) -> bool:
        return self.method == "dflash"

    def is_xpress(self) -> bool:
        names = self._draft_value("architectures") or []
        return self.use_dflash() and not engine_settings.HAS_XPRESS.isdisjoint(names)

    def use_dspark(self) -> bool:
        return self.method == "dspark"

    def use_ngram(self) -> bool:
        return self.method in ("ngram", "ngram_gpu")

    def use_ngram_gpu(self) -> bool:
        return self.method == "ngram_gpu"

    def uses_draft_model(self) -> bool:
        return self.method == "draft_model"

    def uses_extract_hidden_states(self) -> bool:
        return self.method == "extract_hidden_states"

    def uses_draft_kv_cache(self) -> bool:
        return self.use_eagle() or self.uses_draft_model() or self.uses_extract_hidden_states()

    def uses_dynamic_speculative_decoding(self) -> bool:
        return self.num_speculative_tokens_per_batch_size is not None

    def use_gemma4_mtp(self) -> bool:
        return self.method == "mtp" and self._draft_value("model_type") == "gemma4_mtp"

    def use_step3p5_mtp(self) -> bool:
        return self.method == "mtp" and self._draft_value("model_type") == "step3p5_mtp"

    def use_multi_module_mtp(self) -> bool:
        if self.method != "mtp" or self.draft_model_config is None:
            return False
        return min(self._draft_value("num_nextn_predict_layers", 1), self.num_speculative_tokens or 1) > 1

    def compute_hash(self) -> str:
        """Changes when the verifier's computation graph does: with the hidden states it must return."""
        return engine_settings.computation_hash(self)

    def _draft_value(self, name: str, default: Any = None) -> Any:
        return lookup(self.draft_model_config, f"hf_config.{name}", default)

    def __repr__(self) -> str:
        hides_model = self.method in ("ngram", "suffix", "extract_hidden_states", "custom_class")
        method, num_spec_tokens = self.method, self.num_speculative_tokens
        model = None if hides_model else lookup(self.draft_model_config, "model", self.model)
        return f"SpeculativeConfig({method=}, {model=}, {num_spec_tokens=})"

    __str__ = __repr__
