"""An HTTP server in this process that decodes with our engine and counts drafts under vLLM's names."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators.decoding.engine import Engine
from speculators.decoding.settings import SamplingParams
from speculators.model import SpeculatorModel

LENGTH = 128
NAMES = {"drafts": "drafts", "draft_tokens": "draft_tokens", "accepted": "accepted_tokens"}


class EngineServer:
    """What the handler asks. `spoil` changes the generated tokens, `count` the accepted drafts of a position."""

    def __init__(
        self,
        verifier: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        model: SpeculatorModel | None,
        num_drafts: int,
        *,
        root: str,
        spoil: Callable[[list[int], Mapping[str, Any]], list[int]] = lambda ids, request: ids,
        count: Callable[[list[int]], Sequence[int]] = lambda positions: positions,
    ) -> None:
        drafter = None if model is None else model.make_proposer(verifier, max_batch_size=1, max_length=LENGTH)
        options = {} if drafter is None else {"num_speculative_tokens": num_drafts}
        self.engine = Engine(verifier, drafter, max_batch_size=1, max_length=LENGTH, **options)
        self.tokenizer, self.root, self.num_drafts = tokenizer, root, num_drafts if drafter else 0
        self.spoil, self.count = spoil, count
        self.counters: Counter[str] = Counter()
        self.lock = threading.Lock()

    def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "seed", "ignore_eos")
        sampling = SamplingParams(**{name: request[name] for name in names if name in request})
        with self.lock:
            (output,) = self.engine.generate([request["prompt"]], sampling)
            stats, token_ids = output.stats, self.spoil(output.token_ids, request)
            self.counters["generated"] += len(token_ids)
            if self.num_drafts:
                positions = [*stats.accepted_per_position, *[0] * self.num_drafts][: self.num_drafts]
                positions = list(self.count(positions))
                self.counters["drafts"] += stats.num_drafts
                self.counters["draft_tokens"] += stats.num_drafted
                self.counters["accepted"] += sum(positions)
                self.counters.update({f"position {k}": number for k, number in enumerate(positions)})
        return {"choices": [{"text": "", "token_ids": token_ids}]}

    def metrics(self) -> str:
        lines = [f"vllm:generation_tokens_total {self.counters['generated']}"]
        if self.num_drafts:
            lines += [f"vllm:spec_decode_num_{theirs}_total {self.counters[ours]}" for ours, theirs in NAMES.items()]
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines += [f'{name}{{position="{k}"}} {self.counters[f"position {k}"]}' for k in range(self.num_drafts)]
        return "\n".join(lines) + "\n"


def handler_of(served: EngineServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def reply(self, body: object) -> None:
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            models = {"data": [{"id": served.root, "root": served.root, "max_model_len": LENGTH}]}
            self.reply(served.metrics() if self.path == "/metrics" else models)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self.reply({"tokens": served.tokenizer.encode(request["prompt"], add_special_tokens=False)})
            else:
                self.reply(served.complete(request))

    return Handler


@contextmanager
def running(served: EngineServer) -> Iterator[str]:
    """Inside, the server answers at the address that is yielded."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(served))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
