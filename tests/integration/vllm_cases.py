"""What is served: drafters trained a little by `train`, with the flags of their kind, and methods that need none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NUM_DRAFTS = 4
RECIPE = ("--lr", "3e-3", "--total-seq-len", "512", "--epochs", "2", "--max-steps", "40", "--no-parity-gate")
BLOCK = ("--block-size", "5", "--num-layers", "2")
FULL = ("--full-attention-indices", "0", "1")
SLIDING = ("--sliding-window", "48")


@dataclass(frozen=True)
class Trained:
    speculator_type: str
    flags: tuple[str, ...] = ()
    num_drafts: int = NUM_DRAFTS


TRAINED = {
    "eagle3 llama, reduced vocabulary": Trained("eagle3", ("--draft-arch", "llama", "--draft-vocab-size", "2048")),
    "eagle3 llama, whole vocabulary": Trained("eagle3", ("--draft-arch", "llama")),
    "eagle3 qwen3, reduced vocabulary": Trained("eagle3", ("--draft-arch", "qwen3", "--draft-vocab-size", "2048")),
    "eagle3 qwen3, whole vocabulary": Trained("eagle3", ("--draft-arch", "qwen3")),
    "peagle": Trained("peagle", ("--draft-vocab-size", "2048")),
    "dflash, full": Trained("dflash", (*BLOCK, *FULL)),
    "dflash, sliding causal": Trained("dflash", (*BLOCK, *SLIDING)),
    "dflash, sliding not causal": Trained("dflash", (*BLOCK, *SLIDING, "--sliding-window-non-causal")),
    "eagle": Trained("eagle"),
    "medusa": Trained("medusa", num_drafts=3),
}
"""All of vLLM's model runner V1."""
VARIANTS = (
    "eagle3 llama, whole vocabulary",
    "eagle3 qwen3, reduced vocabulary",
    "eagle3 qwen3, whole vocabulary",
    "dflash, full",
    "dflash, sliding not causal",
)
"""Of methods that another case covers: slow, so that the smallest set has each method once."""

DSPARK = Trained("dspark", ("--block-size", "4", "--num-layers", "1", "--draft-vocab-size", "2048"), num_drafts=4)
"""Model runner V2 alone."""

NGRAM_SIZES = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
SUFFIX = {"method": "suffix", "suffix_decoding_max_cached_requests": 0}
"""Earlier answers left out: which of them are there depends on the order in which a batch ends."""
UNTRAINED = {"draft_model": {"method": "draft_model"}, "suffix": SUFFIX, "ngram": {"method": "ngram", **NGRAM_SIZES}}
"""ngram last: it loads numba, after which vLLM 0.32 cannot set up draft_model in the same process."""


@dataclass
class Decoded:
    """One method on the same prompts, here and there."""

    plain: list[list[int]]
    """Of vLLM."""
    ours: list[list[int]] = field(default_factory=list)
    theirs: list[list[int]] = field(default_factory=list)
    our_accepted: list[int] = field(default_factory=list)
    their_accepted: list[int] = field(default_factory=list)
    error: str | None = None


def train_flags(case: Trained, verifier: str, data: str, save_path: Any) -> list[str]:
    return [
        "train",
        "--speculator-type",
        case.speculator_type,
        "--verifier-name-or-path",
        verifier,
        "--data-path",
        data,
        "--save-path",
        str(save_path),
        *RECIPE,
        *case.flags,
    ]
