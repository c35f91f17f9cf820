"""Checkpoints, each made once."""

import shutil
from pathlib import Path

import pytest
from deploy_toys import make_checkpoint


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
