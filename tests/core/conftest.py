"""Fixtures over the helpers of `toyalgo`."""

import pytest
import torch
from toyalgo import D, V, make_verifier


@pytest.fixture
def verifier(tmp_path):
    """A verifier's directory as far as its frozen weights are read, and those weights by their own names."""
    return make_verifier(tmp_path / "verifier")


@pytest.fixture
def mappings():
    """(t2d, d2t) that keep the even ids."""
    kept = torch.arange(0, V, 2)
    t2d = torch.zeros(V, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(D)
