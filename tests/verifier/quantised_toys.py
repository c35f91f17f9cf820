"""Writes the tiny verifier quantised, as other programs write it, and dequantised, for comparison.

A GGUF file has llama.cpp's names, the rows of q and k in its order (halves of a head interleaved), and a tokenizer.
A compressed-tensors directory has `weight` in FP8 or `weight_packed`, and `weight_scale` beside it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from speculators.assets import tiny_verifier_path

FP8 = torch.float8_e4m3fn
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUP = 32
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def plain_tensors() -> dict[str, torch.Tensor]:
    return {name: t.float() for name, t in load_file(Path(tiny_verifier_path()) / "model.safetensors").items()}


def config_values() -> dict:
    return json.loads((Path(tiny_verifier_path()) / "config.json").read_text())


def write_gguf(file: Path, kind: str = "Q8_0", *, architecture: str = "llama", tokenizer: bool = True) -> Path:
    """Writes matrices of a type that gguf-py can write, such as Q8_0, Q4_0 and F16; vectors in float32."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    values = config_values()
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_rope_dimension_count(values["head_dim"])
    writer.add_rope_freq_base(values["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_vocab_size(values["vocab_size"])
    if tokenizer:  # its 4,096 tokens take most of the time to read
        add_tokenizer(writer)
    for name, tensor in plain_tensors().items():
        key = gguf_name(name)
        rows = values.get(HEADS.get(key.split(".")[2], "") if key.startswith("blk") else "")
        array = (tensor if rows is None else interleaved(tensor, rows)).numpy()
        if array.ndim == 1:
            writer.add_tensor(key, array)
        else:
            kind_id = GGMLQuantizationType[kind]
            writer.add_tensor(key, quants.quantize(array, kind_id), raw_dtype=kind_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer) -> None:
    folder = Path(tiny_verifier_path())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return whole[stem] + ".weight"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{NAMES[part]}.weight"


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head: 0, d / 2, 1, d / 2 + 1, ...: llama.cpp rotates neighbours, transformers halves."""
    d = len(weight) // num_heads
    order = np.arange(d).reshape(2, d // 2).T.reshape(-1)
    return weight.reshape(num_heads, d, -1)[:, order].reshape(weight.shape).contiguous()


def quantised_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values and a scale per row: the largest value of a row becomes 448."""
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(FP8).max
    return (weight / scale).to(FP8), scale


def write_directory(folder: Path, tensors: dict[str, torch.Tensor], **changes) -> Path:
    shutil.copytree(tiny_verifier_path(), folder)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config_values(), **changes}))
    return folder


def is_quantised(name: str) -> bool:
    return "proj" in name


def compressed(scheme: dict, stored_format: str, inputs: dict | None = None) -> dict:
    """The values of config.json, as llm-compressor writes them."""
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": inputs, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": stored_format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**group, "format": stored_format}},
    }
    return {"quantization_config": quantization}


def fp8_directory(activations: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """FP8_DYNAMIC (with `activations`), or its weights alone."""
    tensors = {}
    for name, weight in plain_tensors().items():
        tensors[name] = weight
        if is_quantised(name):
            tensors[name], tensors[name + "_scale"] = quantised_fp8(weight)
    scheme = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = {**scheme, "strategy": "token", "dynamic": True} if activations else None
    return tensors, compressed({**scheme, "strategy": "channel", "dynamic": False}, "float-quantized", inputs)


def quantised_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers -8 .. 7 and a scale per group of 32 columns."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2, keepdim=True) / 7
    return (groups / scale).round().clamp(-8, 7).flatten(1), scale[..., 0]


def int4_directory() -> tuple[dict[str, torch.Tensor], dict]:
    """W4A16: eight values of a row in one int32, the first in its lowest bits, each plus 8."""
    tensors = {}
    for name, weight in plain_tensors().items():
        if not is_quantised(name):
            tensors[name] = weight
            continue
        values, scale = quantised_int4(weight)
        shifted = (values.long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
        packed = shifted.sum(2)
        tensors[name + "_packed"] = torch.where(packed >= 2**31, packed - 2**32, packed).int()
        tensors[name + "_scale"], tensors[name + "_shape"] = scale, torch.tensor(weight.shape)
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return tensors, compressed({**scheme, "dynamic": False}, "pack-quantized")


def quantised_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of FP4, their scales in FP8 (one per 16 columns), and the one by which those are divided."""
    groups = weight.unflatten(1, (-1, 16))
    largest = groups.abs().amax(2)
    whole = torch.finfo(FP8).max * 6 / largest.max()
    scale = (largest / 6 * whole).to(FP8)
    steps = groups / (scale.float() / whole)[..., None]
    codes = (steps.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (steps < 0)
    return codes.flatten(1), scale, whole


def fp4_directory() -> tuple[dict[str, torch.Tensor], dict]:
    """NVFP4: two codes of a row in one byte, the first in its low bits."""
    tensors = {}
    for name, weight in plain_tensors().items():
        if not is_quantised(name):
            tensors[name] = weight
            continue
        codes, scale, whole = quantised_fp4(weight)
        tensors[name + "_packed"] = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
        tensors[name + "_scale"], tensors[name + "_global_scale"] = scale, whole.reshape(1)
    scheme = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    return tensors, compressed({**scheme, "dynamic": False}, "nvfp4-pack-quantized")


def quantised_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values and a scale per block of 128 by 128."""
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    scale = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for i in range(len(scale)):
        for j in range(scale.shape[1]):
            scale[i, j] = weight[rows == i][:, columns == j].abs().max() / torch.finfo(FP8).max
    return (weight / scale[rows][:, columns]).to(FP8), scale


def blocks_directory() -> tuple[dict[str, torch.Tensor], dict]:
    """As DeepSeek publishes FP8, and transformers writes it."""
    tensors = {}
    for name, weight in plain_tensors().items():
        tensors[name] = weight
        if is_quantised(name):
            tensors[name], tensors[name + "_scale_inv"] = quantised_blocks(weight)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return tensors, {"quantization_config": {**settings, "modules_to_not_convert": ["lm_head"]}}


WRITERS = {"FP8 blocks": blocks_directory, "FP8": fp8_directory, "INT4": int4_directory, "NVFP4": fp4_directory}


def dequantised(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The values that a kind stores."""
    if kind == "FP8":
        stored, scale = quantised_fp8(weight)
        return stored.float() * scale
    if kind == "FP8 blocks":
        stored, scale = quantised_blocks(weight)
        return stored.float() * scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)
    if kind == "INT4":
        values, scale = quantised_int4(weight)
        return values * scale.repeat_interleave(GROUP, 1)
    codes, scale, whole = quantised_fp4(weight)
    return torch.cat((FP4, -FP4))[codes] * (scale.float() / whole).repeat_interleave(16, 1)


def write_fp8(folder: Path, *, activations: bool = False) -> Path:
    tensors, values = fp8_directory(activations)
    return write_directory(folder, tensors, **values)


def write_dequantised(folder: Path, kind: str) -> Path:
    """The plain model of the values that a kind stores."""
    tensors = {name: dequantised(w, kind) if is_quantised(name) else w for name, w in plain_tensors().items()}
    return write_directory(folder, tensors, dtype="float32")
