"""A small stand-in for a vLLM server, in a process of its own: the protocol of extraction, of completions and metrics.

usage: fake_server.py STATE_DIR [serve MODEL] [--port P] ...

STATE_DIR/faults.json  {"faults": [...]}: written by tests; each completion request takes one fault off the list.
STATE_DIR/log.txt      a line a request: its fault.

States are a function of the token, its position and the slot, so a test can say what it must receive:
state[t, slot, h] = token_ids[t] + 100 * slot + h / 16 + t / 4
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN_SIZE = 4
LOCK = threading.Lock()


def states_of(token_ids: list[int], num_slots: int, hidden_size: int = HIDDEN_SIZE) -> np.ndarray:
    tokens = np.asarray(token_ids, dtype=np.float32)
    position = np.arange(len(tokens), dtype=np.float32) / 4
    slot = 100 * np.arange(num_slots, dtype=np.float32)
    feature = np.arange(hidden_size, dtype=np.float32) / 16
    return (tokens + position)[:, None, None] + slot[None, :, None] + feature[None, None]


def rendered(messages: list[dict]) -> list[int]:
    """The prompt's tokens by the template and tokenizer of test_regenerate_server."""
    token_ids: list[int] = []
    for message in [*messages, {"role": "assistant", "content": None}]:
        text = f"{message['role']}: {message['content'] or ''}"
        token_ids += [1, *(127 if letter == " " else ord(letter) for letter in text), 0]
    return token_ids[:-1]


class Fake:
    """What the server knows between requests."""

    def __init__(self, directory: Path, model: str, num_slots: int, hidden_size: int, drafts: bool) -> None:
        self.hidden_size = hidden_size
        self.answers = flag(
            "--answers", ""
        )  # "tokens": as vLLM; "text": refuses vLLM's keys; "chat": knows only messages
        self.max_model_len = int(flag("--length", "64"))
        self.delay_s = float(flag("--delay", "0"))
        self.num_in_flight = self.most_in_flight = 0
        self.directory, self.model, self.num_slots, self.drafts = directory, model, num_slots, drafts
        self.num_requests = 0
        self.counters = dict.fromkeys(["drafts", "draft_tokens", "accepted", "pos0", "pos1", "pos2", "generated"], 0)

    def next_fault(self) -> str:
        with LOCK:
            self.num_requests += 1
            path = self.directory / "faults.json"
            faults = json.loads(path.read_text())["faults"] if path.exists() else []
            fault = faults.pop(0) if faults else ""
            path.write_text(json.dumps({"faults": faults}))
            with (self.directory / "log.txt").open("a") as log:
                log.write(f"{fault or 'ok'}\n")
            return fault


