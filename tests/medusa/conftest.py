import pytest
from last_state_toys import randomise_trained, save_verifier
from transformers import LlamaForCausalLM

from speculators.models import MedusaDraftModel


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory):
    return save_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


@pytest.fixture
def make_drafter(verifier_path):
    def make(random=True, **arguments):
        model = MedusaDraftModel.from_training_args(
            None, verifier_name_or_path=str(verifier_path), **{"num_heads": 3, "num_layers": 2, **arguments}
        )
        if random:
            randomise_trained(model)
        return model

    return make
