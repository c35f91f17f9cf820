"""The decode engine: drafts, verifies and keeps tokens for a batch of requests of any lengths. See `Engine._round`.

Shapes: B rows, K draft slots, K1 = K + 1 scored columns, T tokens, V vocabulary, D width of captured states.

    committed     x0 .. x[L-1]   x[L]          L tokens are in the verifier's cache, x[L] is known but not processed
    scored        column 0 = x[L], columns 1..K = drafts; column j's logits judge draft j + 1
    kept          column 0 and the accepted drafts; the token after them becomes the next x[L]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators.decoding.chat import ChatEngine, refuse_name
from speculators.decoding.drafters import Drafters
from speculators.decoding.drafting import Drafting, Drafts, ReadyModels, build_drafting
from speculators.decoding.request import ActiveRequest, Prompts, RequestOutput, Samplings, StreamEvent
from speculators.decoding.request_builder import RequestBuilder, end_of_sequence_ids, refuse_below_one, usable_length
from speculators.decoding.round import (
    Accepted,
    RoundTimes,
    Verified,
    account,
    failure,
    no_drafts,
    on_host,
    refuse_outside,
    score_again,
    to_score,
    usable_drafts,
    verify,
)
from speculators.decoding.rows import Batch, score_chunk, share_prompt_prefix
from speculators.decoding.sampling import logprobs_by_row, to_report
from speculators.decoding.settings import SamplingParams
from speculators.decoding.stats import DecodeStats
from speculators.decoding.verifiers.cache import neighbours
from speculators.decoding.verifiers.recurrent_verifier import make_verifier
from speculators.interfaces import AcceptanceRule, Proposal, Verifier
from speculators.nn.graphs import choose_record
from speculators.utils.progress import doing

PREFILL_CHUNK = 512
"""Prompt tokens per forward: bounds the memory of a prefill and how long it keeps the other rows waiting."""

OnToken = Callable[[StreamEvent], bool | None]
"""Sees every event; returning False cancels the sample."""
Arrivals = Callable[[bool], Sequence[ActiveRequest] | None]
"""See `Engine.serve`."""


class Engine(ChatEngine):
    """Decodes prompts with a verifier: speculatively if it is told how to draft, else plainly.

    `verifier`: a transformers causal LM, or any object with the methods of `interfaces.Verifier`.
    `speculative_config`: a SpeculativeConfig or vLLM's JSON as a dict, or a ready `Proposer` (then say
    `num_speculative_tokens`); None: plain decoding. `other_methods`: name -> a further way of drafting, that requests
    choose by `SamplingParams.method`. `rule`: an acceptance rule, or its name, in place of the config's.
    `max_length`: prompt plus output in tokens. `prefill_chunk`: prompt tokens per forward. `graphs`: "auto" records
    rounds as CUDA graphs on a CUDA device, "static" runs their fixed shapes anywhere (`nn.graphs`).
    Raises ValueError for settings that contradict one another or that cannot be followed."""

    def __init__(
        self,
        verifier: PreTrainedModel | Verifier,
        speculative_config: Drafts | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_batch_size: int = 8,
        max_length: int | None = None,
        num_speculative_tokens: int | None = None,
        other_methods: Mapping[str, Drafts] | None = None,
        rule: AcceptanceRule | str | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        graphs: str = "off",
        seed: int = 0,
    ):
        refuse_name(verifier)
        refuse_below_one(max_batch_size=max_batch_size, prefill_chunk=prefill_chunk)
        self.max_length = usable_length(verifier, max_length)
        self.tokenizer = tokenizer
        methods = build_drafting(
            speculative_config,
            verifier,
            tokenizer=tokenizer,
            max_batch_size=max_batch_size,
            max_length=self.max_length,
            num_speculative_tokens=num_speculative_tokens,
            rule=rule,
            others=other_methods,
        )
        record = choose_record(graphs, verifier.device)
        self.drafters = Drafters(methods, verifier, record)
        with doing("proving that the verifier decodes in batches as by itself"):
            self.verifier = make_verifier(verifier, max_batch_size, self.drafters.capture, record)
        self.max_batch_size, self.prefill_chunk = max_batch_size, prefill_chunk
        self.stats = DecodeStats()
        eos_ids, vocab_size = end_of_sequence_ids(verifier, tokenizer), self.verifier.vocab_size
        self._builder = RequestBuilder(tokenizer, eos_ids, vocab_size, self.max_length, seed, self.drafters)
        self._models = ReadyModels(self.verifier, [method.proposer for method in methods])
        self._cancelled: set[tuple[int, int | None]] = set()
        self._is_running = False

    @property
    def drafting(self) -> Drafting | None:
        """How requests are drafted for that name no method; None: plain decoding."""
        return self.drafters.methods[0] if self.drafters.methods else None

    # -- what callers use

    def generate(
        self,
        prompts: Prompts,
        sampling: Samplings = None,
        *,
        on_token: OnToken | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[RequestOutput]:
        """Decode all prompts (texts or token ids) and return their outputs in order; `outputs` of one are its samples.
        `on_token` sees every event and cancels its sample by returning False; `progress(done, total)` counts samples.
        Raises ValueError for a prompt or parameters that the verifier cannot decode.
        """
        requests = self._builder.requests(prompts, sampling)
        num_done = 0
        with self._models:
            for event in self._run(requests):
                if on_token is not None and on_token(event) is False:
                    self.cancel(event.request_index, event.sample_index)
                if event.finish_reason is not None:
                    num_done += 1
                    if progress is not None:
                        progress(num_done, len(requests))
        return [request.output for request in requests if request.sample_index == 0]

    def stream(self, prompts: Prompts, sampling: Samplings = None) -> Iterator[StreamEvent]:
        """Yield the tokens and text each request gains, round by round. Closing the iterator cancels all requests."""
        return self._run(self._builder.requests(prompts, sampling))

    def request(self, index: int, prompt: str | Sequence[int], params: SamplingParams) -> list[ActiveRequest]:
        """A request for `serve`, `index` in its events: one per sample. Raises ValueError as `generate` does."""
        return self._builder.samples(index, prompt, params)

    def serve(self, arrivals: Arrivals) -> Iterator[StreamEvent]:
        """Decode requests that come while others are decoded. Before each round `arrivals(is_idle)` gives those that
        came (if the engine is idle, it may wait for one), or None to end; there it may also `cancel`."""
        return self._run([], arrivals)

    def cancel(self, request_index: int, sample_index: int | None = None) -> None:
        """End a prompt's samples, or one, before the next round; the output so far is kept."""
        self._cancelled.add((request_index, sample_index))

    def forget_requests(self) -> None:
        """Make the proposer forget the text of earlier requests, so that the same prompts can be compared again."""
        self.drafters.forget_requests()

    def reset_stats(self) -> None:
        self.stats = DecodeStats()

    # -- the loop

    def _run(self, requests: list[ActiveRequest], arrivals: Arrivals | None = None) -> Iterator[StreamEvent]:
        if self._is_running:
            raise ValueError(
                "the engine is decoding other prompts: their stream has not ended; read it to its end, close() it, or "
                "make another engine"
            )
        self._is_running = True
        num_rows = min(self.max_batch_size, len(requests)) if arrivals is None else self.max_batch_size
        vocab_size, num_drafters = self.verifier.vocab_size, len(self.drafters.methods)
        batch = Batch(requests, num_rows, vocab_size, self.verifier.device, num_drafters)
        self._cancelled.clear()
        try:
            for row in range(num_rows):
                self.verifier.truncate(row, 0)
            while batch.has_work or arrivals is not None:
                arrived = arrivals(not batch.has_work) if arrivals is not None else []
                if arrived is None:
                    break
                batch.waiting.extend(arrived)
                requests += arrived
                events = list(self._cancel(batch))
                batch.admit()
                with self._models:  # not held across a yield: inference mode would leak into the caller's code
                    events += self._prefill(batch) if batch.prefilling() else []
                    events += self._round(batch) if batch.decoding() else []
                if any(event.finish_reason is not None for event in events):
                    requests = self._count_finished(requests)
                yield from events
        finally:
            self._is_running = False
            for request in requests:
                if request.output.finish_reason is None:
                    request.finish("cancelled")
            self._count_finished(requests)

    def _count_finished(self, requests: list[ActiveRequest]) -> list[ActiveRequest]:
        """Add the statistics of the requests that ended; returns the others."""
        for request in requests:
            if request.output.finish_reason is not None:
                self.stats = self.stats + request.output.stats
        return [request for request in requests if request.output.finish_reason is None]

    def _round(self, batch: Batch) -> list[StreamEvent]:
        """Draft, score, verify, keep, commit."""
        start = perf_counter()
        requests = batch.decoding()
        drafts = self.drafters.propose(batch, requests)
        proposal = no_drafts(batch.width, batch.device) if drafts is None else usable_drafts(drafts, batch.vocab_size)
        drafted = perf_counter()
        output = self.verifier.score(*to_score(batch, proposal), proposal.parents_K)
        scored = perf_counter()
        accepted = on_host(self._verify(batch, proposal, output.logits_BTV), proposal, requests)
        if accepted.rows_in_doubt:
            proposal, output = score_again(self.verifier, batch, proposal, output, accepted.rows_in_doubt)
            accepted = on_host(self._verify(batch, proposal, output.logits_BTV), proposal, requests)
        self.verifier.keep(*accepted.to_keep(batch.width))
        batch.publish(accepted.token_ids_by_row, accepted.states(output.states_BTD))
        events = self._commit(batch, accepted, output.logits_BTV)
        times = RoundTimes(drafted - start, scored - drafted, perf_counter() - scored)
        account(requests, accepted, times, self.drafters.learning(requests))
        return events

    def _verify(self, batch: Batch, proposal: Proposal, logits_BTV: Tensor, first_row: int = 0) -> Verified:
        return verify(self.drafters.rule, batch, proposal, logits_BTV, first_row)

    def _commit(self, batch: Batch, accepted: Accepted, logits_BTV: Tensor, first_row: int = 0) -> list[StreamEvent]:
        """Append the accepted runs to their requests, free the rows of those that ended or whose scores failed."""
        events = []
        refuse_outside(accepted.token_ids_by_row, logits_BTV.shape[-1])
        if batch.seen is not None:
            batch.seen.add(accepted.token_ids_by_row)
        decoding = batch.decoding()
        asked = to_report(decoding, accepted.token_ids_by_row, accepted.columns_by_row, first_row)
        logprobs = logprobs_by_row(asked, logits_BTV)
        for row, token_ids in accepted.token_ids_by_row.items():
            request, error = decoding[row], None
            if row in accepted.failed_column_by_row:
                logits_V = logits_BTV[row - first_row, accepted.failed_column_by_row[row]]
                error = failure(logits_V, f"after {request.length + len(token_ids)} tokens")
            drafted = accepted.drafted(row, self.drafters.own_probs_by_row if row - first_row in asked else {})
            events.append(request.append(token_ids, logprobs.get(row - first_row), error, drafted))
            if events[-1].finish_reason is not None:
                self._release(batch, row)
        if accepted.is_finite_BT is not None:
            self.verifier.clear_unused()
        return events

    def _prefill(self, batch: Batch) -> list[StreamEvent]:
        """Score a chunk of every unfinished prompt, neighbouring rows together; prompts that end here emit a token."""
        start = perf_counter()
        requests = {
            row: request
            for row, request in batch.prefilling().items()
            if request.num_prefilled or not share_prompt_prefix(self.verifier, row, batch.rows)
        }
        events: list[StreamEvent] = []
        for rows in neighbours(list(requests)):
            events += self._prefill_rows(batch, {row: requests[row] for row in rows})
        for request in requests.values():
            request.output.stats.prefill_s += (perf_counter() - start) / len(requests)
        return events

    def _prefill_rows(self, batch: Batch, requests: dict[int, ActiveRequest]) -> list[StreamEvent]:
        first_row, num_rows = next(iter(requests)), len(requests)
        output = score_chunk(self.verifier, requests, self.prefill_chunk)
        ended = {row: request for row, request in requests.items() if request.is_prefilled}
        if not ended:
            return []
        nothing = no_drafts(num_rows, batch.device)
        accepted = on_host(self._verify(batch, nothing, output.logits_BTV, first_row), nothing, ended, first_row)
        # a proposer gets the prompt together with its first token
        drafted = {row: request for row, request in ended.items() if request.drafter is not None}
        token_ids = {row: request.prompt + accepted.token_ids_by_row[row] for row, request in drafted.items()}
        has_states = output.states_BTD is not None
        batch.publish(token_ids, {r: q.states_of_prompt() for r, q in drafted.items()} if has_states else None)
        return self._commit(batch, accepted, output.logits_BTV, first_row)

    def _cancel(self, batch: Batch) -> Iterator[StreamEvent]:
        if not self._cancelled:
            return
        for request in [q for q in batch.waiting if q.is_one_of(self._cancelled)]:
            batch.waiting.remove(request)
            yield request.cancel()
        for row, occupant in enumerate(batch.rows):
            if occupant is not None and occupant.is_one_of(self._cancelled):
                self._release(batch, row)
                yield occupant.cancel()
        self._cancelled.clear()

    def _release(self, batch: Batch, row: int) -> None:
        batch.release(row)
        self.verifier.truncate(row, 0)
