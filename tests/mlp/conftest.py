import pytest
from last_state_toys import randomise_trained, save_verifier
from transformers import LlamaForCausalLM

from speculators.models import MLPSpeculator


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory):
    return save_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


@pytest.fixture
def make_drafter(verifier_path):
    def make(random=True, **arguments):
        model = MLPSpeculator.from_training_args(
            None, verifier_name_or_path=str(verifier_path), **{"n_predict": 3, "inner_dim": 12, **arguments}
        )
        if random:
            randomise_trained(model)
        return model

    return make
