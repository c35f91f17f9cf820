"""The rules on a CUDA device decide as on the CPU, from the same draws."""

from __future__ import annotations

import pytest
import torch

from speculators.decoding.verification import keyed_draws, resolve_rule
from speculators.interfaces import Proposal

pytestmark = pytest.mark.gpu

RULES = [
    ("greedy", {}),
    ("strict", {}),
    ("standard", {}),
    ("block", {}),
    ("typical", {}),
    ("tolerance", {"verifier_accept_k": 3, "accept_tolerance": 0.2}),
    ("synthetic", {"acceptance_rates": (0.9, 0.5, 0.2, 0.1)}),
]


@pytest.mark.parametrize(("name", "options"), RULES)
@pytest.mark.parametrize("parents", [None, [-1, -1, 0, 2]])
@pytest.mark.parametrize("num_tokens", [7, 5000])
def test_cuda_decides_as_the_cpu(name, options, parents, num_tokens):
    if parents is not None and name in ("block", "synthetic"):
        pytest.skip("chains only")
    B, K = 64, 4
    generator = torch.Generator().manual_seed(0)
    target = torch.softmax(torch.randn(B, K + 1, num_tokens, generator=generator) * 3, -1)
    target[:8] = torch.nn.functional.one_hot(target[:8].argmax(-1), num_tokens).float()  # greedy rows
    draft = torch.softmax(target[:, :K].clamp_min(1e-9).log() + torch.randn(B, K, 1, generator=generator), -1)
    tokens = torch.distributions.Categorical(draft).sample()
    tokens[torch.rand(B, K, generator=generator) < 0.1] = -1
    seed, start = torch.arange(B), torch.arange(B) * 3
    results = []
    for device in ("cpu", "cuda"):
        proposal = Proposal(
            tokens.to(device), draft.to(device), None if parents is None else torch.tensor(parents, device=device)
        )
        draws = keyed_draws(seed.to(device), start.to(device), K + 1)
        results.append(resolve_rule(name, **options)(proposal, target.to(device), draws))
    cpu, cuda = results
    differing = (cpu.next_token_B != cuda.next_token_B.cpu()) | (cpu.num_accepted_B != cuda.num_accepted_B.cpu())
    assert differing.sum() <= (1 if num_tokens > 100 else 0)  # a uniform within rounding of a cell's border
    assert torch.equal(cpu.path_BK[~differing], cuda.path_BK.cpu()[~differing])
