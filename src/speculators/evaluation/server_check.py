"""Whether a running server is the one a checkpoint was trained for: asked before the first request of a user.

/v1/models    which model was loaded          /tokenize    the same tokens as the verifier's tokenizer
/metrics      whether anything drafts, and, after some traffic, how long its drafts are
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing

import httpx

from speculators.checkpoint.findings import Finding, error, warning
from speculators.data_generation.preprocessing import load_tokenizer
from speculators.evaluation.server_client import MeasuredServer

PROBE = "Hello, Wörld!  12345 <|im_start|>\n\tdef f(x): return x**2  # 你好"
"""Words, spaces, digits, code, a marker and other scripts: two tokenizers rarely agree on all of it."""
TIMEOUT_S = 30.0


def server_findings(url: str, checkpoint: str, verifier: str | None) -> Iterable[Finding]:
    """Reports how the server at `url` differs from what `checkpoint` and its `verifier` need.

    Raises `ValueError` for an address that is none, `ServerUnavailableError` when nothing answers there.
    """
    with closing(MeasuredServer(url, timeout_s=TIMEOUT_S, max_retries=0, max_clients=1)) as server:
        if verifier is None:
            yield warning(
                *("server-not-compared", "verifier", "the checkpoint names no verifier"),
                *("only the one it was trained for accepts its drafts", "name it with --verifier"),
            )
        else:
            yield from model_findings(server, checkpoint, verifier)
            yield from tokenizer_findings(server, verifier)
        counters = server.counters()
        if not counters.speculates:
            yield error(
                *("server-drafts-nothing", f"{server.base_url}/metrics", "no counters of drafts"),
                *(
                    "a server that drafts counts them",
                    f"start it again with this drafter: speculators serve {checkpoint}",
                ),
            )
        elif counters.num_drafts and not counters.num_accepted:
            yield error(
                *(
                    "server-accepts-nothing",
                    f"{server.base_url}/metrics",
                    f"0 of {counters.num_drafted} drafts accepted",
                ),
                *("a drafter of this verifier is accepted", "see `speculators verify` for the checkpoint"),
            )


def model_findings(server: MeasuredServer, checkpoint: str, verifier: str) -> Iterable[Finding]:
    """`vllm serve CHECKPOINT` loads the verifier and may name the checkpoint; both are right."""
    root = server.served.root
    if not any(is_same_model(root, name) for name in (verifier, checkpoint)):
        yield error(
            *("server-other-model", f"{server.base_url}/v1/models", root),
            *(f"the drafter was trained for {verifier}", "serve that verifier, or train a drafter for this one"),
        )


def is_same_model(root: str, name: str) -> bool:
    """A directory may be served under another path than it had in training, and a hub id from its copy on disk."""
    if os.path.isdir(root) and os.path.isdir(name):
        return os.path.realpath(root) == os.path.realpath(name)
    return os.path.basename(root.rstrip("/")).lower() == os.path.basename(name.rstrip("/")).lower()


def tokenizer_findings(server: MeasuredServer, verifier: str) -> Iterable[Finding]:
    """Compares the tokens of one text; a server without `/tokenize` is reported as not compared."""
    request = {"model": server.served.name, "prompt": PROBE, "add_special_tokens": False}
    response = server.client.post(httpx.URL(f"{server.base_url}/tokenize"), json=request)
    body = response.json() if response.status_code == 200 else {}
    theirs = body.get("tokens") if isinstance(body, dict) else None
    if not isinstance(theirs, list):
        yield warning(
            *("server-not-compared", f"{server.base_url}/tokenize", f"answered {response.status_code} without tokens"),
            *("vLLM's server tells how it tokenises", "compare the tokenizers by hand"),
        )
        return
    ours = load_tokenizer(verifier).encode(PROBE, add_special_tokens=False)
    if theirs != ours:
        first = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), len(ours))
        yield error(
            *("server-other-tokenizer", f"{server.base_url}/tokenize", f"{len(theirs)} tokens, another at {first}"),
            *(f"the tokenizer of {verifier} makes {len(ours)}", "serve the verifier with its own tokenizer"),
        )
