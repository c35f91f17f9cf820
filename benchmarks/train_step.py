"""One training step (forward and backward) of each drafter: fast routes against our own reference routes, as ratios.

    python benchmarks/train_step.py                                    T 2048, V 32000, bf16 autocast, 1 thread: minutes
    python benchmarks/train_step.py --length 512 --vocab 4000 --hidden 128                    seconds instead of minutes
    python benchmarks/train_step.py --algorithms eagle medusa mlp                                       the other three
    python benchmarks/train_step.py --algorithms eagle3 --upstream PYTHON              beside the published package too

Routes: `reference` = dense mask over all columns, logits of all supervised rows kept for autograd; `fast` = what
training uses. Each route runs in a process of its own, so that its peak memory is its own; the two take turns step by
step, so that a machine that slows down slows both. CPU seconds are the process's own: on a shared machine they are
steadier than wall seconds. Supervision: turns of 128 tokens, every second one supervised.

PYTHON is the interpreter of an environment of its own, because the published package has the name of ours:

    python -m venv upstream && upstream/bin/pip install torch==2.13.0 speculators==0.9.0

Its classes have the names and arguments that ours have, so this script builds its models by the same lines. Of what it
offers, two kinds of attention run backward on a CPU (flex does not) and one loss (the fused one needs Triton).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

ROUTES = {
    "reference": {"attention": "eager", "loss": "eager"},
    "fast": {"attention": "simple_flex_attention", "loss": "fused"},
}
UPSTREAM_ROUTES = {
    "upstream sdpa": {"attention": "sdpa", "loss": "eager"},
    "upstream eager": {"attention": "eager", "loss": "eager"},
}
UPSTREAM_DRAFTERS = ("eagle3", "peagle", "dflash", "dspark")
"""Not mtp, which it builds of other layers, nor those that it has not."""
TURN = 128
MASK_TOKEN = 3
AUX_LAYERS = [1, 2, 3]
BLOCK_SIZE, BLOCK_LAYERS = 8, 5
MEASURED = ("cpu_s", "wall_s", "added_peak_mib")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=list(DRAFTERS), default=list(DRAFTERS)[:5])
    parser.add_argument("--length", type=int, default=2048, help="tokens of the packed row, in two documents")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--draft-vocab", type=int, default=0, help="0: all of the vocabulary")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=0, help="0: 11/4 of --hidden")
    parser.add_argument("--heads", type=int, default=0, help="0: as many as --hidden has room for")
    parser.add_argument("--kv-heads", type=int, default=0, help="0: as many as --heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="unroll steps (eagle3, eagle: HASS, mtp) and heads (mlp)")
    parser.add_argument("--anchors", type=int, default=256, help="of peagle, dflash and dspark")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of autocast")
    parser.add_argument("--repeats", type=int, default=2, help="measured steps of each route, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--upstream", metavar="PYTHON", default="", help="interpreter of the published package")
    parser.add_argument("--one", nargs=2, metavar=("ALGORITHM", "ROUTE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream and (rest := sorted(set(options.algorithms) - set(UPSTREAM_DRAFTERS))):
        parser.error(f"--upstream has no {', '.join(rest)} to compare with; name --algorithms of {UPSTREAM_DRAFTERS}")
    return options


def routes_of(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    return ROUTES | (UPSTREAM_ROUTES if options.upstream else {})


# -- the drafters: (model, keywords of forward); `note` is what the table says of their sizes ------------------------


def layer_config(options: argparse.Namespace, route: dict[str, str], family: str, num_layers: int = 1) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        family,
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate or options.hidden * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=options.heads or options.hidden // options.head_dim,
        num_key_value_heads=options.kv_heads or options.heads or options.hidden // options.head_dim,
        head_dim=options.head_dim,
        max_position_embeddings=options.length,
    )
    config._attn_implementation = route["attention"]
    return config


def with_verifier_weights(model: Any, *names: str) -> Any:
    """Random ones: what a drafter takes from its verifier is NaN until then. A draft vocabulary is the first ids."""
    import torch

    if getattr(model, "use_draft_vocab", False):
        num_draft = model.draft_vocab_size
        t2d = torch.arange(model.verifier_vocab_size) < num_draft
        model.load_vocab_mappings(t2d, torch.zeros(num_draft, dtype=torch.int64))
    for name in names:
        weight = getattr(model, name).weight
        torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def recorded(algorithm: str, num_tokens: int) -> Any:
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.proposals import GreedyTokenProposalConfig

    return SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=num_tokens)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=[]),
    )


def eagle3(options: argparse.Namespace, route: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    from speculators.models import Eagle3DraftModel, Eagle3SpeculatorConfig

    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer_config(options, route, "llama"),
        draft_vocab_size=options.draft_vocab or options.vocab,
        eagle_aux_hidden_state_layer_ids=AUX_LAYERS,
        norm_before_residual=True,
        norm_before_fc=True,
        norm_output=True,
    )
    model = with_verifier_weights(Eagle3DraftModel(config), "embed_tokens", "lm_head", "verifier_lm_head")
    return model, {"loss_fn": "kl_div", "ttt_steps": options.steps, "ttt_step_loss_decay": 1.0}


def peagle(options: argparse.Namespace, route: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    from speculators.models import PEagleDraftModel, PEagleSpeculatorConfig

    config = PEagleSpeculatorConfig(
        transformer_layer_config=layer_config(options, route, "llama"),
        draft_vocab_size=options.draft_vocab or options.vocab,
        eagle_aux_hidden_state_layer_ids=AUX_LAYERS,
        mask_token_id=MASK_TOKEN,
    )
    model = with_verifier_weights(PEagleDraftModel(config), "embed_tokens", "lm_head", "verifier_lm_head")
    return model, {"loss_fn": "kl_div", "max_anchors": options.anchors}


def dflash(options: argparse.Namespace, route: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    from speculators.models import DFlashDraftModel, DFlashSpeculatorConfig

    config = DFlashSpeculatorConfig(**block_fields(options, route))
    model = with_verifier_weights(DFlashDraftModel(config), "embed_tokens", "lm_head", "verifier_lm_head")
    return model, {"loss_fn": "ce", "max_anchors": options.anchors, "per_position_loss_weight": "dpace"}


def dspark(options: argparse.Namespace, route: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    from speculators.models import DSparkDraftModel, DSparkSpeculatorConfig

    config = DSparkSpeculatorConfig(**block_fields(options, route))
    model = with_verifier_weights(DSparkDraftModel(config), "embed_tokens", "lm_head", "verifier_lm_head")
    return model, {"loss_fn": "kl_div", "max_anchors": options.anchors}


def block_fields(options: argparse.Namespace, route: dict[str, str]) -> dict[str, Any]:
    return {
        "transformer_layer_config": layer_config(options, route, "qwen3", BLOCK_LAYERS),
        "draft_vocab_size": options.draft_vocab or options.vocab,
        "block_size": BLOCK_SIZE,
        "aux_hidden_state_layer_ids": AUX_LAYERS,
        "mask_token_id": MASK_TOKEN,
    }


def mtp(options: argparse.Namespace, route: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    from speculators.models import MTPDraftModel, MTPSpeculatorConfig

    config = MTPSpeculatorConfig(
        transformer_layer_config=layer_config(options, route, "qwen2"),
        speculators_config=recorded("mtp", options.steps),
    )
    model = with_verifier_weights(MTPDraftModel(config), "embed_tokens", "lm_head")
    return model, {"loss_fn": "ce", "num_speculative_steps": options.steps}


def eagle(options: argparse.Namespace, route: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    from speculators.models import EagleSpeculator, EagleSpeculatorConfig

    nested = layer_config(options, route, "llama")
    model = EagleSpeculator(EagleSpeculatorConfig(transformer_layer_config=nested))
    model.attach_verifier(
        AutoModelForCausalLM.from_config(layer_config(options, ROUTES["fast"] | {"attention": "sdpa"}, "llama")),
        "train_only",
    )
    return model, {"loss_fn": "kl_div", "ttt_steps": options.steps}


def medusa(options: argparse.Namespace, route: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    from speculators.models import MedusaDraftModel, MedusaSpeculatorConfig

    config = MedusaSpeculatorConfig(hidden_size=options.hidden, vocab_size=options.vocab, num_heads=options.steps)
    return with_verifier_weights(MedusaDraftModel(config), "verifier_lm_head"), {"loss_fn": "kl_div"}


def mlp(options: argparse.Namespace, route: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    from speculators.models import MLPSpeculator, MLPSpeculatorConfig

    config = MLPSpeculatorConfig(
        hidden_size=options.hidden, intermediate_size=options.hidden, vocab_size=options.vocab, num_layers=options.steps
    )
    return with_verifier_weights(MLPSpeculator(config), "verifier_lm_head"), {"loss_fn": "kl_div"}


DRAFTERS = {
    "eagle3": (eagle3, "1 layer, {steps} TTT steps, kl_div"),
    "peagle": (peagle, "1 layer, {anchors} anchors, 8 depths, kl_div"),
    "dflash": (dflash, f"{BLOCK_LAYERS} layers, {{anchors}} blocks of {BLOCK_SIZE}, ce, dpace"),
    "dspark": (dspark, f"{BLOCK_LAYERS} layers, {{anchors}} blocks of {BLOCK_SIZE}, kl_div, trained Markov head"),
    "mtp": (mtp, "1 layer, {steps} steps, ce of tokens"),
    "eagle": (eagle, "1 layer, HASS of {steps} steps, kl_div"),
    "medusa": (medusa, "{steps} trained heads, kl_div; no attention"),
    "mlp": (mlp, "{steps} steps of one trained head, kl_div; no attention"),
}
"""name -> (how it is made, what is said of its sizes)"""


def packed_row(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    import torch

    length, half = options.length, options.length // 2
    states_dtype = getattr(torch, options.dtype)
    index = torch.arange(length)[None]
    captures = not hasattr(model, "capture") or model.capture.aux_layer_ids  # upstream's drafters do, and do not say so
    num_aux = len(model.target_layer_ids) if captures else 1
    return {
        "hidden_states": torch.randn(1, length, num_aux * options.hidden).to(states_dtype),
        "verifier_last_hidden_states": torch.randn(1, length, options.hidden).to(states_dtype),
        "input_ids": torch.randint(0, options.vocab, (1, length)),
        "loss_mask": (index // TURN) % 2,
        "document_ids": index // half,
        "position_ids": 1 + index % half,
    }


# -- measuring -------------------------------------------------------------------------------------------------------


def serve_steps(options: argparse.Namespace, algorithm: str, route: str) -> None:
    """A worker: one step, and one line of JSON, for each line of input."""
    import torch
    import torch._dynamo  # an optimizer imports it, and so does the first part that recomputes: it is no step's memory

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kinds = (ROUTES | UPSTREAM_ROUTES)[route]
    model, keywords = DRAFTERS[algorithm][0](options, kinds)
    if route in UPSTREAM_ROUTES and hasattr(model, "capture"):
        raise SystemExit(f"--upstream: {sys.executable} imports this package, not the published one")
    kwargs, _ = model.get_trainer_kwargs(**keywords, loss_implementation=kinds["loss"])
    batch = packed_row(options, model)
    autocast = torch.autocast("cpu", torch.bfloat16) if options.dtype == "bfloat16" else nullcontext()
    before_mib = peak_mib()
    print("ready", flush=True)
    for _ in sys.stdin:
        model.zero_grad()
        torch.manual_seed(1)  # the same anchors on both routes, step after step
        cpu, wall = time.process_time(), time.perf_counter()
        with autocast:
            _, loss, _ = model(**batch, **kwargs)
        loss.backward()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        norm = float(sum(p.grad.double().norm() ** 2 for p in model.parameters() if p.grad is not None)) ** 0.5
        row = {"cpu_s": cpu, "wall_s": wall, "added_peak_mib": peak_mib() - before_mib}
        print(json.dumps({**row, "loss": float(loss.detach()), "grad_norm": norm}), flush=True)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(options: argparse.Namespace, algorithm: str) -> dict[str, dict[str, float]]:
    """All routes of a drafter in turns."""
    shown, routes = command_words(options), routes_of(options)
    workers = {
        route: subprocess.Popen(
            [*python_of(options, route), __file__, *shown, "--one", algorithm, route],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for route in routes
    }
    steps: dict[str, list[dict[str, float]]] = {route: [] for route in routes}
    try:
        for worker in workers.values():
            answer_of(worker)
        for _ in range(options.repeats + 1):
            for route, worker in workers.items():
                assert worker.stdin is not None
                print(file=worker.stdin, flush=True)
                steps[route].append(json.loads(answer_of(worker)))
    finally:
        for worker in workers.values():
            worker.communicate()
    rows = {route: summary(of_route[1:]) for route, of_route in steps.items()}
    for route in list(rows):
        if route != "fast":
            rows[f"fast / {route}"] = {key: rows["fast"][key] / rows[route][key] for key in MEASURED}
    return rows


def python_of(options: argparse.Namespace, route: str) -> list[str]:
    """Without this one's PYTHONPATH, where that of the published package runs."""
    return [options.upstream, "-E"] if route in UPSTREAM_ROUTES else [sys.executable]


