"""One training step (forward and backward) of a drafter: fast routes against our own reference routes, as ratios.

    python benchmarks/train_step.py                      T 2048, V 32000, bf16 autocast, 1 thread: minutes
    python benchmarks/train_step.py --length 512 --vocab 4000 --hidden 128       seconds instead of minutes

Routes: `reference` = dense mask over all columns, logits of all rows kept for autograd; `fast` = what training uses.
Each route runs in a process of its own, so that its peak memory is its own. CPU seconds are the process's own: on a
shared machine they are steadier than wall seconds. Supervision: turns of 128 tokens, every second one supervised.
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

ALGORITHMS = ("eagle3",)
ROUTES = {
    "reference": {"attention": "eager", "loss": "eager"},
    "fast": {"attention": "simple_flex_attention", "loss": "fused"},
}
TURN = 128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--length", type=int, default=2048, help="tokens of the packed row, in two documents")
    parser.add_argument("--vocab", type=int, default=32000, help="draft vocabulary")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ttt-steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of autocast")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("ALGORITHM", "ROUTE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def eagle3(options: argparse.Namespace, route: dict[str, str]):
    """(model, forward keywords)"""
    import torch
    from transformers import LlamaConfig

    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    hidden = options.hidden
    nested = LlamaConfig(
        vocab_size=options.vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=1,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
    )  # fmt: skip
    nested._attn_implementation = route["attention"]
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=nested, draft_vocab_size=options.vocab, eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        norm_before_residual=True, norm_before_fc=True, norm_output=True,
    )  # fmt: skip
    model = Eagle3DraftModel(config)
    for module in (model.embed_tokens, model.lm_head, model.verifier_lm_head):
        torch.nn.init.normal_(module.weight, std=hidden**-0.5)
    kwargs, _ = model.get_trainer_kwargs(
        loss_fn="kl_div", loss_implementation=route["loss"], ttt_steps=options.ttt_steps, ttt_step_loss_decay=1.0
    )
    return model, kwargs


def packed_row(options: argparse.Namespace, num_aux: int = 3):
    import torch

    length, half = options.length, options.length // 2
    index = torch.arange(length)[None]
    return {
        "hidden_states": torch.randn(1, length, num_aux * options.hidden).bfloat16(),
        "verifier_last_hidden_states": torch.randn(1, length, options.hidden).bfloat16(),
        "input_ids": torch.randint(0, options.vocab, (1, length)),
        "loss_mask": (index // TURN) % 2,
        "document_ids": index // half,
        "position_ids": 1 + index % half,
    }


def measure(options: argparse.Namespace, algorithm: str, route: str) -> dict[str, float]:
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, kwargs = {"eagle3": eagle3}[algorithm](options, ROUTES[route])
    batch = packed_row(options)
    autocast = torch.autocast("cpu", torch.bfloat16) if options.dtype == "bfloat16" else nullcontext()
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu_s, wall_s = [], []
    for _ in range(options.repeats + 1):  # the first one warms up
        model.zero_grad()
        cpu, wall = time.process_time(), time.perf_counter()
        with autocast:
            _, loss, _ = model(**batch, **kwargs)
        loss.backward()
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    norm = float(sum(p.grad.double().norm() ** 2 for p in model.parameters() if p.grad is not None)) ** 0.5
    return {
        "cpu_s": statistics.median(cpu_s[1:]),
        "wall_s": statistics.median(wall_s[1:]),
        "added_peak_mib": peak_mib - before_mib,
        "loss": float(loss.detach()),
        "grad_norm": norm,
    }


def main() -> None:
    options = arguments()
    if options.one:
        print(json.dumps(measure(options, *options.one)))
        return
    shown = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items()
             if key not in ("one", "algorithms")]  # fmt: skip
    results: dict[str, dict[str, dict[str, float]]] = {}
    header = f"{'algorithm':<12}{'route':<12}{'cpu s':>8}{'wall s':>8}{'added MiB':>11}{'loss':>10}{'grad norm':>11}"
    print(header)
    for algorithm in options.algorithms:
        results[algorithm] = {}
        for route in ROUTES:
            command = [sys.executable, __file__, *shown, "--one", algorithm, route]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = results[algorithm][route] = json.loads(output.splitlines()[-1])
            print(
                f"{algorithm:<12}{route:<12}{row['cpu_s']:>8.2f}{row['wall_s']:>8.2f}{row['added_peak_mib']:>11.0f}"
                f"{row['loss']:>10.4f}{row['grad_norm']:>11.4f}"
            )
        fast, reference = results[algorithm]["fast"], results[algorithm]["reference"]
        ratios = {key: fast[key] / reference[key] for key in ("cpu_s", "wall_s", "added_peak_mib")}
        results[algorithm]["ratio"] = ratios
        print(f"{'':<12}{'ratio':<12}{ratios['cpu_s']:>8.3f}{ratios['wall_s']:>8.3f}{ratios['added_peak_mib']:>11.3f}")
    print(json.dumps({"options": {k: v for k, v in vars(options).items() if k != "one"}, "results": results}))


if __name__ == "__main__":
    main()
