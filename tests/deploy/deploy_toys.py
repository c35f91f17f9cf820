"""Untrained checkpoints of every algorithm for the embedded verifier, written as training writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from speculators import SpeculatorModel, assets
from speculators.train.checkpointer import save_speculator

VERIFIER = str(assets.tiny_verifier_path())
VOCAB, DRAFT_VOCAB, HIDDEN, IDS = 4096, 1024, 256, [2, 6, 9]
BLOCKS = {"mask_token_id": 3, "block_size": 5}
CASES = {
    "eagle3": {"arch": "llama", "target_layer_ids": IDS, "draft_vocab_size": DRAFT_VOCAB, "norm_before_fc": True},
    "eagle3-qwen3": {"arch": "qwen3", "target_layer_ids": [1, 5, 7, 11], "norm_output": True, "fc_norm": True},
    "eagle3-llama-two-aux": {"arch": "llama", "target_layer_ids": [3, 9], "num_layers": 2},
    "peagle": {
        "arch": "llama",
        "target_layer_ids": IDS,
        "draft_vocab_size": DRAFT_VOCAB,
        "mask_token_id": 3,
        "fc_norm": True,
    },
    "dflash": {"arch": "qwen3", "target_layer_ids": IDS, **BLOCKS},
    "dflash-sliding": {
        "arch": "qwen3",
        "target_layer_ids": IDS,
        "draft_vocab_size": DRAFT_VOCAB,
        "num_layers": 2,
        "window": 64,
        **BLOCKS,
    },
    "dspark": {"arch": "qwen3", "target_layer_ids": IDS, "draft_vocab_size": DRAFT_VOCAB, "markov_rank": 8, **BLOCKS},
    "mtp": {"arch": "llama", "num_speculative_steps": 2},
    "eagle": {"arch": "llama"},
    "medusa": {"arch": "llama", "num_heads": 3},
    "mlp": {"arch": "llama", "n_predict": 3, "inner_dim": 64},
}


def draft_map(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """t2d, d2t of DRAFT_VOCAB scattered ids."""
    kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(DRAFT_VOCAB)


def make_checkpoint(case: str, path: Path, verifier: str = VERIFIER, noise: float = 0.05, **changes) -> Path:
    arguments = {**CASES[case], **changes}
    arch, num_layers, window = (arguments.pop(key, None) for key in ("arch", "num_layers", "window"))
    source = AutoConfig.from_pretrained(verifier)
    shape = {
        key: getattr(source, key, None)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rope_parameters",
        )
    }
    layers = num_layers or 1
    if window:
        shape |= {"sliding_window": window, "use_sliding_window": True, "layer_types": ["sliding_attention"] * layers}
    config = AutoConfig.for_model(arch, **shape, num_hidden_layers=layers, tie_word_embeddings=False)
    torch.manual_seed(0)
    t2d, d2t = draft_map() if arguments.get("draft_vocab_size") else (None, None)
    model = SpeculatorModel.get_class(case.split("-")[0]).from_training_args(
        source if case == "mtp" else config,
        verifier_name_or_path=verifier,
        t2d=t2d,
        d2t=d2t,
        **{"draft_vocab_size": None, **arguments},
    )
    for parameter in model.parameters():  # make every weight matter
        if parameter.requires_grad:
            parameter.data.add_(noise * torch.randn_like(parameter))
    path.mkdir(parents=True)
    save_speculator(model, path)
    return path


def edit_config(path: Path, change) -> None:
    """`change` gets config.json as a dict."""
    file = path / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_tensors(path: Path, change) -> None:
    """`change` gets the tensors by name."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def as_older_release(case: str, path: Path) -> Path:
    """A directory as releases 0.1 to 0.5 wrote it: rope in two keys, none of the later options, no record."""
    make_checkpoint(case, path)

    def change(values):
        later = (
            "eagle_aux_hidden_state_layer_ids",
            "norm_output",
            "fc_norm",
            "embed_requires_grad",
            "sliding_window_non_causal",
            "sample_from_anchor",
        )
        for key in (*later, "dtype", "tie_word_embeddings"):
            values.pop(key, None)
        nested = values["transformer_layer_config"]
        nested |= {"rope_theta": nested.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
        for key in ("layer_types", "sliding_window", "use_sliding_window", "is_causal"):
            nested.pop(key, None)
        values |= {"speculators_version": "0.2.0", "torch_dtype": "bfloat16"}

    edit_config(path, change)
    (path / "training_record.json").unlink()
    return path


# -- directories as other projects write them

HEADS, WIDTH, MLP = 8, 32, 64


def save(path: Path, values: dict, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def layer(prefix: str, width: int) -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj": (HEADS * WIDTH, width),
        "self_attn.k_proj": (2 * WIDTH, width),
        "self_attn.v_proj": (2 * WIDTH, width),
        "self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"{prefix}{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


LAYERS = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
}
