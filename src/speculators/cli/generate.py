"""`speculators generate`: decode prompts with draft-and-verify and show what was accepted.

On a terminal the text appears as it is decoded. `--mark` tells who wrote each token: a draft, by its position in the
round, or the verifier itself: after a rejected draft (recovered), after drafts that were all accepted (bonus), or where
nothing was drafted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from speculators.cli.shared import (
    BY_FLAGS,
    Device,
    Dtype,
    DynamicTree,
    MaxTokens,
    NumSpeculativeTokens,
    Result,
    TokenTree,
    TrustRemoteCode,
    Verifier,
    error_of,
    is_for_people,
    out,
    parse_json_object,
    with_sampling_flags,
)
from speculators.decoding.method import PLAIN
from speculators.decoding.settings import DEFAULT_DEVICE, DEFAULT_DTYPE, SamplingParams
from speculators.decoding.stats import BONUS, RECOVERED, UNDRAFTED
from speculators.utils.report import facts_table, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from speculators.decoding import Engine
    from speculators.decoding.request import RequestOutput, StreamEvent, TokenLogprobs

DRAFT_STYLES = ("green", "cyan", "blue", "magenta")
"""Of accepted drafts by position in their round; the last one is that of all deeper ones."""
VERIFIER_STYLES = {RECOVERED: "bold yellow", BONUS: "bold", UNDRAFTED: ""}


@with_sampling_flags(SamplingParams)
def generate(
    verifier: Verifier,
    prompt: Annotated[list[str], typer.Option(help="What to ask; '-' reads stdin. Repeatable.")],
    method: Annotated[str, typer.Option(help="A speculator's directory, a method's name, JSON, or none.")] = PLAIN,
    num_speculative_tokens: NumSpeculativeTokens = None,
    speculative_token_tree: TokenTree = None,
    dynamic_tree: DynamicTree = None,
    max_tokens: MaxTokens = SamplingParams.max_tokens,
    sampling: Mapping[str, Any] = BY_FLAGS,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = DEFAULT_DEVICE,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts as they are: no chat template.")] = False,
    mark: Annotated[
        bool, typer.Option("--mark", help="Show who wrote each token: a draft, by its position, or the verifier.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Decode prompts with draft-and-verify; greedy output is the verifier's own, token for token."""
    from speculators.decoding import Engine, open_target, parse_methods
    from speculators.decoding.request import raise_for_failed
    from speculators.utils.chat_template import chat_prompt

    trees = {
        "speculative_token_tree": speculative_token_tree,
        "dynamic_tree": parse_json_object("--dynamic-tree", dynamic_tree),
    }
    trees = {name: tree for name, tree in trees.items() if tree is not None}
    chosen = parse_methods([method], num_speculative_tokens, trees)[0]
    params = SamplingParams(max_tokens=max_tokens, seed=seed, **sampling)
    target = open_target(verifier, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = target.tokenizer
    texts = [sys.stdin.read() if text == "-" else text for text in prompt]
    prompts = [tokenizer(text).input_ids if raw else chat_prompt(tokenizer, text) for text in texts]
    num_answers = len(prompts) * params.n
    engine = Engine(target.model, chosen.speculative_config, tokenizer=tokenizer, max_batch_size=num_answers)
    answers = [LiveAnswer(text, mark, tokenizer, params) for text in texts for _ in range(params.n)]
    outputs = decode(engine, prompts, params, answers)
    samples = [sample for output in outputs for sample in output.outputs]
    shown: list[RenderableType] = [legend(answers)] if mark and is_for_people() else []
    for index, (answer, sample) in enumerate(zip(answers, samples, strict=True)):
        if not is_for_people():
            shown += [Text(visible(answer.prompt), "bold"), Text(visible(sample.text))]
        title = title_of(index, params.n) if is_for_people() and len(answers) > 1 else ""
        shown.append(facts_table(title, facts_of(sample) | answer.facts()))
    records = [record_of(sample) | answer.record() for sample, answer in zip(samples, answers, strict=True)]
    record = {"verb": "generate", "method": chosen.name, "outputs": records}
    return Result(record, shown, error=error_of(lambda: raise_for_failed(outputs)))


def title_of(index: int, num_samples: int) -> str:
    """Of an answer on a terminal, where prompts have so many answers each."""
    prompt, sample = divmod(index, num_samples)
    return f"prompt {prompt + 1}" + (f", sample {sample + 1}" if num_samples > 1 else "")


def decode(
    engine: Engine, prompts: list[list[int]], sampling: SamplingParams, answers: Sequence[LiveAnswer]
) -> list[RequestOutput]:
    """Decodes all prompts; on a terminal each answer is printed as it comes, after those before it are whole.
    `answers`: sample by sample of each prompt."""
    shows, printed = is_for_people(), 0

    def follow(event: StreamEvent) -> None:
        nonlocal printed
        answers[event.request_index * sampling.n + event.sample_index].add(event)
        while shows and printed < len(answers):
            answers[printed].print_news()
            if not answers[printed].is_whole:
                break
            printed += 1

    try:
        return engine.generate(prompts, sampling, on_token=follow)
    except KeyboardInterrupt:
        if shows:
            out().print()
        raise


@dataclass
class LiveAnswer:
    """The answer to one prompt while it is decoded: its text in pieces, each with who wrote it."""

    prompt: str
    mark: bool
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingParams
    authors: list[str] = field(default_factory=list)
    """Of each token: `draft 1`, `draft 2`, ..., or what the verifier wrote it as."""
    news: list[tuple[str, str]] = field(default_factory=list)
    """Pieces of text that are not printed yet, with their styles."""
    is_begun: bool = False
    is_whole: bool = False

    def __post_init__(self) -> None:
        from speculators.decoding.request import AuthoredText

        self.text = AuthoredText(self.tokenizer, self.sampling)

    def add(self, event: StreamEvent) -> None:
        self.is_whole = event.finish_reason is not None
        if not self.mark:
            self.news.append((event.text, ""))
            return
        self.authors += event.authors
        self.news += [(text, style_of(author)) for text, author in self.text.pieces(event)]

    def print_news(self) -> None:
        console = out()
        if not self.is_begun:
            console.out(self.prompt, style="bold", highlight=False)
            self.is_begun = True
        for text, style in self.news:
            console.out(text, style=style or None, end="", highlight=False)
        self.news.clear()
        if self.is_whole:
            console.print()

    def facts(self) -> dict[str, Any]:
        return {"written by": ", ".join(f"{who} {n}" for who, n in self.counts().items())} if self.mark else {}

    def counts(self) -> dict[str, int]:
        """Author -> tokens: drafts by position, then the verifier."""
        counted = Counter(self.authors)
        drafts = sorted((who for who in counted if who not in VERIFIER_STYLES), key=position_of)
        return {who: counted[who] for who in [*drafts, *VERIFIER_STYLES] if counted[who]}

    def record(self) -> dict[str, Any]:
        return {"written_by": self.authors} if self.mark else {}


def position_of(author: str) -> int:
    return int(author.removeprefix("draft "))


def style_of(author: str) -> str:
    if author in VERIFIER_STYLES:
        return VERIFIER_STYLES[author]
    return f"underline {DRAFT_STYLES[min(position_of(author), len(DRAFT_STYLES)) - 1]}"


def legend(answers: Sequence[LiveAnswer]) -> Text:
    """The styles of those who wrote something; "verifier" alone: nothing was drafted."""
    authors = sum((Counter(answer.counts()) for answer in answers), Counter())
    return Text("marks: ").append_text(Text(", ").join(Text(author, style_of(author)) for author in authors))


def facts_of(output: RequestOutput) -> dict[str, Any]:
    stats = output.stats
    facts: dict[str, Any] = {
        "tokens": f"{len(output.token_ids)}, ended by {output.finish_reason}",
        "rounds": stats.num_rounds,
    }
    if stats.num_drafted:
        facts["acceptance length"] = f"{stats.acceptance_length:.2f}"
        if stats.num_drafts < stats.num_rounds:
            facts["... when drafted"] = f"{stats.acceptance_length_when_drafted:.2f} in {stats.num_drafts} rounds"
        facts["accepted / drafted"] = f"{stats.num_accepted} / {stats.num_drafted}"
    return facts


def logprobs_of(position: TokenLogprobs | None) -> dict[str, Any] | None:
    return None if position is None else asdict(position)


def record_of(output: RequestOutput) -> dict[str, Any]:
    stats = output.stats
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "error": output.error,
        **({} if output.logprobs is None else {"logprobs": list(map(logprobs_of, output.logprobs))}),
        **(
            {}
            if output.prompt_logprobs is None
            else {"prompt_logprobs": list(map(logprobs_of, output.prompt_logprobs))}
        ),
        "num_rounds": stats.num_rounds,
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
        "num_drafts": stats.num_drafts,
        "acceptance_length": stats.acceptance_length,
        "acceptance_length_when_drafted": stats.acceptance_length_when_drafted,
    }
