"""Every causal LM that transformers can build tiny, decoded with and without drafts: right, refused, or not built.

    PYTHONPATH=tests python tests/decoding/architectures.py [model types]      prints the table of docs/verifiers.md

Right: three prompts in two rows, longer than every window, give the greedy text of plain forwards without a cache:
without drafts, with half right chains, and with trees whose right branch is not the first.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import toys
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.verifiers.attention_proof import SplitVerifier
from speculators.decoding.verifiers.recurrent_verifier import RecurrentVerifier
from speculators.decoding.verifiers.trial import random_model, small_config
from speculators.utils.progress import no_notices

NUM_TOKENS = 8
GREEDY = SamplingParams(max_tokens=NUM_TOKENS)
PARENTS, RIGHT_PATH = [-1, -1, 1, 1, 3], [1, 3, 4]
"""The right branch is never the first."""
TIE = 1e-4
"""Two logits nearer than this share of the largest are a tie."""
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 18},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "falcon-alibi": {"alibi": True},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
}
"""What a default config lacks or should have otherwise. A name after a hyphen is a variant."""
SKIPPED = {
    "bailing_hybrid": "its sizes depend on one another in a way of their own",
    "blt": "works on bytes and patches",
    "cohere_compass_text": "its default config is invalid",
    "dbrx": "its config does not take what it writes",
    "dory": "its default config is invalid",
    "dots3_note": "its default config is invalid",
    "dots3_note_text": "its default config is invalid",
    "gemma3n": "needs pillow and timm",
    "gemma4_assistant": "reads the states of another model",
    "gemma4_unified_assistant": "reads the states of another model",
    "musicgen": "needs a text encoder",
    "musicgen_melody": "needs a text encoder",
    "qwen4_exp": "its default config is invalid",
    "qwen4_exp_text": "its default config is invalid",
    "reformer": "its sizes depend on one another in a way of their own",
    "zamba": "its layers must be as many as tied weights name",
    "zamba2": "its sizes depend on one another in a way of their own",
}
"""Model types of which no tiny model is built here, and why."""


@dataclass(frozen=True)
class Outcome:
    model_type: str
    kind: str
    """right, refused, not built, WRONG"""
    how: str
    """How it is decoded; the reason; what is wrong."""
    seconds: float = 0.0


class NotBuilt(Exception):
    """Says why there is no tiny model of a kind."""


def model_types() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows, and the variants of `SETTINGS`."""
    known = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    return sorted(known | {name for name in SETTINGS if name.split("-")[0] in known})


def tiny(model_type: str) -> PreTrainedModel:
    configs: dict[str, type[PretrainedConfig]] = {c.model_type: c for c in MODEL_FOR_CAUSAL_LM_MAPPING}
    config_class = configs.get(model_type) or configs[model_type.split("-")[0]]
    try:
        config = small_config(config_class(**SETTINGS.get(model_type, {})))
        model = random_model(lambda: AutoModelForCausalLM.from_config(config))
        with torch.inference_mode():
            model(input_ids=torch.arange(3, 30)[None], use_cache=False)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    model.config.eos_token_id = None
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    return model


def outcome_of(model_type: str) -> Outcome:
    start = time.perf_counter()
    try:
        with no_notices():
            model = tiny(model_type)
            kind, how = "right", decode_every_way(model)
    except NotBuilt as reason:
        return Outcome(model_type, "not built", str(reason))
    except ValueError as error:
        kind, how = ("refused" if type(model).__name__ in str(error) else "WRONG"), f"{type(error).__name__}: {error}"
    except AssertionError as error:
        kind, how = "WRONG", str(error)
    return Outcome(model_type, kind, how, time.perf_counter() - start)


def decode_every_way(model: PreTrainedModel) -> str:
    """Decodes without drafts, with chains and with trees; returns how. Raises AssertionError for another text."""
    prompts = [[3 + (17 * row + 7 * i) % 87 for i in range(length)] for row, length in enumerate((41, 5, 19))]
    engine = Engine(model, max_batch_size=2)
    outputs = [output.token_ids for output in engine.generate(prompts, GREEDY)]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(model, prompt, output)
    texts = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    decode(model, "chains", toys.ScriptedProposer(toys.oracle(texts, 2)), 4, prompts)
    if isinstance(engine.verifier, RecurrentVerifier):
        return "recurrent, chains"
    decode(model, "trees", toys.TreeProposer(texts, PARENTS, RIGHT_PATH), len(PARENTS), prompts)
    if not isinstance(engine.verifier, SplitVerifier):
        return "rows together, trees at once"
    return "one row at a time, trees path by path" if engine.verifier.by_row else "rows together, trees path by path"


def decode(model: PreTrainedModel, drafts: str, proposer: Any, num_tokens: int, prompts: list[list[int]]) -> None:
    engine = Engine(model, proposer, num_speculative_tokens=num_tokens, max_batch_size=2)
    for prompt, output in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        assert_greedy(model, prompt, output.token_ids, drafts)
    assert engine.stats.num_accepted > 0, f"{drafts}: no draft was accepted"


def assert_greedy(model: PreTrainedModel, prompt: list[int], output: list[int], drafts: str = "no drafts") -> None:
    """Every token is the likeliest of a plain forward over the text before it."""
    assert len(output) == NUM_TOKENS
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt + output]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    behind_T = logits_TV.amax(-1) - logits_TV.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert (behind_T <= TIE * logits_TV.abs().max()).all(), f"{drafts}, prompt of {len(prompt)}: another text"


def main(names: list[str]) -> None:
    outcomes = []
    for name in names or model_types():
        outcomes.append(outcome_of(name))
        print(f"{name:26} {outcomes[-1].kind:10} {outcomes[-1].seconds:5.2f} s  {outcomes[-1].how[:150]}", flush=True)
    for (kind, how), count in sorted(Counter((o.kind, o.how if o.kind == "right" else "") for o in outcomes).items()):
        print(f"| {kind} | {how} | {count} |")


if __name__ == "__main__":
    main(sys.argv[1:])
