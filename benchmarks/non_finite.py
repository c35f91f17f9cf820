"""What the test of finiteness costs per round: python benchmarks/non_finite.py

Best of 30, one thread, one row with 4 drafts. A forward of a verifier with such a vocabulary takes 100 ms or more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from speculators.decoding.round import greedily
from speculators.decoding.sampling import BatchSampling, SamplingParams
from speculators.decoding.verification import GreedyRule
from speculators.interfaces import Proposal

NUM_DRAFTS = 4


def best_ms(work: Callable[[], object], times: int = 30) -> float:
    best_s = float("inf")
    for _ in range(times):
        start_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 1000 * best_s


def main() -> None:
    torch.set_num_threads(1)
    print("vocabulary  greedy rule  with the test  sampling law  with the test   (ms)")
    for vocab_size in (32_000, 151_936):
        logits_BTV = torch.randn(1, NUM_DRAFTS + 1, vocab_size)
        proposal = Proposal(torch.randint(0, vocab_size, (1, NUM_DRAFTS)))
        sampling = BatchSampling([SamplingParams(temperature=1.0)], [0], torch.device("cpu"))

        def tested_law(logits: torch.Tensor = logits_BTV, law: BatchSampling = sampling) -> torch.Tensor:
            return law.probs(logits).masked_fill_(~law.is_finite(logits)[..., None], 1 / logits.shape[-1])

        columns = (
            best_ms(lambda p=proposal, x=logits_BTV: GreedyRule()(p, x)),
            best_ms(lambda p=proposal, x=logits_BTV: greedily(p, x)),
            best_ms(lambda s=sampling, x=logits_BTV: s.probs(x)),
            best_ms(tested_law),
        )
        print(f"{vocab_size:10,}" + "".join(f"{ms:14.3f}" for ms in columns))


if __name__ == "__main__":
    main()
