"""`evaluate --server`: the results table of a running server, for one or several numbers of clients.

Prompts are asked in groups of as many as there are clients. Where a plain server (the same verifier without a drafter)
is given, each group is asked of both, one after the other in an order that changes from group to group.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from speculators.data_generation.vllm_client import ServerUnavailableError
from speculators.decoding.method import PLAIN
from speculators.decoding.settings import SamplingParams
from speculators.evaluation.config import SERVED, ServerConfig
from speculators.evaluation.measurement import Measurement, acceptance_length, measured_speedup, rotated
from speculators.evaluation.prompts import load_prompt_set
from speculators.evaluation.records import ResultRow, environment, speedup_warnings
from speculators.evaluation.report import SavedReport, gain, results_table, with_interval
from speculators.evaluation.server_client import MeasuredServer, ServerCounters, ServerRestartedError
from speculators.evaluation.statistics import Estimate, count_identical
from speculators.utils.progress import Progress, WorkProgress, reporting
from speculators.utils.quantized import tokenizer_source

COLUMNS = (
    "clients",
    "K",
    "acceptance\nlength τ",
    "conditional\nacceptance",
    "tokens/s",
    "plain\ntokens/s",
    "speedup",
    "speedup\n/ τ",
    "lossless",
)
UNKNOWN = "-"
NO_BASELINE = "no plain server was given (--baseline-server), so speedup and losslessness were not measured"


@dataclass(frozen=True, kw_only=True)
class ServerRow(ResultRow):
    """The columns of the results table, and the number of clients. None where no plain server was given."""

    num_clients: int
    plain_tokens_per_s: float | None
    speedup: Estimate | None
    speedup_per_token: float | None
    num_identical: int | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServerReport(SavedReport):
    """All rows, or those that were measured before the server went away."""

    server: str
    verifier: str
    dataset: str
    rows: tuple[ServerRow, ...]
    interrupted: str | None = None
    """Why the measurement ended early; None when it did not."""
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Lists what makes a figure doubtful, by number of clients."""
        return [f"{row.num_clients} clients: {warning}" for row in self.rows for warning in row.warnings]

    def tables(self) -> list[Table]:
        """The results table with one row per number of clients. A dash: it needs a plain server, and none was given."""
        if not self.rows:
            return []
        first = self.rows[0]
        measured = f"{first.num_prompts} prompts of {self.dataset} at {self.server}"
        caption = "± 95 % bootstrap over groups of prompts; rounds from the server's own counters"
        table = results_table(measured, first.temperature, caption, COLUMNS)
        for row in self.rows:
            table.add_row(*map(escape, cells(row)))
        return [table]

    def sentence(self) -> str:
        return "; ".join(
            f"{row.num_clients} clients: " + ", ".join([f"τ {row.acceptance_length.value:.2f}", *compared(row)])
            for row in self.rows
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compared(row: ServerRow) -> list[str]:
    """What a plain server adds to a row's sentence."""
    same = [] if row.num_identical is None else [f"same text, {row.num_identical} of {row.num_prompts}"]
    return ([] if row.speedup is None else [gain(row.speedup, row.acceptance_length)]) + same


def cells(row: ServerRow) -> list[str]:
    return [
        row.method,
        str(row.num_clients),
        str(row.num_speculative_tokens),
        with_interval(row.acceptance_length),
        " ".join(f"{rate:.2f}" for rate in row.conditional_acceptance),
        f"{row.tokens_per_s:.1f}",
        UNKNOWN if row.plain_tokens_per_s is None else f"{row.plain_tokens_per_s:.1f}",
        UNKNOWN if row.speedup is None else with_interval(row.speedup) + "x",
        UNKNOWN if row.speedup_per_token is None else f"{row.speedup_per_token:.2f}",
        UNKNOWN if row.num_identical is None else f"{row.num_identical}/{row.num_prompts}",
    ]


@dataclass
class Level:
    """Measurements with one number of clients."""

    num_clients: int
    served: list[Measurement] = field(default_factory=list)
    plain: list[Measurement] = field(default_factory=list)
    counted: list[ServerCounters] = field(default_factory=list)
    num_restarts: int = 0


def evaluate_server(config: ServerConfig, *, progress: bool | Progress | None = None) -> ServerReport:
    """Measures a running server. When it goes away for good, the report holds the rows measured until then."""
    with ExitStack() as connections:
        servers = {SERVED: connections.enter_context(closing(connect(config, config.server)))}
        if config.baseline is not None:
            servers[PLAIN] = connections.enter_context(closing(connect(config, config.baseline)))
        refuse_wrong_roles(servers)
        root = servers[SERVED].served.root
        prompts = load_prompt_set(config.data, config.data, tokenizer_of(config, root), limit=config.num_prompts).all
        levels, interrupted = [], None
        try:
            with reporting(progress) as show:
                for num_clients in config.num_clients:
                    levels.append(Level(num_clients))
                    measure_level(levels[-1], servers, prompts, config, show)
        except (ServerUnavailableError, ServerRestartedError) as error:
            groups_done = len(levels[-1].served)
            interrupted = f"{error}. {groups_done * levels[-1].num_clients} prompts of this level were measured"
    return ServerReport(
        server=config.server,
        verifier=config.verifier or root,
        dataset=config.data,
        rows=tuple(row_of(level, config) for level in levels if level.served),
        interrupted=interrupted,
        settings=asdict(config),
        environment=environment(),
    )


def connect(config: ServerConfig, url: str) -> MeasuredServer:
    return MeasuredServer(
        url, timeout_s=config.timeout_s, max_retries=config.max_retries, max_clients=max(config.num_clients)
    )


def refuse_wrong_roles(servers: dict[str, MeasuredServer]) -> None:
    if not servers[SERVED].counters().speculates:
        raise ValueError(
            f"{servers[SERVED].base_url} drafts nothing: its /metrics has no vllm:spec_decode counters. Give a server "
            "started with a drafter (`speculators serve`), and this one as --baseline-server"
        )
    if PLAIN in servers and servers[PLAIN].counters().speculates:
        raise ValueError(f"--baseline-server {servers[PLAIN].base_url} drafts too; it must serve the verifier plainly")


def tokenizer_of(config: ServerConfig, root: str) -> PreTrainedTokenizerBase:
    name = config.verifier or root
    try:
        return AutoTokenizer.from_pretrained(**tokenizer_source(name), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be read from {name!r}: name the verifier with --verifier") from error


def measure_level(
    level: Level,
    servers: dict[str, MeasuredServer],
    prompts: Sequence[Sequence[int]],
    config: ServerConfig,
    show: Progress,
) -> None:
    """Fills `level` group by group; a group counts only when every server answered all of it."""
    sampling = config.sampling()
    groups = [prompts[i : i + level.num_clients] for i in range(0, len(prompts), level.num_clients)]
    for group in groups[: config.num_warmup]:
        for server in servers.values():
            server.measure(group, sampling)
    num_done = 0
    show(f"{level.num_clients} clients", 0, len(prompts))
    for index, group in enumerate(groups):
        measured = {
            name: measured_again(level, servers[name], group, sampling) for name in rotated(list(servers), index)
        }
        level.served.append(measured[SERVED][0])
        level.counted.append(measured[SERVED][1])
        if PLAIN in measured:
            level.plain.append(measured[PLAIN][0])
        num_done += len(group)
        if isinstance(show, WorkProgress):
            show.add_tokens(sum(measurement.num_tokens for measurement, _ in measured.values()))
        show(f"{level.num_clients} clients", num_done, len(prompts))


def measured_again(
    level: Level, server: MeasuredServer, group: Sequence[Sequence[int]], sampling: SamplingParams
) -> tuple[Measurement, ServerCounters]:
    """Measures a group again, once, when the server was restarted under it (its counters began anew)."""
    try:
        return server.measure(group, sampling)
    except ServerRestartedError:
        level.num_restarts += 1
        return server.measure(group, sampling)


def row_of(level: Level, config: ServerConfig) -> ServerRow:
    stats = reduce(add, (measurement.stats for measurement in level.served))
    num_tokens = sum(measurement.num_tokens for measurement in level.served)
    length = acceptance_length(level.served)
    answers = [ids for measurement in level.served for ids in measurement.token_ids]
    speedup = measured_speedup(level.plain, level.served) if level.plain else None
    plain_answers = [ids for measurement in level.plain for ids in measurement.token_ids]
    is_comparable = bool(level.plain) and config.temperature == 0
    return ServerRow(
        method=config.label,
        num_clients=level.num_clients,
        num_speculative_tokens=len(level.counted[0].accepted_per_position),
        temperature=config.temperature,
        num_prompts=len(answers),
        num_tokens=num_tokens,
        acceptance_length=length,
        acceptance_rate=stats.acceptance_rate,
        conditional_acceptance=tuple(stats.conditional_rates),
        tokens_per_s=num_tokens / sum(measurement.time_s for measurement in level.served),
        plain_tokens_per_s=speed(level.plain),
        speedup=speedup,
        speedup_per_token=None if speedup is None else speedup.value / length.value,
        num_identical=count_identical(plain_answers, answers) if is_comparable else None,
        warnings=(*(() if speedup is None else speedup_warnings(speedup, length)), *count_warnings(level, num_tokens)),
    )


def speed(measurements: Sequence[Measurement]) -> float | None:
    """Tokens per second; None where nothing was measured."""
    time_s = sum(measurement.time_s for measurement in measurements)
    return sum(measurement.num_tokens for measurement in measurements) / time_s if measurements else None


def count_warnings(level: Level, num_tokens: int) -> tuple[str, ...]:
    """Reasons why the figures may mislead: other clients, cached prompts, drafts of several lengths, restarts."""
    found = []
    num_generated = sum(counted.num_generated for counted in level.counted)
    if num_generated > num_tokens:
        found.append(
            f"the server generated {num_generated} tokens but this evaluation asked for {num_tokens}: another client "
            "uses it, and the acceptance figures are of both"
        )
    num_cached = sum(counted.num_cached_prompt_tokens for counted in level.counted)
    if num_cached:
        found.append(
            f"{num_cached} prompt tokens came from the prefix cache, which shortens the prompts' share of the time; "
            "start the servers with --no-enable-prefix-caching to measure without"
        )
    depth = len(level.counted[0].accepted_per_position)
    if sum(c.num_drafted for c in level.counted) < depth * sum(c.num_drafts for c in level.counted):
        found.append(
            "drafts were of different lengths and the server does not count them by length: conditional acceptance "
            "takes a draft that ended for one that was rejected"
        )
    if level.num_restarts:
        found.append(f"the server was restarted {level.num_restarts} times; those prompts were asked again")
    return tuple(found)
