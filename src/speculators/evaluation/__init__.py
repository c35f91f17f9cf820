"""Measuring drafters: acceptance, losslessness and speed of any methods beside plain decoding, in one process.

    prompts -> [plain, method, method, ...] interleaved -> measurements -> rows with intervals -> report

Names are imported on first use, so that `import speculators` stays fast.
"""

from __future__ import annotations

import importlib
from typing import Any

EXPORTS = {
    "EvaluateConfig": "run",
    "evaluate": "run",
    "EvaluationReport": "records",
    "MethodRow": "records",
    "Measurement": "records",
    "Estimate": "statistics",
    "bootstrap": "statistics",
    "measure_interleaved": "latency",
    "summarise": "acceptance",
    "count_identical": "losslessness",
    "first_difference": "losslessness",
    "two_sample_p_value": "losslessness",
    "NotLosslessError": "losslessness",
    "load_prompts": "prompts",
    "report_table": "report",
    "save_report": "report",
}

__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
