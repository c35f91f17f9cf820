"""The MTP network: a verifier state and the next token in, the state of the next position out, through one decoder
layer of the verifier's own shape. Training and decoding call the same step.

Shapes: B rows, T positions in, R query positions (see `AttentionFunction.select_queries`), H hidden size, V vocabulary.

    f_t = final norm of the verifier's state y_t             what engines feed: the model's output (MiMo: y_t itself)
    step:  (token x_{t+1}, f_t) --> layer --> out --> final_layernorm --> lm_head --> predicts x_{t+2}
           fed back as the next f: the normed state (GLM: the state before the norm)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from speculators.models.feedback_proposer import StepOutput
from speculators.models.mtp.decoder_modules import GatedAttention, GroupRoutedMLP, LatentAttention, SparseMLP
from speculators.models.mtp.families import MTPFamily
from speculators.nn.attention import Attention, AttentionFunction
from speculators.nn.decoder import MLP, DecoderLayer
from speculators.nn.norms import RMSNorm, RMSNormPlusOne
from speculators.nn.rope import Rope, RopeTables, head_dim

LATENT_KEYS = (
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "rope_parameters",
    "rope_scaling",
)
NO_TOKEN = -1
"""In place of a token: its embedding is zero."""


class DecoderShape(NamedTuple):
    """Differences between the decoder layers of verifiers."""

    like: str
    """The shape of `nn.attention` it comes closest to: llama, or qwen3 with its norms on q and k."""
    always_biased: bool = False
    """q, k and v have a bias whatever the config says."""
    output_biased: bool | None = None
    """Whether a biased attention has one on its output too; None: as `like` does."""
    qk_norm_key: str | None = None
    """The config's key that says whether q and k are normed; without, it comes closest to llama."""
    attention: type[nn.Module] | None = None
    """In place of plain attention."""
    mlp: type[nn.Module] | None = None
    """In place of one MLP that every token takes."""
    unit_offset_norms: bool = False
    """Norms multiply by 1 + w."""


QWEN2 = DecoderShape("llama", always_biased=True, output_biased=False)
QWEN_HYBRID = DecoderShape("qwen3", attention=GatedAttention, unit_offset_norms=True)
DECODERS = {
    "llama": DecoderShape("llama"),
    "qwen2": QWEN2,
    "mimo": QWEN2,
    "qwen3": DecoderShape("qwen3"),
    "qwen3_next": QWEN_HYBRID._replace(mlp=SparseMLP),
    "qwen3_5_text": QWEN_HYBRID,
    "qwen3_5_moe_text": QWEN_HYBRID._replace(mlp=SparseMLP),
    "glm4_moe": DecoderShape("qwen3", output_biased=False, qk_norm_key="use_qk_norm", mlp=GroupRoutedMLP),
    "deepseek_v3": DecoderShape("llama", attention=LatentAttention, mlp=GroupRoutedMLP),
}
"""Verifiers (model_type of the text config) whose decoder layer exists here. Of layers that differ by depth it is the
last kind: full attention, experts."""


class MTPLayer(DecoderLayer):
    """Decoder layer behind a projection of two normed inputs, with a norm of its own at the end."""

    def __init__(self, config: Any, family: MTPFamily):
        shape = decoder_shape(config)
        view = decoder_view(config, shape)
        super().__init__(view)
        o_proj = self.self_attn.o_proj
        if shape.output_biased is False and o_proj.bias is not None:
            self.self_attn.o_proj = nn.Linear(o_proj.in_features, o_proj.out_features, bias=False)
        if shape.attention is not None:
            self.self_attn = shape.attention(view)  # type: ignore[assignment]
        if shape.mlp is not None:
            self.mlp = shape.mlp(config)  # type: ignore[assignment]
        size, eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = RMSNorm(size, eps)
        self.hidden_layernorm = RMSNorm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.final_layernorm = RMSNorm(size, eps)
        self.feeds_back_raw = family.feeds_back_raw
        if shape.unit_offset_norms:
            use_unit_offset_norms(self)

    def forward(  # type: ignore[override]
        self, embeds_BTH: Tensor, hidden_BTH: Tensor, rope: RopeTables, attention: AttentionFunction
    ) -> tuple[Tensor, Tensor]:
        """Returns the input of the head and the hidden state of the next step."""
        both_BT2H = torch.cat((self.token_layernorm(embeds_BTH), self.hidden_layernorm(hidden_BTH)), dim=-1)
        raw_BRH = super().forward(self.input_proj(both_BT2H), rope, attention)
        normed_BRH = self.final_layernorm(raw_BRH)
        return normed_BRH, raw_BRH if self.feeds_back_raw else normed_BRH

    def fused(self) -> Self:
        """Returns a copy for decoding, with products fused where possible."""
        twin = copy.deepcopy(self).requires_grad_(False)
        for name in ("self_attn", "mlp"):
            module = getattr(twin, name)
            if isinstance(module, Attention | MLP):
                twin._modules[name] = module.fused()
        return twin


