import pytest
import torch
from mlp_toys import HIDDEN, VOCAB
from transformers import LlamaConfig, LlamaForCausalLM

from speculators.models import MLPSpeculator


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory):
    """Random weights, the final norm's far from one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, eos_token_id=None,
        rms_norm_eps=1e-4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.norm.weight.data = 1 + 0.5 * torch.randn(HIDDEN)
    path = tmp_path_factory.mktemp("verifier")
    model.save_pretrained(path)
    return path


@pytest.fixture
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


@pytest.fixture
def make_drafter(verifier_path):
    def make(random=True, **arguments):
        model = MLPSpeculator.from_training_args(
            None, verifier_name_or_path=str(verifier_path), **{"n_predict": 3, "inner_dim": 12, **arguments}
        )
        torch.manual_seed(0)
        for parameter in model.parameters() if random else ():
            if parameter.requires_grad:
                parameter.data.normal_(0.0, 0.5)
        return model

    return make
