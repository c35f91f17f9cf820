"""Settings of an evaluation, of the parity gate and of a diagnosis: every default is written here, once. Imports
nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

from speculators.data_generation.configs import refuse_missing_source
from speculators.data_generation.vllm_client import DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT_S
from speculators.decoding.method import Drafter
from speculators.decoding.settings import (
    DEFAULT_DEVICE,
    DEFAULT_DTYPE,
    SamplingParams,
    is_count,
    refuse_biases_of_servers,
    refuse_fewer,
    refuse_unknown_dtype,
)
from speculators.utils.names import did_you_mean, refusing_unknown

SERVED = "served"
"""Default name of a server's row: a server does not say what drafts in it."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts and how they are answered. Everything that changes a figure is here and is written into the report."""

    data: str
    """Held-out conversations: a file, a directory or a preset."""
    num_prompts: int = 32
    max_tokens: int = SamplingParams.max_tokens
    temperature: float = SamplingParams.temperature
    top_k: int = SamplingParams.top_k
    top_p: float = SamplingParams.top_p
    min_p: float = SamplingParams.min_p
    repetition_penalty: float = SamplingParams.repetition_penalty
    presence_penalty: float = SamplingParams.presence_penalty
    frequency_penalty: float = SamplingParams.frequency_penalty
    logit_bias: dict[int, float] | None = None
    bad_words: tuple[str, ...] = SamplingParams.bad_words
    stop: tuple[str, ...] = SamplingParams.stop
    stop_token_ids: tuple[int, ...] = SamplingParams.stop_token_ids
    min_tokens: int = SamplingParams.min_tokens
    ignore_eos: bool = SamplingParams.ignore_eos
    skip_special_tokens: bool = SamplingParams.skip_special_tokens
    seed: int = 0
    num_warmup: int = 2
    """Groups of prompts answered before the clock counts."""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        refuse_fewer(self, num_prompts=1, num_warmup=0)
        self.sampling()

    def sampling(self) -> SamplingParams:
        """How every prompt is answered. The seed is the workload's where something is drawn. Raises `ValueError` for
        settings that are none."""
        own = {f.name for f in fields(Workload)}  # a subclass may say under the same name what drafts in its engines
        settings = {f.name: getattr(self, f.name) for f in fields(SamplingParams) if f.name in own}
        return SamplingParams(**settings | {"seed": self.seed if self.temperature > 0 else None})


@refusing_unknown
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Workload):
    """One comparison of methods in this process."""

    verifier: str
    methods: tuple[Drafter, ...] = ("none", "ngram")
    """Plain decoding is always measured: the others are compared with it."""
    num_speculative_tokens: int | None = None
    """Draft tokens per round; None: as each method's own configuration says."""
    speculative_token_tree: str | None = None
    dynamic_tree: dict[str, Any] | None = None
    """What speculators' directories draft in place of a chain: one of the two."""
    batch_size: int = 1
    num_repeats: int = 1
    """Timings of each group, of which the fastest counts."""
    dtype: str | None = None
    """None: float32, or that of a verifier that is loaded already. Lower precisions have ties that rounding decides."""
    device: str = DEFAULT_DEVICE
    check_sampling: bool = False
    """With a temperature: draw `num_samples` short answers of each prompt both ways, and test that their law is one."""
    num_samples: int = 64
    num_sampled_tokens: int = 16
    keep_tokens: int = 0
    """Answers per method that are kept token by token, with who wrote each; decoded once more, after the timing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.methods
        methods = (given,) if isinstance(given, str | os.PathLike | Mapping) else tuple(given)  # one needs no list
        named = (method if isinstance(method, str | Mapping) else os.fspath(method) for method in methods)
        object.__setattr__(self, "methods", tuple(named))
        refuse_fewer(self, num_speculative_tokens=1, batch_size=1, num_repeats=1, num_samples=1, num_sampled_tokens=1)
        refuse_fewer(self, keep_tokens=0)
        refuse_unknown_dtype(self.dtype)


AXES = ("data", "temperature", "batch_size", "num_speculative_tokens")
"""Fields in which the cells of one call may differ; the last varies fastest."""
OURS = "ours"
PROMPT_SETS: dict[str, tuple[str, ...]] = {
    OURS: (),
    "spec-bench": ("category", "turns"),
    "humaneval": ("task_id", "prompt"),
    "gsm8k": ("question", "answer"),
}
"""Name of a set of prompts -> the columns of its file. `ours` is embedded; of the others the user has the file."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts to measure on: a public set by its name, or any source of conversations."""

    name: str
    """Of its rows in the results."""
    source: str

    @classmethod
    def parse(cls, text: str) -> PromptSet:
        """`ours`, `spec-bench=PATH`, `humaneval=PATH`, `gsm8k=PATH`, or a source. Raises `ValueError` for a name
        without its file and for another name."""
        name, is_named, path = text.partition("=")
        if text == OURS:
            return cls(OURS, OURS)
        if name in PROMPT_SETS and name != OURS:
            if not path:
                raise ValueError(f"data {text!r} says no file: {name}=PATH, where PATH is its file of prompts")
            return cls(name, path)
        if is_named and re.fullmatch(r"[A-Za-z0-9_-]+", name) and not os.path.exists(text):
            named = ", ".join(other if other == OURS else f"{other}=PATH" for other in PROMPT_SETS)
            raise ValueError(
                f"data {text!r}: no set of prompts is named {name!r}.{did_you_mean(name, PROMPT_SETS)} "
                f"There are: {named}; any other file goes without a name"
            )
        return cls(text, text)


