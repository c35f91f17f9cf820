"""What a new drafter's directory holds: config.json and the tensors' names, types and shapes.

python tests/conformance/golden.py        writes tests/conformance/golden/*.json anew: read the difference
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from counting import BUILT_IN, counted_text, counting_verifier, untrained
from safetensors.torch import load_file

CHANGES_WITH_VERSIONS = ("transformers_version", "speculators_version")


def golden_path(name: str) -> Path:
    return Path(__file__).parent / "golden" / f"{name}.json"


def what_is_written(directory: Path, verifier: Path) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text().replace(str(verifier), "VERIFIER"))
    tensors = load_file(directory / "model.safetensors")
    return {
        "config": {key: value for key, value in config.items() if key not in CHANGES_WITH_VERSIONS},
        "tensors": {
            key: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for key, tensor in sorted(tensors.items())
        },
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        verifier, data = counting_verifier(root / "verifier"), counted_text(root / "data")
        for name in BUILT_IN:
            untrained(name, verifier, data, root / name).save_pretrained(root / name / "saved")
            golden_path(name).parent.mkdir(exist_ok=True)
            document = json.dumps(what_is_written(root / name / "saved", verifier), indent=1, sort_keys=True)
            golden_path(name).write_text(document + "\n")


if __name__ == "__main__":
    main()
