"""Whether a running server is the one a checkpoint was trained for: asked before the first request of a user.

/v1/models    which model was loaded          /tokenize    the same tokens as the verifier's tokenizer
/metrics      whether anything drafts, and, after some traffic, whether any draft was accepted
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing

from speculators.checkpoint.findings import Finding, error, warning
from speculators.data_generation.preprocessing import load_tokenizer
from speculators.data_generation.vllm_client import InvalidResponseError, TransientError, checked_json
from speculators.evaluation.server_client import MeasuredServer
from speculators.utils.files import is_same_model

PROBE = "Hello, Wörld!  12345 <|im_start|>\n\tdef f(x): return x**2  # 你好"
"""Words, spaces, digits, code, a marker and other scripts: two tokenizers rarely agree on all of it."""
TIMEOUT_S = 30.0


def server_findings(url: str, checkpoint: str, verifier: str | None) -> Iterable[Finding]:
    """Reports how the server at `url` differs from what `checkpoint` and its `verifier` need.

    Raises `ValueError` for an address that is none, `ServerUnavailableError` when nothing answers there.
    """
    with closing(MeasuredServer(url, timeout_s=TIMEOUT_S, max_retries=0, max_clients=1)) as server:
        if verifier is None:
            found, rule = "the checkpoint names no verifier", "only the one it was trained for accepts its drafts"
            yield warning("server-not-compared", "verifier", found, rule, "name it with --verifier")
        else:
            yield from model_findings(server, checkpoint, verifier)
            yield from tokenizer_findings(server, verifier)
        yield from counter_findings(server, checkpoint)


def counter_findings(server: MeasuredServer, checkpoint: str) -> Iterable[Finding]:
    where, counters = f"{server.base_url}/metrics", server.counters()
    if not counters.speculates:
        fix = f"start it again with this drafter: speculators serve {checkpoint}"
        yield error("server-drafts-nothing", where, "no counters of drafts", "a server that drafts counts them", fix)
    elif counters.num_drafts and not counters.num_accepted:
        found, fix = (f"0 of {counters.num_drafted} drafts accepted", "ask `speculators verify` about the checkpoint")
        yield error("server-accepts-nothing", where, found, "a drafter of this verifier is accepted", fix)


def model_findings(server: MeasuredServer, checkpoint: str, verifier: str) -> Iterable[Finding]:
    """`vllm serve CHECKPOINT` loads the verifier and may name the checkpoint; both are right."""
    root = server.served.root
    if not any(may_be(root, name) for name in (verifier, checkpoint)):
        rule, fix = f"the drafter was trained for {verifier}", "serve that verifier, or train a drafter for this one"
        yield error("server-other-model", f"{server.base_url}/v1/models", root, rule, fix)


def may_be(root: str, name: str) -> bool:
    """Says whether a server that loaded `root` may serve `name`: the same model, or, where one of the two is not a
    directory here, one of the same last name: a hub id and its copy on another disk."""
    if is_same_model(root, name):
        return True
    are_here = os.path.isdir(root) and os.path.isdir(name)
    return not are_here and os.path.basename(root.rstrip("/")).lower() == os.path.basename(name.rstrip("/")).lower()


def tokenizer_findings(server: MeasuredServer, verifier: str) -> Iterable[Finding]:
    """Compares the tokens of one text; a server without `/tokenize` is reported as not compared."""
    where = f"{server.base_url}/tokenize"
    request = {"model": server.served.name, "prompt": PROBE, "add_special_tokens": False}
    try:
        theirs = checked_json(server.client.post(where, json=request)).get("tokens")
    except (InvalidResponseError, TransientError) as refusal:
        theirs, found = None, str(refusal)
    else:
        found = "an answer without tokens"
    if not isinstance(theirs, list):
        rule, fix = "vLLM's server tells how it tokenises", "compare the tokenizers by hand"
        yield warning("server-not-compared", where, found, rule, fix)
        return
    ours = load_tokenizer(verifier).encode(PROBE, add_special_tokens=False)
    if theirs != ours:
        pairs = enumerate(zip(theirs, ours, strict=False))
        first = next((i for i, (their, our) in pairs if their != our), min(len(theirs), len(ours)))
        found, rule = f"{len(theirs)} tokens, another at {first}", f"the tokenizer of {verifier} makes {len(ours)}"
        yield error("server-other-tokenizer", where, found, rule, "serve the verifier with its own tokenizer")
