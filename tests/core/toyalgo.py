"""An algorithm of a third party, written from the guide in `speculators.models` alone."""

import json

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from speculators import SpeculatorModel, SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators.model import DraftVocabMixin
from speculators.proposals import GreedyTokenProposalConfig


@SpeculatorModelConfig.register("toyalgo")
class ToyAlgoConfig(SpeculatorModelConfig):
    speculators_model_type: str = "toyalgo"  # a plain str, as the guide writes it
    transformer_layer_config: PretrainedConfig = Field(default_factory=Qwen3Config)
    draft_vocab_size: int = 8
    depth: int = Field(default=1, ge=1)


@SpeculatorModel.register("toyalgo")
class ToyAlgoModel(DraftVocabMixin, SpeculatorModel):
    config_class = ToyAlgoConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(self.hidden_size, self.hidden_size) for _ in range(config.depth))
        self.norm = nn.RMSNorm(self.hidden_size)
        self.verifier_norm = nn.RMSNorm(self.hidden_size)
        self.post_init()

    @classmethod
    def from_training_args(cls, verifier_config, t2d=None, d2t=None, **kwargs):
        model = cls(
            ToyAlgoConfig(transformer_layer_config=verifier_config, draft_vocab_size=kwargs["draft_vocab_size"])
        )
        model.load_vocab_mappings(t2d, d2t)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs):
        return {}, {}

    def forward(self, hidden_states, **kwargs):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        logits = self.lm_head(self.norm(hidden_states))
        loss = logits.square().mean()
        return logits, loss, {"loss": loss.detach()}


V, D, H = 16, 8, 4


def decoder_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaConfig(**{**sizes, **changes})


def toy_config(**changes) -> ToyAlgoConfig:
    return ToyAlgoConfig(**{"transformer_layer_config": decoder_config(), "draft_vocab_size": D, **changes})


def make_verifier(folder, *, tied=False, hidden_size=H, model_type="llama", prefix="model."):
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{prefix}embed_tokens.weight": torch.randn(V, hidden_size, generator=generator),
        f"{prefix}norm.weight": torch.rand(hidden_size, generator=generator),
        f"{prefix}layers.0.input_layernorm.weight": torch.full((hidden_size,), 9.0),
    }
    if not tied:
        weights["lm_head.weight"] = torch.randn(V, hidden_size, generator=generator)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": model_type, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def speculators_config(verifier=None, algorithm="toyalgo") -> SpeculatorsConfig:
    return SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None if verifier is None else str(verifier), architectures=[]),
    )
