"""One training step (forward and backward) of each drafter: fast routes against our own reference routes, as ratios.

    python benchmarks/train_step.py                                    T 2048, V 32000, bf16 autocast, 1 thread: minutes
    python benchmarks/train_step.py --length 512 --vocab 4000 --hidden 128                    seconds instead of minutes
    python benchmarks/train_step.py --algorithms eagle medusa mlp                                       the other three

Routes: `reference` = dense mask over all columns, logits of all supervised rows kept for autograd; `fast` = what
training uses. Each route runs in a process of its own, so that its peak memory is its own; the two take turns step by
step, so that a machine that slows down slows both. CPU seconds are the process's own: on a shared machine they are
steadier than wall seconds. Supervision: turns of 128 tokens, every second one supervised.
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
    parser.add_argument("--one", nargs=2, metavar=("ALGORITHM", "ROUTE"), help=argparse.SUPPRESS)
    return parser.parse_args()


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
    num_aux = len(model.target_layer_ids) if model.capture.aux_layer_ids else 1
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

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, keywords = DRAFTERS[algorithm][0](options, ROUTES[route])
    kwargs, _ = model.get_trainer_kwargs(**keywords, loss_implementation=ROUTES[route]["loss"])
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
    """Both routes of a drafter in turns."""
    shown = command_words(options)
    workers = {
        route: subprocess.Popen(
            [sys.executable, __file__, *shown, "--one", algorithm, route],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for route in ROUTES
    }
    steps: dict[str, list[dict[str, float]]] = {route: [] for route in ROUTES}
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
    rows["ratio"] = {key: rows["fast"][key] / rows["reference"][key] for key in MEASURED}
    return rows


def command_words(options: argparse.Namespace) -> list[str]:
    """The options of a worker, as the command line takes them."""
    left_out = ("one", "algorithms")
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
    print(f"{'drafter':<9}{'route':<11}{'cpu s':>8}{'wall s':>8}{'added MiB':>11}{'loss':>10}{'grad norm':>11}")
    for algorithm in options.algorithms:
        results[algorithm] = measure(options, algorithm)
        for route in ROUTES:
            row = results[algorithm][route]
            print(
                f"{algorithm:<9}{route:<11}{row['cpu_s']:>8.2f}{row['wall_s']:>8.2f}{row['added_peak_mib']:>11.0f}"
                f"{row['loss']:>10.4f}{row['grad_norm']:>11.4f}"
            )
        ratio = results[algorithm]["ratio"]
        sizes = DRAFTERS[algorithm][1].format(**vars(options))
        print(
            f"{'':<9}{'ratio':<11}{ratio['cpu_s']:>8.3f}{ratio['wall_s']:>8.3f}{ratio['added_peak_mib']:>11.3f}"
            f"    {sizes}",
            flush=True,
        )
    print(json.dumps({"options": {k: v for k, v in vars(options).items() if k != "one"}, "results": results}))


if __name__ == "__main__":
    main()
