"""What stored states cost a drafter: one training from bf16, fp8, and supervised-only states of the embedded verifier.

    python benchmarks/stored_states.py --output states-output [--conversations 600] [--epochs 4]

The verifier answers once; its states are stored in each form; EAGLE-3 is trained from each with the same seed and
decodes the same held-out prompts. Bytes: all files of a store per token. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from speculators.assets import prompts_path, tiny_verifier_path
from speculators.cli.app import quieten_libraries
from speculators.cli.app import run as run_verb

FORMS = {
    "bf16": ["--states-dtype", "bfloat16"],
    "fp8": ["--states-dtype", "fp8"],
    "fp8, supervised": ["--states-dtype", "fp8", "--last-states", "supervised"],
}
RECIPE = ("--draft-vocab-size", "2048", "--total-seq-len", "512", "--lr", "3e-3")
NUM_DRAFTS, NUM_PROMPTS, MAX_TOKENS = "4", "40", "128"


def measured(folder: Path, name: str, flags: list[str], epochs: int) -> dict[str, Any]:
    """Stores the states in one form, trains from them alone, and decodes held-out prompts."""
    verifier, data = str(tiny_verifier_path()), str(folder / "data")
    states, run = folder / name.replace(", ", "-") / "states", folder / name.replace(", ", "-") / "run"
    stored = ["--data", data, "--output", str(states), "--in-process", "--verifier", verifier, *flags]
    report = run_verb(["generate-offline-data", *stored])
    num_bytes = sum(file.stat().st_size for file in states.rglob("*") if file.is_file())
    source = ["--hidden-states-path", str(states), "--on-missing", "raise", "--epochs", str(epochs), *RECIPE]
    trained = run_verb(["train", "--verifier", verifier, "--data", data, "--output", str(run), *source])
    drafter = ["--method", trained["checkpoint"], "--num-speculative-tokens", NUM_DRAFTS]
    asked = ["--data", str(prompts_path("heldout")), "--num-prompts", NUM_PROMPTS, "--max-tokens", MAX_TOKENS]
    result = run_verb(["evaluate", "--verifier", verifier, *asked, *drafter])
    row = next(row for row in result["rows"] if row["method"] != "none")
    return {
        "states": name,
        "bytes_a_token": num_bytes / report["num_tokens"],
        "validation_loss": trained["metrics"]["loss"],
        "acceptance_length": row["acceptance_length"],
        "identical": f"{row['num_identical']} of {row['num_prompts']}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("states-output"))
    parser.add_argument("--conversations", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    quieten_libraries()
    answers, verifier = given.output / "responses.jsonl", str(tiny_verifier_path())
    answering = ["--data", str(prompts_path("train")), "--output", str(answers), "--limit", str(given.conversations)]
    resumed = ["--resume"] if answers.exists() else []
    run_verb(["regenerate-responses", "--verifier", verifier, *answering, "--max-tokens", MAX_TOKENS, *resumed])
    run_verb(["prepare-data", "--verifier", verifier, "--data", str(answers), "--output", str(given.output / "data")])
    rows = [measured(given.output, name, flags, given.epochs) for name, flags in FORMS.items()]
    print("| states | bytes a token | of bf16 | validation loss | acceptance length | of bf16 | same text |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        length, size = row["acceptance_length"], row["bytes_a_token"]
        share = length["value"] / rows[0]["acceptance_length"]["value"]
        interval = f"{length['value']:.2f} ({length['low']:.2f} to {length['high']:.2f})"
        cells = [row["states"], f"{size:,.0f}", f"{size / rows[0]['bytes_a_token']:.3f}"]
        cells += [f"{row['validation_loss']:.4f}", interval, f"{share:.3f}", row["identical"]]
        print(f"| {' | '.join(cells)} |")
    print(json.dumps({"benchmark": "stored_states", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
