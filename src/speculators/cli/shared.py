"""Shared by the commands: how they end (`Result`), where they write (the result on stdout, progress and errors on
stderr), and flags that several of them have.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Annotated, Any, TextIO

import typer
from rich.console import RenderableType

from speculators.utils.report import WIDTH, ReaderGoneError, ReportConsole, visible

ONLY_JSON: ContextVar[bool] = ContextVar("ONLY_JSON", default=False)
"""Whether `--json` was given: then stdout holds the result as JSON and nothing else."""


@dataclass(frozen=True)
class Result:
    """The end of a verb, after all of its work: what it found, for programs and for people."""

    record: dict[str, Any]
    """One JSON object: printed where stdout is no terminal, or with `--json`."""
    tables: Sequence[RenderableType] = ()
    """Tables and texts from top to bottom; one that is a `str` is printed as it is, never wrapped."""
    sentence: str = ""
    """What came out, in one sentence."""
    next_command: Sequence[str] = ()
    """The arguments of the command that a user would run next."""
    error: BaseException | None = None
    """Why not all is good; raised after the rest was printed."""
    exit_code: int = 0


def show(result: Result, *, is_last: bool = True) -> None:
    """Prints a result. `is_last=False`: only its tables, for a step of another verb.

    Raises `ReaderGoneError` when nobody reads stdout any more."""
    console = out()
    for item in result.tables:
        is_text = isinstance(item, str)
        console.print(item, markup=not is_text, soft_wrap=is_text)
    if not is_last:
        return
    if result.sentence:
        console.print(result.sentence, style="bold", markup=False)
    if result.next_command:
        command = shlex.join(map(str, result.next_command))
        console.print(f"next: {command}", style="cyan", markup=False, soft_wrap=True)
    if not is_for_people():
        try:
            print(json.dumps(result.record, default=str), flush=True)
        except BrokenPipeError as error:
            raise ReaderGoneError from error


def is_for_people() -> bool:
    """Whether the result is shown to a person: stdout is a terminal, and `--json` was not given."""
    return sys.stdout.isatty() and not ONLY_JSON.get()


def error_of(raise_for_errors: Callable[[], None]) -> Exception | None:
    """The error that a report raises, to be told after what was done."""
    try:
        raise_for_errors()
    except (ValueError, RuntimeError) as error:
        return error
    return None


def out() -> ReportConsole:
    """For people: tables and text. Made on each call, so that a redirected stdout is honoured."""
    return ReportConsole(width=None if sys.stdout.isatty() else WIDTH, quiet=ONLY_JSON.get())


def err() -> ReportConsole:
    return ReportConsole(stderr=True, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """Prints a line of progress on stderr: stdout holds the result alone. Brackets in it are text, not styles."""
    err().print(text, style=style, markup=False)


def say_error(message: str, hint: str | None = None) -> None:
    console = err()
    console.print("[bold red]error:[/] ", end="")
    console.print(message, markup=False)
    if hint:
        say(hint, "dim")


class WarningFormatter(logging.Formatter):
    """Shows control characters of a logged warning escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Takes the place of `warnings.showwarning`: one line, without the place in the code."""
    say(str(message), "yellow")


def escape_warnings() -> None:
    """Escapes what Python prints of warnings that nobody else handles."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(WarningFormatter())


