"""A verifier that is not where it should be: one sentence, whoever asks."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from speculators.model import SpeculatorModel
from speculators.verifier import load_verifier

DRAFTERS = ("eagle3", "peagle", "dflash", "dspark", "eagle", "medusa", "mlp", "mtp")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each drafter, for a verifier that was moved."""
    path = tmp_path_factory.mktemp("drafters")
    config = LlamaConfig(**SIZES, num_hidden_layers=6, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(path / "verifier")
    for name in DRAFTERS:
        kind = Qwen3Config if name in ("dflash", "dspark") else LlamaConfig
        nested = config if name == "mtp" else kind(**SIZES, num_hidden_layers=1, head_dim=4)
        SpeculatorModel.get_class(name).from_training_args(
            nested,
            t2d=None,
            d2t=None,
            draft_vocab_size=40,
            verifier_name_or_path=str(path / "verifier"),
            target_layer_ids=[1, 2, 3],
            mask_token_id=3,
        ).save_pretrained(path / name)
    (path / "verifier").rename(path / "moved")
    return path


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_whose_verifier_was_moved_says_so_and_is_told_where_it_is_now(name, checkpoints):
    with pytest.raises(ValueError, match="no verifier at "):
        SpeculatorModel.from_pretrained(checkpoints / name)
    SpeculatorModel.from_pretrained(checkpoints / name, verifier=checkpoints / "moved")


def test_loading_the_verifier_itself_says_the_same(checkpoints):
    with pytest.raises(ValueError, match="no verifier at "):
        load_verifier(checkpoints / "verifier")
