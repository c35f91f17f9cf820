"""The front door: what the commands do, as functions. `import speculators as sp` has each of them.

    sp.regenerate -> sp.prepare_data -> sp.train_drafter -> sp.Engine / sp.evaluate / sp.verify -> sp.check, sp.export

A verifier is a hub id, a directory or a loaded causal LM (then `tokenizer=` may be given too). Data and checkpoints are
paths, or what an earlier function returned. Keyword settings are the fields of the configs named in each docstring; one
that does not exist is a `ValueError` with the nearest that does. Nothing is printed and no bar is drawn unless asked.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators import assets
from speculators.checkpoint.engine_profile import VLLM, profile_of_version
from speculators.checkpoint.io import local_directory
from speculators.data_generation.configs import (
    DEFAULT_ANSWER_RETRIES,
    DEFAULT_ANSWER_TIMEOUT_S,
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_SEED,
    RegenerateConfig,
)
from speculators.data_generation.endpoints import AnswerServers
from speculators.data_generation.preprocessing import load_tokenizer
from speculators.data_generation.regenerate import RegenerationReport, regenerate_responses
from speculators.data_generation.rollout import Answer, Question
from speculators.decoding.chat import sampling_params
from speculators.decoding.engine import Engine
from speculators.decoding.method import PLAIN, Drafter
from speculators.decoding.request import NonFiniteScoresError, RequestOutput
from speculators.decoding.request_builder import end_of_sequence_ids
from speculators.decoding.settings import SamplingParams, refuse_biases_of_servers
from speculators.decoding.target import VerifierSource, open_target
from speculators.deploy.export import serving_of_checkpoint
from speculators.deploy.process import find_vllm
from speculators.evaluation.config import EvaluateConfig, ParityConfig, VllmTarget, cells_of
from speculators.evaluation.parity import ParityReport, check_parity
from speculators.evaluation.prompts import Source, named_sources
from speculators.evaluation.report import EvaluationReport
from speculators.evaluation.suite import measure_methods
from speculators.train.drafters import resolve_given
from speculators.train.events import Listener, telling
from speculators.train.logger import TrainingProgress
from speculators.train.records import TrainResult
from speculators.train.run import train_side_by_side
from speculators.utils.names import model_name, refuse_unknown
from speculators.utils.progress import Progress, WorkProgress, counting, no_progress_bars, token_counter
from speculators.verifier.config import end_token_ids

NOTED = ("max_tokens", "temperature", "top_k", "top_p", "seed")
"""Sampling settings that are written beside each regenerated answer; others where they were set."""
AnyPath = str | os.PathLike[str]


@no_progress_bars()
def regenerate(
    verifier: VerifierSource,
    data: Source,
    *,
    output: str | os.PathLike[str],
    drafter: Drafter | None = None,
    num_speculative_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    endpoints: str | Sequence[str] | None = None,
    request_timeout_s: float = DEFAULT_ANSWER_TIMEOUT_S,
    max_retries: int = DEFAULT_ANSWER_RETRIES,
    api_key: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Progress = False,
    **settings: Any,
) -> RegenerationReport:
    """Replaces the answers of a data set by the verifier's own: the text that a drafter will see when it serves.

    `output`: .jsonl file to write, for `prepare_data`. `drafter`: see `Engine.from_pretrained`. `endpoints`: servers
    with OpenAI's interface that answer, `batch_size` conversations at a time; `max_retries`: waits while none does.
    `settings`: the fields of `RegenerateConfig` (`limit`, `num_samples`, `batch_size`, `resume`, ...) and of
    `SamplingParams`; seeds of answers come from `seed`, conversation and turn.
    Raises `ValueError` for no prompt, and an `output` that exists (unless `resume`) or is another recipe's.
    """
    of_rows, of_sampling = names_of(RegenerateConfig), names_of(SamplingParams)
    refuse_unknown("setting of regenerate", settings, [*of_rows, *of_sampling])
    if settings.get("n", 1) != 1:
        raise ValueError(f"n={settings['n']}: say num_samples={settings['n']}, which gives as many answers per prompt")
    rows = {name: value for name, value in settings.items() if name in of_rows}
    sampling = {name: value for name, value in settings.items() if name in of_sampling}
    config = RegenerateConfig(**rows)
    params = sampling_params(**{"max_tokens": DEFAULT_ANSWER_TOKENS, "seed": DEFAULT_SEED, **sampling})
    name, progress = model_name(verifier), WorkProgress() if progress is True else progress
    written = {**rows, "output": output, "verifier": name, "sampling_params": noted(params), "progress": progress}
    if endpoints:
        for setting, value in {"drafter": drafter, "method": params.method}.items():
            if value not in (None, PLAIN):
                raise ValueError(f"{setting}={value!r} with endpoints: a server drafts by itself; leave it out")
        refuse_biases_of_servers(params)
        tokenizer = tokenizer or load_tokenizer(name, trust_remote_code=trust_remote_code)
        stop_token_ids = {*end_token_ids(name, tokenizer, trust_remote_code), *params.stop_token_ids}
        urls = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        limits = (config.batch_size, request_timeout_s, max_retries)
        with AnswerServers(
            urls, tokenizer, asdict(params), stop_token_ids, *limits, api_key, config.chat_template_kwargs
        ) as servers:
            servers.warn_about_other_model(name)
            return regenerate_responses(
                data,
                tokenizer,
                counting(servers, progress),
                threaded=True,
                max_prompt_tokens=None if servers.max_model_len is None else servers.max_model_len - 1,
                stop_token_ids=stop_token_ids,
                endpoint=", ".join(urls),
                **written,
            )
    target = open_target(verifier, tokenizer=tokenizer, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if target.tokenizer is None:
        raise ValueError(f"no tokenizer was found for the verifier {name}; give one as tokenizer=")
    engine = Engine.from_pretrained(
        target.model,
        drafter,
        num_speculative_tokens=num_speculative_tokens,
        tokenizer=target.tokenizer,
        max_batch_size=config.batch_size,
    )
    report = regenerate_responses(
        data,
        target.tokenizer,
        partial(answer_questions, engine, params, progress),
        max_prompt_tokens=engine.max_length - 1,
        stop_token_ids={*end_of_sequence_ids(target.model, target.tokenizer), *params.stop_token_ids},
        **written,
    )
    return replace(report, num_non_finite=engine.stats.num_non_finite)


def noted(params: SamplingParams) -> dict[str, Any]:
    """Returns the settings that are written beside each answer."""
    settings = asdict(params).items()
    return {name: value for name, value in settings if name in NOTED or value != getattr(SamplingParams, name)}


def answer_questions(
    engine: Engine, params: SamplingParams, progress: bool | Progress, questions: Sequence[Question]
) -> list[Answer | Exception]:
    requests = [replace(params, seed=question.seed, temperature=question.temperature) for question in questions]
    prompts = [question.prompt for question in questions]
    return list(map(answer_of, engine.generate(prompts, requests, on_token=token_counter(progress))))


def answer_of(output: RequestOutput) -> Answer | Exception:
    stop = output.stop_reason if isinstance(output.stop_reason, str) else ""
    answer = Answer(output.token_ids, finish_reason=output.finish_reason, stop=stop)
    return answer if output.error is None else NonFiniteScoresError(output.error)


@overload
def train_drafter(
    algorithm: str, *, verifier: VerifierSource, data: AnyPath, output: AnyPath, **settings: Any
) -> TrainResult: ...
@overload
def train_drafter(
    algorithm: list[str] | tuple[str, ...], *, verifier: VerifierSource, data: AnyPath, output: AnyPath, **settings: Any
) -> dict[str, TrainResult]: ...


@no_progress_bars()
def train_drafter(
    algorithm: str | Sequence[str],
    *,
    verifier: VerifierSource,
    data: AnyPath,
    output: AnyPath,
    progress: bool = False,
    on_event: Callable[..., None] | None = None,
    **settings: Any,
) -> TrainResult | dict[str, TrainResult]:
    """Trains a drafter of a registered algorithm ("eagle3", "dflash", ...) for a verifier; of a list of algorithms one
    each, side by side on one pass over the verifier, into `output/<name>`: then it returns a result by name.

    `data`: what `prepare_data` wrote. `output`: run directory; a run that ended early is continued. `settings`: the
    keys of `TrainConfig` and of the algorithm, named as the command's flags (`epochs`, `draft_vocab_size`, `lr`, ...);
    `dflash={"num_layers": 2}` is for one of several. `on_event(event)` is called with every step, validation and
    checkpoint (`speculators.train.events`), of several drafters `on_event(event, name=...)`.
    A result holds the check and the parity gate made at the end: `result.raise_for_errors()`. Raises `ConfigError` for
    settings that are unknown or contradict each other, `ValueError` for data, verifier or checkpoints of no use.
    """
    paths = {"data_path": data, "save_path": output}
    configs = resolve_given(algorithm, {"verifier_name_or_path": model_name(verifier), **paths, **settings})
    model = verifier if isinstance(verifier, PreTrainedModel) else None
    with TrainingProgress() if progress else nullcontext() as bar:

        def listen(name: str) -> Listener:
            own = on_event if on_event is None or isinstance(algorithm, str) else partial(on_event, name=name)
            shown = None if bar is None else bar.of_each(len(configs))(name)
            return telling([listener for listener in (shown, own) if listener is not None])

        results = train_side_by_side(configs, verifier=model, listen=listen)
    names = [config.speculator_type for config in configs]
    return results[0] if isinstance(algorithm, str) else dict(zip(names, results, strict=True))


@no_progress_bars()
def evaluate(
    verifier: VerifierSource,
    data: Source | Sequence[str | os.PathLike[str]],
    *,
    methods: Drafter | Sequence[Drafter] = EvaluateConfig.methods,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool | Progress = False,
    **settings: Any,
) -> EvaluationReport:
    """Measures drafting methods against plain decoding on held-out conversations: acceptance, speed, losslessness.

    `data`: one source or a list of them; `ours`, `spec-bench=PATH`, `humaneval=PATH` and `gsm8k=PATH` are sets of
    prompts by name. `methods`: see `Engine.from_pretrained`. `output`: JSON file of the report, written after each
    cell; one that the same call began is continued, unless `overwrite`. `settings`: the fields of `EvaluateConfig`;
    `num_speculative_tokens`, `temperature` and `batch_size` may be lists, and every combination is measured. With
    `check_sampling` and a temperature the law of sampled answers is tested too; `report.raise_for_errors()` raises when
    one is not lossless. `evaluation.load_result` reads the file again.
    Raises `ValueError` for a verifier, drafter or data set that cannot be read, and for an output of another call.
    """
    refuse_unknown("setting of evaluate", settings, names_of(EvaluateConfig, "verifier", "data", "methods"))
    sources = named_sources(data)
    name = verifier.name_or_path or "" if isinstance(verifier, PreTrainedModel) else os.fspath(verifier)
    cells = cells_of(verifier=name, data=list(sources), methods=methods, **settings)
    return measure_methods(
        cells, verifier, sources, tokenizer=tokenizer, output=output, overwrite=overwrite, progress=progress
    )


@no_progress_bars()
def verify(
    checkpoint: str | os.PathLike[str],
    *,
    verifier: VerifierSource | None = None,
    data: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vllm: bool | str | os.PathLike[str] = False,
    progress: bool | Progress = False,
    **settings: Any,
) -> ParityReport:
    """Checks that training, the engine and vLLM draft the same tokens, and that the text is the verifier's.

    `verifier`: None: the one the checkpoint names. `data`: conversations to replay; None: built-in ones. `vllm`: the
    Python with vLLM to replay in too; True: where it is found, with a note in the report where not. `settings`: the
    fields of `ParityConfig`. `report.raise_for_errors()` raises when the gate is not passed.
    Raises `ValueError` for a checkpoint or verifier that cannot be read.
    """
    refuse_unknown("setting of verify", settings, names_of(ParityConfig, "checkpoint", "verifier", "data", "vllm"))
    path = str(local_directory(checkpoint))
    name = None if verifier is None else model_name(verifier)
    model = verifier if isinstance(verifier, PreTrainedModel) else None
    source = assets.prompts_path("heldout") if data is None else data
    with tempfile.TemporaryDirectory() as folder:
        python = None if isinstance(vllm, bool) else os.fspath(vllm)
        target = vllm_target(path, name, python, Path(folder)) if vllm else None
        config = ParityConfig(checkpoint=path, verifier=name, vllm=target, **settings)
        return check_parity(config, source=source, verifier=model, tokenizer=tokenizer, progress=progress)


def vllm_target(checkpoint: str, verifier: str | None, python: str | None, folder: Path) -> VllmTarget | str:
    """Returns what vLLM is to serve: the checkpoint, or what `export` makes of it. A text says why vLLM cannot run."""
    try:
        environment = find_vllm(python)
    except ValueError as error:
        if python is not None:
            raise
        return str(error)
    profile = profile_of_version(VLLM, environment.version)
    serving = serving_of_checkpoint(checkpoint, verifier, profile, folder / "served")
    if serving is None:
        return f"{profile.title} serves no drafter of this type"
    return VllmTarget(str(environment.python), serving.model, dict(serving.speculative_config))


def names_of(config: type, *without: str) -> list[str]:
    return [field.name for field in fields(config) if field.name not in without]
