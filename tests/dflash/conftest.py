import pytest
from dflash_toys import make_drafter, save_verifier


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory):
    return save_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture
def drafter(verifier_path):
    def make(**arguments):
        return make_drafter("dflash", verifier_path, **arguments)

    return make
