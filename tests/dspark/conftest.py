import sys
from pathlib import Path

import pytest

SHARED = str(Path(__file__).parents[1] / "dflash")
if SHARED not in sys.path:  # the same toys serve both block drafters
    sys.path.insert(0, SHARED)

from dflash_toys import make_drafter, save_verifier  # noqa: E402


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory):
    return save_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture
def drafter(verifier_path):
    def make(**arguments):
        return make_drafter("dspark", verifier_path, **{"markov_rank": 5, **arguments})

    return make
