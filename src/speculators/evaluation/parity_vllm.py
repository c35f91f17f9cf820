"""Decoding with the real vLLM, in the environment it lives in: one process, several engines one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speculators.evaluation.config import VllmTarget

JOB = Path(__file__).with_name("vllm_job.py")
KV_CACHE_BYTES = 256 << 20
TIMEOUT_S = 1800


@dataclass(frozen=True)
class VllmRun:
    """One engine and what it decodes; see `vllm_job`."""

    model: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    speculative_config: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    engine: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `LLM`."""


@dataclass(frozen=True)
class VllmResult:
    """A list has one entry per prompt; counts are empty without speculation."""

    token_ids: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    time_s: float = 0.0
    error: str | None = None


def speculative_run(target: VllmTarget, num_speculative_tokens: int, **shared: Any) -> VllmRun:
    """`shared`: the fields that it has in common with the plain run."""
    drafting = {**target.speculative_config, "num_speculative_tokens": num_speculative_tokens}
    return VllmRun(target.model, speculative_config=drafting, **shared)


def decode_in_vllm(
    python: str | Path, runs: Sequence[VllmRun], *, env: dict[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> list[VllmResult]:
    """Results in order. A run that fails says so in `error`; the others go on."""
    if not Path(python).is_file():
        raise ValueError(f"{python} is no Python: name the one of an environment with vLLM, e.g. .venv-vllm/bin/python")
    with tempfile.TemporaryDirectory() as folder:
        # from a copy: the script's own directory comes first on sys.path, and ours has modules of common names
        script = shutil.copy(JOB, folder)
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        job.write_text(json.dumps([{**asdict(run), "engine": engine_arguments(run)} for run in runs]))
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # ours would shadow theirs
        finished = subprocess.run(
            [str(python), script, str(job), str(result)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**own, **(env or {})},
            check=False,
        )
        if not result.is_file():
            said = (finished.stdout[-2000:] + finished.stderr[-4000:]).strip()
            raise RuntimeError(f"{python} did not get to decode with vLLM (exit {finished.returncode}):\n{said}")
        return [VllmResult(**values) for values in json.loads(result.read_text())]


def engine_arguments(run: VllmRun) -> dict[str, Any]:
    """Arguments of `LLM`: small, eager and without a prefix cache, since only the arithmetic is compared."""
    longest = max(map(len, run.prompts)) + run.max_tokens
    defaults = {
        "dtype": "float32",
        "max_model_len": longest + 64,
        "enforce_eager": True,
        "disable_log_stats": False,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "max_num_seqs": 8,
        "seed": 0,
        "enable_prefix_caching": False,
    }
    return {**defaults, **run.engine}