class Handler(BaseHTTPRequestHandler):
    fake: Fake
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, code: int, body: object, headers: dict[str, str] | None = None) -> None:
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, "")
        elif self.path == "/v1/models":
            self.reply(
                200,
                {"data": [{"id": self.fake.model, "root": self.fake.model, "max_model_len": self.fake.max_model_len}]},
            )
        elif self.path == "/metrics":
            self.reply(200, self.metrics())
        else:
            self.reply(404, {})

    def metrics(self) -> str:
        counters, labels = self.fake.counters, f'engine="0",model_name="{self.fake.model}"'
        lines = [f"vllm:generation_tokens_total{{{labels}}} {float(counters['generated'])}"]
        if self.fake.drafts:
            names = {"drafts": "drafts", "draft_tokens": "draft_tokens", "accepted": "accepted_tokens"}
            lines += [f"vllm:spec_decode_num_{names[k]}_total{{{labels}}} {float(counters[k])}" for k in names]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{i}"}} '
                f"{float(counters[f'pos{i}'])}"
                for i in range(3)
            ]
        return "# HELP x\n" + "\n".join(lines) + "\n"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            tokens = flag("--tokens", "")  # "words": an answer that is no JSON
            body: object = "no JSON" if tokens == "words" else {"tokens": json.loads(tokens or "null")}
            self.reply(200 if tokens else 404, body)
            return
        fault = self.fake.next_fault()
        if fault == "500":
            self.reply(500, {"error": "injected"})
        elif fault.startswith(("429", "503")):  # "429 2": busy, and says for how many seconds
            code, _, wait_s = fault.partition(" ")
            self.reply(int(code), {"error": "busy"}, {"Retry-After": wait_s} if wait_s else None)
        elif fault == "400":
            self.reply(400, {"error": {"message": "prompt too long"}})
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fake.answers:
            self.reply(*self.answer(request))
        elif request.get("max_tokens") == 1 and not self.fake.drafts:
            self.reply(200, self.extract(request["prompt"], fault))
        else:
            self.reply(200, self.complete(request))

    def extract(self, token_ids: list[int], fault: str) -> dict:
        directory = self.fake.directory / "states"
        directory.mkdir(exist_ok=True)
        path = directory / f"{os.getpid()}-{self.fake.num_requests}-{time.monotonic_ns()}.safetensors"
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
        states = states_of(token_ids, self.fake.num_slots, self.fake.hidden_size)
        saved = [token + 1 for token in token_ids] if fault == "other tokens in file" else token_ids
        if fault == "nan":
            states[1, 0, 2] = np.nan
        if fault == "one slot less":
            states = states[:, 1:]
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write() -> None:
            time.sleep(0.15 if fault == "slow writer" else 0.0)
            if fault != "no file":
                save_file({"hidden_states": states, "token_ids": np.asarray(saved, dtype=np.int64)}, path)
            if fault == "truncated":
                os.truncate(path, path.stat().st_size // 2)
            if fault != "lock never released":
                os.close(lock)

        threading.Thread(target=write).start()
        if fault == "no lock file":
            time.sleep(0.1)
            os.unlink(f"{path}.lock")
        echoed = token_ids[:-1] if fault == "other tokens echoed" else token_ids
        answer = {"choices": [{"text": "x", "prompt_token_ids": echoed, "token_ids": [7]}]}
        if fault != "no path":
            named = fault.removeprefix("names ") if fault.startswith("names ") else str(path)
            answer["kv_transfer_params"] = {"hidden_states_path": named}
        return answer | json.loads(fault.removeprefix("answers ") if fault.startswith("answers ") else "{}")

    def answer(self, request: dict) -> tuple[int, dict]:
        """One to four letters that depend on prompt, seed and temperature, and the end token 0."""
        if self.fake.answers == "text" and "return_token_ids" in request:
            return 400, {"error": "Unrecognized request argument supplied: return_token_ids"}
        if self.fake.answers == "chat":
            if not self.path.endswith("/chat/completions"):
                return 404, {"error": "This is a chat model and not supported in the v1/completions endpoint"}
            request["prompt"] = rendered(request["messages"])
        if self.headers.get("Authorization", "") != flag("--authorization", ""):
            return 401, {"error": "invalid api key"}
        with LOCK:
            self.fake.num_in_flight += 1
            self.fake.most_in_flight = max(self.fake.most_in_flight, self.fake.num_in_flight)
            (self.fake.directory / "in_flight.txt").write_text(str(self.fake.most_in_flight))
        time.sleep(self.fake.delay_s)
        with LOCK:
            self.fake.num_in_flight -= 1
        drawn = random.Random(f"{request['prompt']} {request['seed']} {request['temperature']}")
        letters = [drawn.choice("abcdefgh") for _ in range(drawn.randint(1, 4))]
        choice = {"text": "".join(letters), "finish_reason": "stop"}
        if self.fake.answers == "chat":
            choice = {"message": {"role": "assistant", "content": choice["text"]}, "finish_reason": "stop"}
        if self.fake.answers == "tokens":
            token_ids = [ord(letter) for letter in letters] + [0]
            choice |= {"token_ids": token_ids, "prompt_token_ids": request["prompt"], "stop_reason": None}
        return 200, {"choices": [choice]}

    def complete(self, request: dict) -> dict:
        """Tokens that depend on the prompt only. With drafts: K = 3, rounds accept 3, 0, 1, 3, 0, 1, ... of them."""
        num_tokens = request["max_tokens"]
        first = sum(request["prompt"])
        token_ids = [(first + i) % 50 for i in range(num_tokens)]
        with LOCK:
            counters, emitted, rounds = self.fake.counters, 1, 0
            counters["generated"] += num_tokens
            while emitted < num_tokens:
                accepted = (3, 0, 1)[rounds % 3]
                emitted, rounds = emitted + accepted + 1, rounds + 1
                counters["drafts"] += 1
                counters["draft_tokens"] += 3
                counters["accepted"] += accepted
                for i in range(accepted):
                    counters[f"pos{i}"] += 1
        time.sleep(0.002 if self.fake.drafts else 0.004)
        return {"choices": [{"text": "", "token_ids": token_ids}], "usage": {"completion_tokens": num_tokens}}


def flag(name: str, default: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "pid.txt").write_text(str(os.getpid()))
    print("fake server starting", " ".join(sys.argv[2:]), flush=True)
    if "--fail" in sys.argv:
        print("ValueError: no such model, says the fake server", flush=True)
        sys.exit(3)
    if "--with-worker" in sys.argv:  # as vLLM's engine core: outlives its parent unless somebody ends it
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (directory / "worker.txt").write_text(str(worker.pid))
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "--never-healthy" in sys.argv:
        time.sleep(600)
    fake = Fake(
        directory,
        flag("--model", "fake"),
        int(flag("--slots", "3")),
        int(flag("--hidden", "4")),
        "--drafts" in sys.argv,
    )
    Handler.fake = fake
    ThreadingHTTPServer.allow_reuse_address = True
    server = ThreadingHTTPServer(("127.0.0.1", int(flag("--port", "0"))), Handler)
    (directory / "port.txt").write_text(str(server.server_address[1]))
    print("listening", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
