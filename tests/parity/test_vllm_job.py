"""The way to vLLM and back, with a stand-in for vLLM that counts upwards: runs in order, failures apart, said."""

from __future__ import annotations

import sys

import pytest

from speculators.evaluation.config import VllmTarget
from speculators.evaluation.parity_vllm import VllmRun, decode_in_vllm, speculative_run

STAND_IN = """
from types import SimpleNamespace as N


class SamplingParams:
    def __init__(self, **settings):
        self.__dict__.update(settings)


class LLM:
    def __init__(self, model, **arguments):
        if model == "broken":
            raise ValueError("no such model")
        self.drafting = arguments.get("speculative_config")
        assert arguments["dtype"] == "float32"
        assert ("per_request_spec_decode_metrics" in arguments) == bool(self.drafting)

    def generate(self, prompts, sampling, use_tqdm):
        return [N(outputs=[self.answer(p["prompt_token_ids"], s)]) for p, s in zip(prompts, sampling)]

    def answer(self, ids, sampling):
        import statistics  # the standard library's, not a module beside the job
        statistics.median([1])
        tokens = [ids[-1] + 1 + i for i in range(sampling.max_tokens)]
        counts = {"num_accepted_draft_tokens": 3, "num_draft_tokens": 8, "num_spec_steps": sampling.seed or 2}
        return N(token_ids=tokens, spec_decode_metrics=N(to_dict=lambda: counts) if self.drafting else None)
"""


@pytest.fixture
def env(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "vllm" / "distributed.py").write_text("def cleanup_dist_env_and_memory():\n    pass\n")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")  # ours is not theirs
    return {"PYTHONPATH": str(tmp_path)}


def test_runs_come_back_in_order_and_one_failure_stops_no_other(env):
    target = VllmTarget(sys.executable, "good", {"method": "m"}, env)
    prompts = [[1, 2], [9]]
    plain, broken, drafted, seeded = decode_in_vllm(
        target.python,
        [
            VllmRun("good", prompts, 3),
            VllmRun("broken", prompts, 3),
            speculative_run(target, 4, prompts=prompts, max_tokens=2),
            VllmRun("good", prompts, 1, {"method": "m"}, sampling={"temperature": 1.0, "seeds": [5, 6]}),
        ],
        env=target.env,
    )
    assert plain.token_ids == [[3, 4, 5], [10, 11, 12]] and plain.accepted == [] and plain.error is None
    assert "ValueError: no such model" in broken.error and broken.token_ids == []
    assert drafted.token_ids == [[3, 4], [10, 11]]
    assert (drafted.accepted, drafted.drafted, drafted.rounds) == ([3, 3], [8, 8], [2, 2])
    assert seeded.rounds == [5, 6]


def test_an_environment_without_vllm_is_said(tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('there is no vllm')")
    with pytest.raises(ValueError, match=r"/no/python is no Python: name the one of an environment with vLLM"):
        decode_in_vllm("/no/python", [VllmRun("m", [[1]], 1)])
    with pytest.raises(
        RuntimeError, match=r"did not get to decode with vLLM \(exit 1\):\n[\s\S]*No module named 'vllm'"
    ):
        decode_in_vllm(sys.executable, [VllmRun("m", [[1]], 1)])