Verifier = Annotated[str, typer.Option(help="Verifier: hub id or directory.")]
Python = Annotated[
    str | None,
    typer.Option(
        help="Python with vLLM, or its environment's directory. Default: $SPECULATORS_VLLM_PYTHON, else here."
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="Release that serves it: vllm-0.33, vllm-0.32, sglang-0.5. Default: the one found, or the newest.",
    ),
]
NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        "-k", "--num-speculative-tokens", min=1, help="Draft tokens per round (K). Default: the method's own."
    ),
]
TokenTree = Annotated[
    str | None,
    typer.Option(
        "--speculative-token-tree", help='Tree that a speculator drafts, as paths of ranks: "[(0,), (1,), (0, 0)]".'
    ),
]
DynamicTree = Annotated[
    str | None,
    typer.Option(
        "--dynamic-tree", help='EAGLE-2\'s tree instead: JSON such as {"total_token": 60, "depth": 7, "top_k": 10}.'
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens. 0: off.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability. 1: off.")]
MinP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Drop tokens less likely than this share of the likeliest. 0: off.")
]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: less of what is in prompt and output. 1: off.")]
PresencePenalty = Annotated[
    float, typer.Option(min=-2.0, max=2.0, help="Subtracted from the scores of tokens in the output. 0: off.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(min=-2.0, max=2.0, help="The same, once per occurrence in the output. 0: off.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer and is left out of it. Repeatable.")]
MinTokens = Annotated[int, typer.Option(min=0, help="Tokens before an end-of-sequence token or a stop ends an answer.")]
LogitBias = Annotated[
    str | None,
    typer.Option(help='JSON object: token id -> what is added to its score, such as {"42": -100}.', metavar="<json>"),
]
BadWords = Annotated[list[str] | None, typer.Option(help="Word that an answer never has. Repeatable.")]
SkipSpecialTokens = Annotated[
    bool, typer.Option("--skip-special-tokens/--no-skip-special-tokens", help="Leave them out of the text.")
]
NumSamples = Annotated[int, typer.Option("--n", min=1, help="Answers per prompt; sample i has the seed `seed` + i.")]
Logprobs = Annotated[
    int | None,
    typer.Option(min=-1, help="Log-probabilities in the JSON: of each token and of so many likeliest. -1: of all."),
]
PromptLogprobs = Annotated[int | None, typer.Option(min=-1, help="The same of each token of the prompt.")]
IncludeStop = Annotated[
    bool, typer.Option("--include-stop-str-in-output", help="Leave the stop string or stop token in the text.")
]
SAMPLING_FLAGS = {
    "temperature": Temperature,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
    "repetition_penalty": RepetitionPenalty,
    "presence_penalty": PresencePenalty,
    "frequency_penalty": FrequencyPenalty,
    "logit_bias": LogitBias,
    "bad_words": BadWords,
    "min_tokens": MinTokens,
    "stop": Stop,
    "include_stop_str_in_output": IncludeStop,
    "skip_special_tokens": SkipSpecialTokens,
    "n": NumSamples,
    "logprobs": Logprobs,
    "prompt_logprobs": PromptLogprobs,
}
"""Flags of the verbs that decode: fields of `SamplingParams`, and their types."""
TEXTS_OF_FLAGS = ("stop", "bad_words")
"""Fields that are given text by text."""
BY_FLAGS: Any = MappingProxyType({})
"""Default of an argument of a verb that its flags fill."""
Decorator = Callable[[Callable[..., Result]], Callable[..., Result]]


def with_flags(argument: str, flags: Iterable[inspect.Parameter], read: Callable[..., Any]) -> Decorator:
    """Returns a decorator that gives a verb `flags` in place of one argument, and hands it there what `read` makes of
    their values, by name."""
    own_flags = list(flags)

    def decorate(verb: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(verb)
        def with_own(*args: Any, **said: Any) -> Result:
            values = {flag.name: said.pop(flag.name, flag.default) for flag in own_flags}
            return verb(*args, **{argument: read(**values)}, **said)

        own = inspect.signature(verb, eval_str=True)
        others = list(own.parameters.values())
        place = list(own.parameters).index(argument)
        parameters = [*others[:place], *own_flags, *others[place + 1 :]]
        with_own.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_own.__annotations__ = {flag.name: flag.annotation for flag in parameters}
        return with_own

    return decorate


def with_flags_of(argument: str, record: type[Any]) -> Decorator:
    """Gives a verb the fields of a dataclass as flags in place of one argument, which gets the record."""
    own = inspect.signature(record, eval_str=True).parameters.values()
    return with_flags(argument, [f.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for f in own], record)


def with_sampling_flags(defaults: Any, leave_out: Sequence[str] = ()) -> Decorator:
    """Gives a verb, in place of its argument `sampling`, those of `SAMPLING_FLAGS` that are fields of `defaults`, which
    holds their default values; the argument gets what they say, by field. `leave_out`: fields that would mean nothing
    to this verb."""
    names = {field.name for field in fields(defaults)}.difference(leave_out)
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None if name in TEXTS_OF_FLAGS else getattr(defaults, name),
            annotation=annotation,
        )
        for name, annotation in SAMPLING_FLAGS.items()
        if name in names
    ]

    def read(**sampling: Any) -> dict[str, Any]:
        texts = {name: tuple(sampling[name] or ()) for name in TEXTS_OF_FLAGS}
        biases = parse_json_object("--logit-bias", sampling["logit_bias"], example='{"42": -100}')
        return {**sampling, **texts, "logit_bias": biases}

    return with_flags("sampling", flags, read)


Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16. Greedy answers are sure to be identical in float32 only.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code shipped with the verifier.")]


TEMPLATE_SETTING = '{"enable_thinking": false}'


def parse_json_object(flag: str, text: str | None, example: str | None = None) -> dict[str, Any] | None:
    """The value of a flag that takes a JSON object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{flag} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{flag} must be a JSON object such as {example or TEMPLATE_SETTING}")
    return value