def command_words(options: argparse.Namespace) -> list[str]:
    """The options of a worker, as the command line takes them."""
    left_out = ("one", "algorithms", "upstream")
    return [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items() if key not in left_out]


def answer_of(worker: subprocess.Popen) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"the worker ended with status {worker.wait()}; its errors are above")
    return line


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Median times; the peak is that of the last step."""
    return {**steps[-1], **{key: statistics.median(step[key] for step in steps) for key in ("cpu_s", "wall_s")}}


def main() -> None:
    options = arguments()
    if options.one:
        serve_steps(options, *options.one)
        return
    results = {}
    print(f"T {options.length}, V {options.vocab}, H {options.hidden}, {options.dtype}, {options.threads} thread(s)")
    print(f"    {'route':<22}{'cpu s':>8}{'wall s':>8}{'added MiB':>11}{'loss':>10}{'grad norm':>11}")
    for algorithm in options.algorithms:
        results[algorithm] = measure(options, algorithm)
        print(f"{algorithm}: {DRAFTERS[algorithm][1].format(**vars(options))}")
        for route, row in results[algorithm].items():
            cells = f"{row['cpu_s']:>8.3f}{row['wall_s']:>8.3f}{row['added_peak_mib']:>11.3f}"
            cells += f"{row['loss']:>10.4f}{row['grad_norm']:>11.4f}" if "loss" in row else ""
            print(f"    {route:<22}{cells}", flush=True)
    print(json.dumps({"options": {k: v for k, v in vars(options).items() if k != "one"}, "results": results}))


if __name__ == "__main__":
    main()
