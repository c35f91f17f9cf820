"""Measures drafters: acceptance, losslessness and speed of any methods beside plain decoding, in one process.

    prompts -> [plain, method, method, ...] interleaved -> measurements -> rows with intervals -> report

Names are imported on first use, so that `import speculators` stays fast.
"""

from __future__ import annotations

from speculators.utils.names import lazy_attributes

EXPORTS = {
    "EvaluateConfig": "config",
    "ParityConfig": "config",
    "ServerConfig": "config",
    "DiagnoseConfig": "config",
    "Cause": "diagnosis",
    "Diagnosis": "diagnosis",
    "VllmTarget": "config",
    "measure_methods": "suite",
    "check_parity": "parity",
    "ParityReport": "parity",
    "ParityError": "parity",
    "evaluate_server": "server",
    "ServerReport": "server",
    "EvaluationReport": "report",
    "load_result": "report",
    "write_page": "page",
    "result_schema": "report",
    "MethodRow": "records",
    "NotLosslessError": "report",
    "Measurement": "measurement",
    "measure_interleaved": "measurement",
    "summarise": "measurement",
    "Estimate": "statistics",
    "bootstrap": "statistics",
    "count_identical": "statistics",
    "first_difference": "statistics",
    "two_sample_p_value": "statistics",
}

__all__ = sorted(EXPORTS)

__getattr__, __dir__ = lazy_attributes(__name__, EXPORTS)
