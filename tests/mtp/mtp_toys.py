"""Tiny verifiers on disk and MTP drafters for them. Shapes: V 40, H 16, 3 verifier layers.

`qwen2` is a MiMo: its checkpoint holds an MTP layer as MiMo's does.
"""

import json

import torch
from drafter_toys import HIDDEN, VOCAB, packed_row, randomise
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from speculators.models.mtp import MTPDraftModel

MIMO_LAYER = "model.mtp_layers.0."


def save_verifier(arch, path):
    """Random weights, the final norm's far from one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        arch,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=256,
        tie_word_embeddings=arch == "llama",
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.norm.weight.data = 1 + 0.5 * torch.randn(HIDDEN)
    model.save_pretrained(path)
    if arch == "qwen2":
        add_mimo_layer(path)
    return path


def add_mimo_layer(path):
    tensors, layer = load_file(path / "model.safetensors"), "model.layers.0."
    size = tensors["model.norm.weight"].shape[0]
    ours = {MIMO_LAYER + k.removeprefix(layer): torch.randn_like(w) for k, w in tensors.items() if k.startswith(layer)}
    ours |= {MIMO_LAYER + f"{name}_layernorm.weight": torch.randn(size) for name in ("token", "hidden", "final")}
    ours[MIMO_LAYER + "input_proj.weight"] = torch.randn(size, 2 * size)
    save_file({**tensors, **ours}, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    values |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(values))


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
HYBRID = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
VISITED = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
}
ROUTED = {
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 9,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
}
QWEN_NAMES = ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight", "fc.weight")
SHARED_HEAD_NAMES = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight", "eh_proj.weight")
NATIVE = {
    "qwen3_next": ({**HYBRID, **VISITED, "intermediate_size": 20}, "mtp.", "layers.0.", QWEN_NAMES),
    "qwen3_5_text": ({**HYBRID, "intermediate_size": 20}, "mtp.", "layers.0.", QWEN_NAMES),
    "qwen3_5_moe_text": ({**HYBRID, **VISITED}, "mtp.", "layers.0.", QWEN_NAMES),
    "glm4_moe": (
        {**ROUTED, "num_key_value_heads": 2, "head_dim": 8, "use_qk_norm": True},
        "model.layers.3.",
        "",
        SHARED_HEAD_NAMES,
    ),
    "deepseek_v3": ({**ROUTED, **LATENT}, "model.layers.3.", "", SHARED_HEAD_NAMES),
}
"""model_type -> (config, prefix of the MTP layer, what stands before the decoder layer's names, three norms and the
projection of [embedding ; hidden]). MiMo's is `save_verifier("qwen2", ..)`."""


def native_config(arch, **sizes):
    """Of a tiny verifier; `sizes` replace what a test or an engine wants otherwise."""
    return AutoConfig.for_model(arch, **{**COMMON, **NATIVE[arch][0], **sizes})


def save_native_verifier(arch, path, seed=0, **sizes):
    """A random verifier on disk with an MTP layer as its family stores it: a random one of the shape of its last
    layer. DeepSeek's and GLM's repeat embedding and head. Returns the names of the MTP layer's tensors."""
    torch.manual_seed(seed)
    config = native_config(arch, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.norm.weight.data += 0.5 * torch.randn_like(model.model.norm.weight)
    model.save_pretrained(path)
    _, prefix, decoder, (*norms, projection) = NATIVE[arch]
    tensors, size = load_file(path / "model.safetensors"), config.hidden_size
    last = f"model.layers.{config.num_hidden_layers - 1}."
    prefix = f"model.layers.{config.num_hidden_layers}." if prefix.startswith("model.layers.") else prefix
    layer = {decoder + key.removeprefix(last): like(w) for key, w in tensors.items() if key.startswith(last)}
    layer |= {name: like(tensors["model.norm.weight"]) for name in norms}
    layer[projection] = torch.randn(size, 2 * size) * size**-0.5
    if norms[0] == "enorm.weight":
        layer |= {
            "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
            "shared_head.head.weight": tensors["lm_head.weight"].clone(),
        }
    if arch != "qwen3_5_moe_text":  # the one family that stores all experts of a projection in one tensor
        layer = experts_one_by_one(layer)
    layer = {prefix + name: tensor for name, tensor in layer.items()}
    save_file({**tensors, **layer}, path / "model.safetensors", metadata={"format": "pt"})
    return set(layer)


def experts_one_by_one(layer):
    out = {}
    for name, tensor in layer.items():
        start, kind = name.rpartition(".experts.")[::2]
        if kind == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                out[f"{start}.experts.{e}.gate_proj.weight"], out[f"{start}.experts.{e}.up_proj.weight"] = gate, up
        elif kind == "down_proj":
            out |= {f"{start}.experts.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        else:
            out[name] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def like(tensor):
    """Random, as large as a trained one: norms about their start, matrices that keep the scale of what they are fed."""
    noise = torch.randn_like(tensor.float())
    start = 1.0 if float(tensor.float().mean()) > 0.5 else 0.0
    random = start + 0.2 * noise if tensor.ndim == 1 else noise * tensor.shape[-1] ** -0.5
    return random.to(tensor.dtype)


def make_drafter(verifier_path, *, seed=0, random=True, **arguments):
    """A drafter with every trained weight random, so that each of them matters."""
    config = AutoConfig.from_pretrained(verifier_path)
    model = MTPDraftModel.from_training_args(config, verifier_name_or_path=str(verifier_path), **arguments)
    torch.manual_seed(seed)
    if random:
        randomise(model)
    return model


def packed_batch(lengths, **options):
    row = packed_row(lengths, **options)
    return {key: values for key, values in row.items() if key != "verifier_last_hidden_states"}