def use_unit_offset_norms(layer: nn.Module) -> None:
    """Replaces every norm of the layer by one with gain 1 + w; initialisation leaves its weights at zero."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is RMSNorm:
                norm = RMSNormPlusOne(len(child.weight), child.variance_epsilon)
                norm._is_hf_initialized = True  # type: ignore[assignment]
                setattr(parent, name, norm)


def decoder_shape(config: Any) -> DecoderShape:
    if config.model_type not in DECODERS:
        raise ValueError(
            f"verifiers of model_type={config.model_type!r} have a decoder layer that does not exist here; an MTP "
            f"layer can be trained for {sorted(DECODERS)}"
        )
    shape = DECODERS[config.model_type]
    if shape.qk_norm_key is not None and not getattr(config, shape.qk_norm_key, False):
        return shape._replace(like="llama")
    return shape


def decoder_view(config: Any, shape: DecoderShape) -> SimpleNamespace:
    """Returns the verifier's config with the keys that the layers of `nn` read."""
    is_latent = shape.attention is LatentAttention
    return SimpleNamespace(
        model_type=shape.like,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size if shape.mlp is None else 1,  # no dense MLP to be made
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=1 if is_latent else head_dim(config),  # no plain attention to be made
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        attention_bias=shape.always_biased or bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        **({key: getattr(config, key, None) for key in LATENT_KEYS} if is_latent else {}),
    )


@dataclass(frozen=True)
class MTPNetwork:
    """The modules of a drafter and the functions over them. Owns none of them."""

    embed_tokens: nn.Embedding
    verifier_norm: nn.Module
    layer: MTPLayer
    lm_head: nn.Linear
    rope: Rope
    reads_raw_states: bool
    zeroes_first_embedding: bool

    @property
    def layers(self) -> Sequence[Any]:
        return [self.layer]

    @property
    def windows(self) -> list[int | None]:
        return [None]

    @property
    def linears(self) -> Sequence[nn.Linear]:
        return [self.layer.input_proj, self.lm_head]

    def combine(self, states_BTH: Tensor) -> Tensor:
        return states_BTH if self.reads_raw_states else self.verifier_norm(states_BTH)

    def tokens_at(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """The tokens as `step` takes them: engines zero the embedding at position 0 in some families."""
        return token_ids.masked_fill(positions == 0, NO_TOKEN) if self.zeroes_first_embedding else token_ids

    def step(
        self, token_ids_BT: Tensor, hidden_BTH: Tensor, rope: RopeTables, layer_attention: Sequence[AttentionFunction]
    ) -> StepOutput:
        embeds_BTH = self.embed_tokens(token_ids_BT.clamp_min(0))
        if self.zeroes_first_embedding:
            embeds_BTH = embeds_BTH.masked_fill((token_ids_BT == NO_TOKEN).unsqueeze(-1), 0.0)
        (attention,) = layer_attention
        return StepOutput(*self.layer(embeds_BTH, hidden_BTH, rope, attention))

    def fused(self) -> MTPNetwork:
        """A snapshot for decoding: the same function, faster for few rows. What is the verifier's stays shared."""
        layer = self.layer.fused()
        assert isinstance(layer, MTPLayer)
        return dataclasses.replace(self, layer=layer, verifier_norm=copy.deepcopy(self.verifier_norm))
