"""Checkpoints of ours, each made once, and heads of other projects."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from deploy_toys import DRAFT_VOCAB, HIDDEN, LAYERS, VOCAB, WIDTH, draft_map, layer, make_checkpoint, save

# naive drafters, which judge conversions too
for folder in ("eagle3", "eagle", "peagle", "dflash", "dspark", "medusa", "mlp", "mtp", "verifier"):
    if str(Path(__file__).parents[1] / folder) not in sys.path:
        sys.path.append(str(Path(__file__).parents[1] / folder))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """case -> its directory, not to be changed"""
    root, made = tmp_path_factory.mktemp("trained"), {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = make_checkpoint(case, root / case)
        return made[case]

    return get


@pytest.fixture
def copy_of(trained, tmp_path):
    """case -> a copy to change"""
    return lambda case: Path(shutil.copytree(trained(case), tmp_path / case))


@pytest.fixture
def eagle3_head(tmp_path):
    """As the EAGLE repository writes it: no embedding, no word on the layers it reads."""
    torch.manual_seed(0)
    t2d, d2t = draft_map()
    tensors = layer("midlayer.", 2 * HIDDEN) | {
        "midlayer.hidden_norm.weight": torch.randn(HIDDEN),
        "fc.weight": torch.randn(HIDDEN, 3 * HIDDEN),
        "norm.weight": torch.randn(HIDDEN),
        "lm_head.weight": torch.randn(DRAFT_VOCAB, HIDDEN),
        "d2t": d2t,
        "t2d": t2d,
    }
    values = {
        **LAYERS,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLMEagle3"],
        "vocab_size": 99,
        "draft_vocab_size": DRAFT_VOCAB,
        "rope_theta": 5e5,
        "torch_dtype": "float16",
    }
    return save(tmp_path / "head", values, tensors)


@pytest.fixture
def zlab_drafter(tmp_path):
    torch.manual_seed(0)
    tensors = {name: tensor for i in range(2) for name, tensor in layer(f"layers.{i}.", HIDDEN).items()} | {
        f"layers.{i}.self_attn.{kind}_norm.weight": torch.randn(WIDTH) for i in range(2) for kind in "qk"
    }
    tensors |= {
        "fc.weight": torch.randn(HIDDEN, 2 * HIDDEN),
        "hidden_norm.weight": torch.randn(HIDDEN),
        "norm.weight": torch.randn(HIDDEN),
    }
    values = {
        **LAYERS,
        "num_hidden_layers": 2,
        "model_type": "qwen3",
        "architectures": ["DFlashDraftModel"],
        "vocab_size": VOCAB,
        "block_size": 6,
        "num_target_layers": 12,
        "rope_theta": 1e6,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "dflash_config": {"target_layer_ids": [1, 8], "mask_token_id": 7},
    }
    return save(tmp_path / "zlab", values, tensors)
