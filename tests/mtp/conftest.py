import pytest
from mtp_toys import make_drafter, save_verifier
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def verifier_paths(tmp_path_factory):
    return {arch: save_verifier(arch, tmp_path_factory.mktemp(arch)) for arch in ("llama", "qwen2", "qwen3")}


@pytest.fixture
def verifier(verifier_paths):
    def load(arch="llama"):
        return AutoModelForCausalLM.from_pretrained(verifier_paths[arch]).eval()

    return load


@pytest.fixture
def drafter(verifier_paths):
    def make(arch="llama", **arguments):
        return make_drafter(verifier_paths[arch], **arguments)

    return make