def refuse_missing_prompts(text: str) -> None:
    """Raises `ValueError` for a set of prompts whose source does not exist."""
    source = PromptSet.parse(text).source
    if source != OURS:
        refuse_missing_source(source)


def cells_of(**settings: Any) -> list[EvaluateConfig]:
    """Returns one `EvaluateConfig` per combination of values, where `settings` has lists for fields of `AXES`. Raises
    `ValueError` for a list without a value, and for a wrong one."""
    lists = {name: list(dict.fromkeys(settings[name])) for name in AXES if isinstance(settings.get(name), list | tuple)}
    for name, values in lists.items():
        if not values:
            raise ValueError(f"{name}=[]: at least one value is needed")
    shared = {name: value for name, value in settings.items() if name not in lists}
    return [EvaluateConfig(**shared, **dict(zip(lists, values, strict=True))) for values in product(*lists.values())]


@refusing_unknown
@dataclass(frozen=True, kw_only=True)
class ServerConfig(Workload):
    """One comparison of running servers."""

    server: str
    baseline: str | None = None
    """A server of the same verifier that drafts nothing."""
    verifier: str | None = None
    """Whose tokenizer renders the prompts; None: what the server says it loaded."""
    label: str = SERVED
    num_clients: tuple[int, ...] = (1,)
    timeout_s: float = DEFAULT_TIMEOUT_S
    max_retries: int = DEFAULT_MAX_RETRIES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_clients or not all(is_count(number, 1) for number in self.num_clients):
            raise ValueError(f"concurrency {list(self.num_clients)}: at least one client is needed")
        refuse_fewer(self, max_retries=0)
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s!r} must be more than 0 seconds")

    def sampling(self) -> SamplingParams:
        sampling = super().sampling()
        refuse_biases_of_servers(sampling)
        return sampling


@dataclass(frozen=True)
class VllmTarget:
    """Says what vLLM serves of a checkpoint, and where vLLM is."""

    python: str
    """Python of an environment with vLLM."""
    model: str
    """What `vllm serve` is given: the verifier, or a directory that names it."""
    speculative_config: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    """Further environment variables."""


@refusing_unknown
@dataclass(frozen=True)
class ParityConfig:
    """Settings of the parity gate."""

    checkpoint: str
    verifier: str | None = None
    """None: the one the checkpoint names."""
    num_prompts: int = 6
    max_tokens: int = 48
    num_speculative_tokens: int | None = None
    """None: what the checkpoint says."""
    max_prompt_tokens: int = 256
    """Longer prompts lose their beginning."""
    batch_size: int = 3
    """Prompts decoded together: rows of different lengths, and rows that are taken over, are part of the proof."""
    dtype: str = DEFAULT_DTYPE
    device: str = DEFAULT_DEVICE
    trust_remote_code: bool = False
    vllm: VllmTarget | str | None = None
    """Text: why vLLM cannot be asked; None: it is not to be."""

    def __post_init__(self) -> None:
        refuse_fewer(self, num_prompts=1, max_tokens=1, num_speculative_tokens=1, max_prompt_tokens=1, batch_size=1)
        refuse_unknown_dtype(self.dtype)


@refusing_unknown
@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Settings of a diagnosis: every default is written here, once."""

    num_prompts: int = 8
    """Prompts that are answered and drafted for."""
    max_tokens: int = 64
    """Longest answer."""
    num_rows: int = 16
    """Training rows that are read."""
    num_speculative_tokens: int | None = None
    """Draft tokens per round; None: as the checkpoint says. 0: nothing is drafted, which is then the cause."""
    temperature: float | None = None
    """At which the drafter serves; None: as the verifier's generation_config.json says, which vLLM follows. Where that
    names none, drafts are judged at 0 alone and the report says so: a request says it then, or vLLM samples at 1."""
    num_samples: int = 64
    """Answers that are sampled of a server for each prompt, to test their law."""
    device: str = DEFAULT_DEVICE
    dtype: str = DEFAULT_DTYPE
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        refuse_fewer(self, num_prompts=1, max_tokens=2, num_rows=1, num_speculative_tokens=0, num_samples=1)
        refuse_unknown_dtype(self.dtype)
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature!r} is below 0: 0 is greedy, 1 the verifier's own law")
