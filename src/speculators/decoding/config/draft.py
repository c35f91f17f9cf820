"""The records a config is resolved against (target and draft model), and reading a draft checkpoint's config.json."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from speculators.decoding.config.methods import METHODS
from speculators.utils.names import refuse_missing_model
from speculators.verifier.config import open_config, text_config

if TYPE_CHECKING:
    from speculators.decoding.config.speculative import SpeculativeConfig

logger = logging.getLogger(__name__)

TARGETS_WITH_AUX_STATES = (
    "llama",
    "qwen",
    "minicpm",
    "gpt_oss",
    "hunyuan_vl",
    "hunyuan_v1_dense",
    "afmoe",
    "nemotron_h",
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "kimi_k25",
    "minimax_m2",
    "gemma4",
)
"""Target model types (parts of them) whose implementation in the serving engine returns intermediate states."""


@dataclass
class ModelInfo:
    """The facts of a model that a SpeculativeConfig reads. The target may be any object with these attributes."""

    model: str
    hf_config: Any
    max_model_len: int | None = None
    quantization: str | None = None
    trust_remote_code: bool = False
    gives_aux_states: bool = True
    """Intermediate states can be read, whatever the model type: the engine hooks any decoder layer."""

    def get_vocab_size(self) -> int | None:
        return lookup(text_config(self.hf_config), "vocab_size")

    def verify_with_parallel_config(self, parallel_config: Any) -> None:
        num_heads = lookup(text_config(self.hf_config), "num_attention_heads")
        ways = parallel_config.tensor_parallel_size
        if num_heads and num_heads % ways:
            raise ValueError(
                f"Total number of attention heads ({num_heads}) of {self.model} must be divisible by tensor parallel "
                f"size ({ways})"
            )


@dataclass
class ParallelInfo:
    """Says how a model is split over devices."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


def lookup(config: Any, path: str, default: Any = None) -> Any:
    """`config.a.b` of objects and dicts alike; default where a part is missing or None."""
    for part in path.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
        if config is None:
            return default
    return config


def architectures_of(hf_config: Any) -> list[str]:
    return list(lookup(hf_config, "architectures", []) or [])


def rename(hf_config: Any, names: dict[tuple[str, str], str]) -> None:
    """Replace outdated architecture names of a draft; `names` maps (model_type, architecture)."""
    model_type = lookup(hf_config, "model_type", "")
    hf_config.architectures = [names.get((model_type, name), name) for name in architectures_of(hf_config)]


def name_as_served(hf_config: Any, prefix: str) -> None:
    """Wrap a foreign draft's config as vLLM does: an EAGLE config whose architecture names the method."""
    if prefix and hf_config is not None and lookup(hf_config, "model_type") != "eagle":
        hf_config.model_type = "eagle"
        hf_config.architectures = [
            name if name.startswith(prefix) or name.endswith(prefix) else prefix + name
            for name in architectures_of(hf_config)
        ]


def is_readable_here(model: str) -> bool:
    return (Path(model) / "config.json").is_file()


def read_hf_config(
    model: str, revision: str | None = None, code_revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The checkpoint's config; one of a type transformers does not know becomes a plain record of its keys."""
    refuse_missing_model(model, "draft model", "a speculator or of a draft model")
    try:
        return open_config(model, revision=revision, code_revision=code_revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no draft model {model!r}: there is no such directory, and the hub does not give a model of that name "
            f"({reason})"
        ) from error


def draft_max_model_len(user_max_model_len: int | None, draft: int | None, target: int | None) -> int | None:
    """The user's cap, which must fit both models, else the shorter of the two."""
    speculative_max_model_len, draft_max_model_len, target_max_model_len = user_max_model_len, draft, target
    if speculative_max_model_len is None:
        return min((length for length in (draft, target) if length is not None), default=None)
    if draft is not None and speculative_max_model_len > draft:
        raise ValueError(f"{speculative_max_model_len=} cannot be larger than {draft_max_model_len=}")
    if target is not None and speculative_max_model_len > target:
        raise ValueError(f"{speculative_max_model_len=} cannot be larger than {target_max_model_len=}")
    return speculative_max_model_len


def draft_tensor_parallel_size(given: int | None, target_ways: int, draft_model_type: str | None) -> int:
    if given is None and draft_model_type == "mlp_speculator":
        if target_ways > 1:
            logger.warning("an MLP speculator runs on one device: draft_tensor_parallel_size=1")
        return 1
    if given is None:
        return target_ways
    if given not in (1, target_ways):
        speculative_draft_tensor_parallel_size = given
        raise ValueError(
            f"{speculative_draft_tensor_parallel_size=} cannot be other value than 1 or target model "
            f"tensor_parallel_size"
        )
    return given


def draft_parallel_config(target_parallel_config: Any, ways: int) -> Any:
    draft = copy.copy(target_parallel_config)
    draft.tensor_parallel_size = ways
    return draft


@contextmanager
def naming_the_guess(config: SpeculativeConfig) -> Iterator[None]:
    """Adds to a `ValueError` of the block why a draft has its method, where that was guessed from the draft's name."""
    try:
        yield
    except ValueError as error:
        guess = guess_of(config)
        if not guess:
            raise
        raise ValueError(f"{error} ({guess})") from error


def guess_of(config: SpeculativeConfig) -> str:
    """Says from which part of the draft's name its method was guessed; empty where it was said, or is recorded."""
    is_said = config.given.get("method") is not None
    if (
        is_said
        or config.method is None
        or config.model is None
        or lookup(config.draft_model_config, "hf_config.speculators_model_type")
    ):
        return ""
    word = word_in_name(config.method, config.model)
    way_out = f'{{"method": "draft_model", "model": "{config.model}"}} says that it is a whole language model'
    return f"method {config.method!r} was guessed from {word!r} in its name; {way_out}" if word else ""


def word_in_name(method: str, model: str) -> str | None:
    """The part of a model's name by which its method is guessed; None: it is guessed by something else."""
    return next((word for word in METHODS[method].detect_by_name if word in model.lower()), None)
